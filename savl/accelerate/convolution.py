"""Convolutions outside of the blocks, such as those at the ends of groups and in upsamplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, register
from savl.ops import KernelSettings
from savl.ops.convolution import CONVOLUTION


class Convolution(Adapter):
    """A 1×1 or 3×3 `torch.nn.Conv2d` that keeps the size of the image.

    Only calls with channels-last features and without gradients are served. The features between blocks are
    channels-last views of tokens, and the result is channels-last too, as that of torch. For other layouts torch's
    convolution is as fast.
    """

    name = "convolution"
    title = "convolution"
    op = CONVOLUTION
    is_layer = True

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        return parts.is_convolution(block)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        return None

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        side = block.kernel_size[0]
        return f"{side}x{side}, {block.in_channels} to {block.out_channels} channels"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        image = parts.draw(generator, batch, 5 * rows, 7 * columns, block.in_channels)
        return (image.permute(0, 3, 1, 2),)

    def why_not(self, block: Any, input: Tensor) -> str | None:
        """See `Adapter.why_not`."""
        if input.dim() != 4 or input.stride(1) != 1 or input.shape[1] == 1:
            return "its input is not channels-last"
        if torch.is_grad_enabled() and (input.requires_grad or block.weight.requires_grad):
            return "it needs gradients"
        return None

    def forward(self, block: Any, kernels: KernelSettings, input: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        return parts.layer(input.permute(0, 2, 3, 1), block, kernels).permute(0, 3, 1, 2)


register(Convolution())
