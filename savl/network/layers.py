"""Layers and padding that the parts of the network share. Features keep the layout ``(B, H, W, C)``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from savl import ops
from savl.ops import KernelSettings


class LayerNorm(nn.LayerNorm):
    """Normalise over the channels of each pixel with `savl.ops.layer_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.kernels: KernelSettings | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, H, W, C)``; the dtype is that of ``input``, under CUDA's autocast float32."""
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, kernels=self.kernels)


class ChannelsLastConv2d(nn.Conv2d):
    """A 1×1 or 3×3 convolution that keeps the size of the image, computed by `savl.ops.convolution`."""

    def __init__(self, in_channels: int, out_channels: int, side: int, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, side, padding=side // 2 * dilation, dilation=dilation)
        self.kernels: KernelSettings | None = None

    def forward(self, input: Tensor, norm: LayerNorm | None = None, **parts: Any) -> Tensor:
        """Map ``(B, H, W, in_channels)`` to ``(B, H, W, out_channels)``.

        Args:
            input: The features.
            norm: Applied to ``input`` first.
            parts: Further keyword arguments of `savl.ops.convolution`, such as ``activation`` and ``residual``.
        """
        return _convolve(self, input, norm, dilation=self.dilation[0], **parts)


class ChannelsLastLinear(nn.Linear):
    """A linear layer over the channels of each pixel, computed by `savl.ops.convolution`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.kernels: KernelSettings | None = None

    def forward(self, input: Tensor, norm: LayerNorm | None = None, **parts: Any) -> Tensor:
        """Map ``(B, H, W, in_features)`` to ``(B, H, W, out_features)``; arguments as for `ChannelsLastConv2d`."""
        return _convolve(self, input, norm, **parts)


def _convolve(
    layer: ChannelsLastConv2d | ChannelsLastLinear, input: Tensor, norm: LayerNorm | None, **parts: Any
) -> Tensor:
    if norm is not None:
        parts |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    return ops.convolution(input, layer.weight, layer.bias, **parts, kernels=layer.kernels)


def normalise_once(norm: LayerNorm, x: Tensor) -> tuple[Tensor, LayerNorm | None]:
    """Choose where to normalise an input that several layers share.

    If the convolution is fused, each layer normalises its own input, which avoids a separate pass over memory.
    Otherwise, the input is normalised once here.

    Args:
        norm: The normalisation.
        x: ``(B, H, W, C)``.

    Returns:
        ``x`` and ``norm``, for layers that normalise themselves; or the normalised ``x`` and None.
    """
    return (x, norm) if ops.fuses_convolution(x, norm.kernels) else (norm(x), None)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = ChannelsLastLinear(channels, hidden)
        self.contract = ChannelsLastLinear(hidden, channels)
        self.kernels: KernelSettings | None = None

    def forward(self, x: Tensor, norm: LayerNorm, residual: Tensor | None) -> Tensor:
        """Return ``residual + contract(GELU(expand(norm(x))))``, all ``(B, H, W, C)``; ``residual`` may be None."""
        out: Tensor = self.contract(self.expand(x, norm, activation="gelu"), residual=residual)
        return out

    def after_attention(
        self,
        attended: Tensor,
        proj: ChannelsLastLinear,
        residual: Tensor,
        norm: LayerNorm,
        expand: ChannelsLastConv2d | None = None,
        hidden: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Compute the end of a block with `savl.ops.projection_mlp`.

        Args:
            attended: ``(B, H, W, C)``, the result of attention.
            proj: Its projection.
            residual: ``(B, H, W, C)``.
            norm: Normalisation before the MLP.
            expand: 3×3 convolution of ``hidden``, or None without channel attention, as are the next two.
            hidden: ``(B, H, W, D)``.
            gate: ``(B, rows, columns, C)``.

        Returns:
            ``y + contract(GELU(expand(norm(y))))`` with ``y = residual + proj(attended) + gate · expand(hidden)``.
        """
        if must_be_called(proj, self.expand, self.contract, *(() if expand is None else (expand,))):
            x = proj(attended, residual=residual)
            x = x if expand is None else expand(hidden, residual=x, gate=gate)
            composed: Tensor = self(x, norm, x)
            return composed
        return ops.projection_mlp(
            attended,
            proj.weight,
            proj.bias,
            residual,
            hidden,
            None if expand is None else expand.weight,
            None if expand is None else expand.bias,
            gate,
            norm.weight,
            norm.bias,
            self.expand.weight,
            self.expand.bias,
            self.contract.weight,
            self.contract.bias,
            eps=norm.eps,
            kernels=self.kernels,
        )


def must_be_called(*layers: nn.Module) -> bool:
    """Return whether a layer has hooks or was replaced. An op must then not read the parameters of the layers."""
    return any(
        bool(layer._forward_hooks or layer._forward_pre_hooks)
        or not isinstance(layer, ChannelsLastConv2d | ChannelsLastLinear)
        for layer in layers
    )


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on the device of a tensor.

    It does nothing where autocast is off already, because an exported program would contain it.
    """
    kind = x.device.type
    active = not x.is_meta and torch.is_autocast_enabled(kind)  # torch has no autocast for meta tensors
    return torch.autocast(kind, enabled=False) if active else nullcontext()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): while training, drop the branch for whole samples and rescale the rest."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    @property
    def active(self) -> bool:
        """Whether samples may be dropped."""
        return self.training and self.probability > 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(B, ...)``, zero for dropped samples and divided by the keep rate for the others."""
        if not self.active:
            return x
        keep = 1.0 - self.probability
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask / keep


def relative_bias_table(window: int, key_window: int, heads: int) -> nn.Parameter:
    """Create a bias table for `savl.ops`, ``((window + key_window − 1)², heads)``, with random values."""
    table = torch.empty((window + key_window - 1) ** 2, heads)
    nn.init.trunc_normal_(table, std=0.02)
    return nn.Parameter(table)


def reflect_pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad an image by reflection, to the right and downwards, up to multiples of a size.

    Unlike `torch.nn.functional.pad`, this accepts padding larger than the image: the reflection is then repeated. A
    side of one pixel is replicated.

    Args:
        image: ``(..., H, W)``, H and W at least 1.
        multiple: In pixels, at least 1.

    Returns:
        ``(..., H', W')`` with H' and W' the next multiples; ``image`` itself if no padding is needed.

    Raises:
        ValueError: ``image`` has no pixels, or ``multiple`` < 1.
    """
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image must have shape (..., H, W) with H and W at least 1, got {tuple(image.shape)}")
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1 pixel, got {multiple}")
    height, width = image.shape[-2:]
    return reflect_pad_to_size(image, next_multiple(height, multiple), next_multiple(width, multiple))


def next_multiple(length: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``length``, which is at least 1.

    In a program that `torch.export` makes, it is ``multiple`` times a symbol of its own for each call. Otherwise, each
    view of each block would have the formula of the padding in its sizes, and PyTorch would simplify it for minutes.
    """
    # Not -(-length // multiple): the division of ONNX rounds towards zero.
    count = (length + multiple - 1) // multiple
    if torch.compiler.is_exporting() and not isinstance(count, int):  # a symbol, although it is declared as an int
        count = cast(int, torch.full((), count, dtype=torch.int64, device="cpu").item())
        torch._check(count >= 1)
    return count * multiple


def reflect_pad_to_size(image: Tensor, height: int, width: int) -> Tensor:
    """Pad an image ``(..., H, W)`` as `reflect_pad_to_multiple` does, to a size in pixels that is at least its own."""
    # A program that `torch.export` makes holds for sizes that need padding and for sizes that need none.
    always = torch.compiler.is_exporting()
    for dim, target in ((-2, height), (-1, width)):
        length = image.shape[dim]
        if always or target != length:
            image = image.index_select(dim, _reflected_index(length, target, image.device))
    return image


def _reflected_index(length: int, target: int, device: torch.device) -> Tensor:
    position = torch.arange(target, device=device)
    # 1 for a single pixel, whose index is always 0. A tensor, because ONNX has no remainder by a free size.
    period = torch.full((), 2 * (length - 1), device=device).clamp_min(1)
    position = position % period
    return torch.minimum(position, period - position)
