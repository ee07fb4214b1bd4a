"""Layers and padding that the parts of the network share. Features keep the layout ``(B, H, W, C)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savl import ops
from savl.ops import KernelSettings


class ChannelsLastConv2d(nn.Conv2d):
    """Convolve ``(B, H, W, C)`` features. Their permuted view is channels_last, so cuDNN and oneDNN need no copy."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(B, H, W, in_channels)`` to ``(B, H, W, out_channels)``."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DilatedConv2d(nn.Conv2d):
    """A dilated convolution that can be trained in bfloat16 and channels_last on a CPU.

    On processors without AMX, oneDNN computes the weight gradient with an AVX-512 kernel that reads beyond the end of
    its scratch memory and may crash the process. It does so for dilated bfloat16 convolutions in channels_last whose
    number of input channels is above 16 and no multiple of 16 (seen with torch 2.13). In the contiguous layout, oneDNN
    uses another kernel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``, contiguous in the case above."""
        weight = self.weight
        if input.device.type == "cpu" and self.dilation != (1, 1) and torch.is_grad_enabled() and weight.requires_grad:
            narrow = torch.is_autocast_enabled("cpu") or input.dtype == torch.bfloat16
            if narrow:
                input, weight = input.contiguous(), weight.contiguous()
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


class LayerNorm(nn.LayerNorm):
    """Normalise over the channels of each pixel with `savl.ops.layer_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.kernels: KernelSettings | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, H, W, C)``; float32 under autocast, as with `torch.nn.LayerNorm`."""
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, kernels=self.kernels)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.activation = nn.GELU()
        self.contract = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, H, W, C)``."""
        out: Tensor = self.contract(self.activation(self.expand(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): while training, drop the branch for whole samples and rescale the rest."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(B, ...)``, zero for dropped samples and divided by the keep rate for the others."""
        if not self.training or self.probability == 0.0:
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
