"""The parts that blocks of several families share: checks of their layers, and their computation with savl's ops.

Features have the layout ``(B, H, W, C)``. Tokens ``(B, H·W, C)`` are the same memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from savl import ops
from savl.ops import KernelSettings
from savl.ops.relative_position import relative_position_index
from savl.ops.window_attention import Pair, as_pair, shift_mask, shift_regions


def has(block: nn.Module, *names: str) -> bool:
    """Return whether a module has all of these attributes."""
    return all(hasattr(block, name) for name in names)


def is_linear(layer: object) -> bool:
    """Return whether a layer is exactly `torch.nn.Linear`: subclasses may compute something else."""
    return type(layer) is nn.Linear


def is_norm(layer: object) -> bool:
    """Return whether a layer is `torch.nn.LayerNorm` over the channels, with weight and bias."""
    return type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.bias is not None


def is_convolution(layer: object) -> bool:
    """Return whether `savl.ops.convolution` computes a layer: `torch.nn.Conv2d`, 1×1 or 3×3, of the image's size."""
    if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.stride != (1, 1):
        return False
    if layer.kernel_size not in ((1, 1), (3, 3)) or layer.dilation[0] != layer.dilation[1]:
        return False
    margin = layer.kernel_size[0] // 2 * layer.dilation[0]
    zeros = layer.padding_mode == "zeros" or margin == 0
    return zeros and layer.padding in ((margin, margin), "same")


def activation_of(layer: object) -> dict[str, Any] | None:
    """Return the activation as arguments of `savl.ops.convolution`; None if it has no such activation."""
    if type(layer) is nn.GELU and layer.approximate == "none":
        return {"activation": "gelu"}
    if type(layer) is nn.LeakyReLU:
        return {"activation": "leaky_relu", "slope": float(layer.negative_slope)}
    return {"activation": "leaky_relu", "slope": 0.0} if type(layer) is nn.ReLU else None


def is_mlp(mlp: object) -> bool:
    """Return whether a module is two linear layers ``fc1`` and ``fc2`` with an activation ``act`` between them."""
    return isinstance(mlp, nn.Module) and has(mlp, "fc1", "act", "fc2") and is_linear(mlp.fc1) and is_linear(mlp.fc2)


def fuses_residual(drop_path: nn.Module) -> bool:
    """Return whether stochastic depth does nothing now, so that the residual can be added in the op before it."""
    return isinstance(drop_path, nn.Identity) or not drop_path.training


def layer(
    x: Tensor,
    weights: nn.Linear | nn.Conv2d,
    kernels: KernelSettings,
    norm: nn.LayerNorm | None = None,
    **parts: Any,
) -> Tensor:
    """Apply a linear layer or convolution to features ``(B, H, W, C)`` with `savl.ops.convolution`.

    Args:
        x: The features.
        weights: The layer.
        kernels: Kernels to use.
        norm: Applied to ``x`` first.
        parts: Further arguments of the op, such as ``activation`` and ``residual``.
    """
    if norm is not None:
        parts |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    if isinstance(weights, nn.Conv2d):
        parts["dilation"] = weights.dilation[0]
    out: Tensor = ops.convolution(x, weights.weight, weights.bias, **parts, kernels=kernels)
    return out


def normalised_once(x: Tensor, norm: nn.LayerNorm, kernels: KernelSettings) -> tuple[Tensor, nn.LayerNorm | None]:
    """Return an input that several layers normalise, and the normalisation that they still have to do.

    Where convolutions are fused, each layer normalises its input while it reads it. Elsewhere it is normalised here.
    """
    if ops.fuses_convolution(x, kernels):
        return x, norm
    return ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps, kernels=kernels), None


def apply_mlp(
    x: Tensor, mlp: Any, norm: nn.LayerNorm | None, kernels: KernelSettings, residual: Tensor | None
) -> Tensor:
    """Return ``residual + fc2(act(fc1(norm(x))))`` for a module that `is_mlp`."""
    fused = activation_of(mlp.act)
    hidden = layer(x, mlp.fc1, kernels, norm, **fused or {})
    if fused is None:
        hidden = mlp.act(hidden)
    return layer(hidden, mlp.fc2, kernels, residual=residual)


def added(branch: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual + branch``, in the memory of the branch where gradients and dtypes allow it."""
    if branch.requires_grad or residual.requires_grad or branch.dtype != residual.dtype:
        return residual + branch
    return branch.add_(residual)


def add(residual: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """Return ``residual + drop_path(branch)``; both are ``(B, H, W, C)``, and stochastic depth sees tokens."""
    dropped: Tensor = drop_path(branch.flatten(1, 2))
    return residual + dropped.view(residual.shape)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal numbers, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Index buffers and masks


def index_refusal(index: object, window: int | Pair, table: Tensor) -> str | None:
    """Return why a buffer is not the index of relative positions that savl's bias tables have; None if it is."""
    expected = relative_position_index(as_pair(window), as_pair(window))
    if not isinstance(index, Tensor) or index.numel() != expected.numel():
        return "its index of relative positions has another shape"
    if not torch.equal(index.detach().cpu().long().view(expected.shape), expected):
        return "its index of relative positions has another order"
    return None if table.shape[0] == int(expected.max()) + 1 else "its bias table has another number of rows"


def swin_mask(
    height: int, width: int, window: Pair, shift: Pair, value: float = -100.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the mask of shifted windows, ``(windows, N, N)``: ``value`` between different sides, else 0."""
    sides = shift_regions(height, width, window, shift, "cpu")
    return shift_mask(sides, sides, value, torch.empty(0, dtype=dtype))


_checked_masks: dict[int, tuple[weakref.ref[Tensor], object, bool]] = {}


def is_shift_mask(mask: Tensor, height: int, width: int, window: Pair, shift: Pair, value: float = -100.0) -> bool:
    """Return whether a tensor is the mask of shifted windows: 0 within a side of the image, ``value`` elsewhere.

    A network makes one mask for all of its blocks, so a tensor is compared once. Inside of compiled programs and on
    GPUs, where reading it would make the CPU wait, the shape alone is compared.

    Args:
        mask: ``(windows, N, N)``.
        height: Height of the features.
        width: Width of the features.
        window: Size of the windows.
        shift: Their shift; if it is 0, the mask has to be 0.
        value: The value between pixels of different sides.
    """
    pixels = window[0] * window[1]
    if mask.shape != (height * width // pixels, pixels, pixels):
        return False
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        return True
    # Inference tensors do not count their changes; a mask of another call is another tensor.
    key = (None if mask.is_inference() else mask._version, height, width, window, shift, value)
    found = _checked_masks.get(id(mask))
    if found is not None and found[0]() is mask and found[1] == key:
        return found[2]
    result = torch.equal(mask.detach(), swin_mask(height, width, window, shift, value, mask.dtype))
    if len(_checked_masks) > 64:
        _checked_masks.clear()
    _checked_masks[id(mask)] = (weakref.ref(mask), key, result)
    return result


def whole_windows(height: int, width: int, window: Pair) -> bool:
    """Return whether windows cover an image exactly."""
    return height % window[0] == 0 and width % window[1] == 0


def sizes_label(window: Pair, shift: Pair, heads: int, channels: int) -> str:
    """Return the sizes of an attention block in the words of the report."""

    def text(size: Pair) -> str:
        return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"

    moved = f", shift {text(shift)}" if shift != (0, 0) else ""
    return f"window {text(window)}{moved}, {heads} heads of {channels // heads}"
