"""What blocks on tokens with square windows have in common, as in Swin Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments


class TokenBlock(Adapter):
    """A block with `window_size`, `shift_size` and `attn.qkv`, called as ``block(tokens, (height, width))``.

    The tokens are ``(B, H·W, C)``. Windows must cover the image.
    """

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        return parts.sizes_label(window, shift, block.attn.num_heads, block.attn.qkv.in_features)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        height, width = rows * block.window_size, columns * block.window_size
        return parts.draw(generator, batch, height * width, block.attn.qkv.in_features), (height, width)

    def why_not(self, block: Any, x: torch.Tensor, x_size: Any) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        whole = parts.whole_windows(height, width, (block.window_size,) * 2)
        return None if whole else "windows do not cover the image"
