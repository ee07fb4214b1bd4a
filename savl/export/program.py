"""Capture of a network as a program of `torch.export` whose batch, height and width are free, from one pixel up."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from savl.export.errors import ExportError, reason_of
from savl.export.foreign_code import fold_weights, free_batch
from savl.network.upscaling import UpscalingNetwork
from savl.ops import use_fused_kernels

LARGEST_WINDOW = 64
"""Images to capture and to check have about this size at most, in windows of the network."""
_IMAGES = 11
"""Number of captured images. No other size in a network is likely to equal it, so that `free_batch` recognises it."""


class Upscale(nn.Module):
    """The function that is exported: image in, upscaled image out."""

    def __init__(self, network: UpscalingNetwork, strength: float | None, dtype: torch.dtype = torch.float32) -> None:
        """Wrap a network.

        Args:
            network: A float32 or float64 network.
            strength: A number in [0, 1], or None for the network's own strength.
            dtype: torch.bfloat16 to compute under autocast.
        """
        super().__init__()
        self.network = network
        self.strength = strength
        self.dtype = dtype

    def forward(self, lr: Tensor) -> Tensor:
        """Map ``(B, 3, h, w)`` in [0, 1] to ``(B, 3, scale·h, scale·w)``; both have the same dtype."""
        autocast = torch.autocast(lr.device.type, self.dtype) if self.dtype == torch.bfloat16 else nullcontext()
        # A model of gray images takes each colour channel as an image.
        with autocast, free_batch(self.network, (lr.shape[0], 3 * lr.shape[0])):
            sr: Tensor = self.network(lr, strength=self.strength)
        return sr.to(lr.dtype)


def frozen_copy(network: UpscalingNetwork) -> UpscalingNetwork:
    """Return a copy in evaluation mode, without gradients, and not compiled."""
    duplicate = copy.deepcopy(network).eval().requires_grad_(False)
    duplicate._compiled_call_impl = None
    return duplicate


def window_of(network: UpscalingNetwork) -> int:
    """Return the side of the windows of a network in pixels, at most `LARGEST_WINDOW`."""
    return min(network.size_multiple, LARGEST_WINDOW)


def smallest_side(network: UpscalingNetwork) -> int:
    """Return the side in pixels to which smaller images are padded, at least one window."""
    traits = getattr(network, "traits", None)
    return max(window_of(network), 1 if traits is None else traits.minimum_size)


def capture(module: Upscale, *, fused: bool) -> ExportedProgram:
    """Return the program of a network for images ``(B, 3, h, w)`` with any B, h and w from 1 up.

    Args:
        module: The network, in evaluation mode and without gradients.
        fused: Whether the program calls savl's fused ops where they serve; otherwise it consists of PyTorch's own
            operations.

    Raises:
        ExportError: The network's code depends on the numbers of pixels or on the values of the image.
    """
    side = window_of(module.network)
    parameter = next(module.parameters())
    # Code that depends on sizes is captured as it runs for this image. No side is one window, is the minimum, is a
    # multiple of the window, or equals the other after padding: padding by nothing is right, its omission is not; and
    # a mask that a network made for one size, mostly a square, is not used.
    least = smallest_side(module.network)
    fold_weights(module.network)
    example = torch.rand(_IMAGES, 3, least + 3, least + side + 5, device=parameter.device, dtype=parameter.dtype)
    free = {0: Dim("batch", min=1), 2: Dim("height", min=1), 3: Dim("width", min=1)}
    with torch.no_grad(), use_fused_kernels(fused), sizes_of_one(), quiet():
        try:
            program = torch.export.export(
                module, (example,), dynamic_shapes=(free,), prefer_deferred_runtime_asserts_over_guards=True
            )
        except Exception as error:  # the exporter raises errors of every kind
            raise ExportError(
                f"{name_of(module.network)} cannot be exported with free batch, height and width: {reason_of(error)}"
            ) from error
    _remove_assertions(program)
    return program


def name_of(network: UpscalingNetwork) -> str:
    """Return the architecture of a network."""
    traits = getattr(network, "traits", None)
    if traits is not None:
        return str(traits.architecture)
    has_field = network.has_field
    return "SAVL" if has_field else "HAT"


@contextmanager
def sizes_of_one() -> Iterator[None]:
    """Let the sizes of an exported program be 1 while the context is active.

    PyTorch otherwise assumes that a free size is at least 2. A release without this setting raises an error about the
    specified range.
    """
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):
        yield
        return
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings of PyTorch's exporters, none of which a user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _remove_assertions(program: ExportedProgram) -> None:
    """Remove assertions about sizes.

    Some state that a size is not 1, where it makes no difference, such as that of padding an image to one window.
    Others are true, but PyTorch cannot prove them. What the program computes at different sizes is checked afterwards.
    """
    assertions = (torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range_for_size.default)
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in assertions:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
