"""Layers and padding that the parts of the network share. Features keep the layout ``(B, H, W, C)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savl import ops
from savl.ops import KernelSettings


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution of ``(B, H, W, C)`` features: the permuted view is what cuDNN and oneDNN call channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, in_channels)`` → ``(B, H, W, out_channels)``."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DilatedConv2d(nn.Conv2d):
    """A dilated convolution that can be trained in bfloat16 and channels_last on a CPU.

    oneDNN's AVX-512 kernel for the weight gradient, which serves processors without AMX, reads beyond the end of its
    scratch memory and may crash the process where a dilated bfloat16 convolution in channels_last has more than 16
    input channels that are no multiple of 16 (seen with torch 2.13). In the contiguous layout another kernel serves.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, in_channels, h, w)`` → ``(B, out_channels, h, w)``; contiguous in the case above."""
        weight = self.weight
        if input.device.type == "cpu" and self.dilation != (1, 1) and torch.is_grad_enabled() and weight.requires_grad:
            narrow = torch.is_autocast_enabled("cpu") or input.dtype == torch.bfloat16
            if narrow:
                input, weight = input.contiguous(), weight.contiguous()
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a pixel, by `savl.ops.layer_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.kernels: KernelSettings | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, C)`` → ``(B, H, W, C)``; float32 under autocast, as torch's."""
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, kernels=self.kernels)


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.activation = nn.GELU()
        self.contract = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` → ``(B, H, W, C)``."""
        out: Tensor = self.contract(self.activation(self.expand(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training drop the branch for whole samples, rescale the others."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the batch first."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask / keep


def relative_bias_table(window: int, key_window: int, heads: int) -> nn.Parameter:
    """A fresh bias table for `savl.ops`: ``((window + key_window − 1)², heads)``."""
    table = torch.empty((window + key_window - 1) ** 2, heads)
    nn.init.trunc_normal_(table, std=0.02)
    return nn.Parameter(table)


def reflect_pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Extend an image to the right and downwards by mirror images of itself.

    Where `torch.nn.functional.pad` would refuse because the padding reaches past the image, the reflection goes back
    and forth; a side of one pixel is repeated.

    Args:
        image: ``(..., H, W)``, H and W at least 1.
        multiple: In pixels, at least 1.

    Returns:
        ``(..., H', W')`` with H' and W' the next multiples; the image itself where nothing is missing.

    Raises:
        ValueError: ``image`` has no pixel, or ``multiple`` < 1.
    """
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image must have shape (..., H, W) with H and W at least 1, got {tuple(image.shape)}")
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1 pixel, got {multiple}")
    for dim in (-2, -1):
        length = image.shape[dim]
        target = -(-length // multiple) * multiple
        if target != length:
            image = image.index_select(dim, _reflected_index(length, target, image.device))
    return image


def _reflected_index(length: int, target: int, device: torch.device) -> Tensor:
    position = torch.arange(target, device=device)
    if length == 1:
        return torch.zeros_like(position)
    period = 2 * (length - 1)
    position = position % period
    return torch.minimum(position, period - position)
