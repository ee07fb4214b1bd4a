"""Comparison of an exported file with the network in PyTorch, at several sizes, by the rule of the fused kernels.

With ref64 the network in float64, and eager the network in PyTorch with its own operations, in the dtype of the file:

    max|file − ref64| ≤ 2 · max|eager − ref64| + tiny

as in `savl.ops.equivalence`. The error of eager is the largest one at any size, because the few pixels of a small image
may be exact by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from savl.export.errors import ExportError
from savl.export.program import Upscale, name_of, smallest_side, window_of
from savl.network.upscaling import UpscalingNetwork
from savl.ops import use_fused_kernels
from savl.ops.equivalence import measure

TERMS = 2**16
"""Terms in the sums of the float64 reference, more than in any layer; they matter only for its own rounding."""

_LARGE = 67
"""Least height in pixels of the large image."""


@dataclass(frozen=True)
class SizeCheck:
    """What a file computes for images of one size.

    Attributes:
        batch: Number of images.
        height: Height in pixels.
        width: Width in pixels.
        difference: max|file − eager|, the largest difference from the network in PyTorch.
        error: max|file − ref64|.
        allowed: The largest error that is allowed.
    """

    batch: int
    height: int
    width: int
    difference: float
    error: float
    allowed: float

    @property
    def kept(self) -> bool:
        """Whether the error is allowed. False for NaN."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.batch}x3x{self.height}x{self.width}"


def sizes_to_check(window: int, smallest: int) -> tuple[tuple[int, int, int], ...]:
    """Return batch, height and width of the images: one pixel, odd, two images, whole windows, and large.

    Args:
        window: Side of the windows of the network in pixels.
        smallest: Side to which smaller images are padded.
    """
    return (
        (1, 1, 1),
        (1, window + 1, max(window - 1, 3)),
        (2, 9, 14),
        (1, window, 2 * window),
        (1, max(smallest + 2 * window - 3, _LARGE), smallest + window + 7),
    )


def check_file(run: Callable[[Tensor], Tensor], module: Upscale, exact: UpscalingNetwork) -> list[SizeCheck]:
    """Compare a file with the network.

    Args:
        run: Function that computes the file.
        module: The network that was exported.
        exact: A copy of the network, which is converted to float64.

    Returns:
        One result per size. The caller must check them with `require_agreement`.

    Raises:
        ExportError: The file does not run, or returns an image of another size; or the network has no float64.
    """
    place = next(module.parameters()).device
    exact = exact.cpu().double()
    reference_of = Upscale(exact, module.strength)
    name = name_of(module.network)
    found = []
    for seed, (batch, height, width) in enumerate(
        sizes_to_check(window_of(module.network), smallest_side(module.network))
    ):
        size = f"{batch}x3x{height}x{width}"
        generator = torch.Generator().manual_seed(seed)
        lr = torch.rand(batch, 3, height, width, generator=generator)
        with torch.no_grad(), use_fused_kernels(False):
            eager = module(lr.to(place)).cpu()
            try:
                reference = reference_of(lr.double())
            except RuntimeError as error:
                raise ExportError(f"{name} cannot be checked, as it has no float64: {error}") from error
        try:
            result = run(lr)
        except Exception as error:  # a runtime raises errors of every kind
            reason = " ".join(str(error).split())
            raise ExportError(
                f"the file made from {name} fails at size {size}: {type(error).__name__}: {reason[:400]}"
            ) from error
        if result.shape != reference.shape or result.dtype != eager.dtype:
            raise ExportError(
                f"the file made from {name} returns {result.dtype} {tuple(result.shape)} at size {size}; "
                f"the network returns {eager.dtype} {tuple(reference.shape)}"
            )
        budget = measure("sr", result, eager, reference, TERMS)
        difference = float((result.double() - eager.double()).abs().max())
        found.append((batch, height, width, difference, budget))
    eager_error = max(budget.eager_error for *_, budget in found)
    tiny = max(budget.tiny for *_, budget in found)
    return [
        SizeCheck(batch, height, width, difference, budget.error, 2 * eager_error + tiny)
        for batch, height, width, difference, budget in found
    ]


def require_agreement(checks: list[SizeCheck], module: Upscale) -> None:
    """Raise an error if a file does not compute what the network does.

    Raises:
        ExportError: The error at one of the sizes is larger than allowed.
    """
    for check in checks:
        if not check.kept:
            raise ExportError(
                f"the file made from {name_of(module.network)} computes another image at size {check}: its error is "
                f"{check.error:.3g}, but at most {check.allowed:.3g} is allowed; the file was not written"
            )
