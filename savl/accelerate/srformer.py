"""The blocks of SRFormer: permuted self-attention, whose keys hold 2×2 pixels each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, keep, register
from savl.accelerate.conv_ffn import apply_conv_ffn, is_conv_ffn
from savl.ops import KernelSettings
from savl.ops.window_attention import shift_mask, shift_regions


class PermutedBlock(Adapter):
    """``x + attention(norm1(x))``, then ``x + ffn(norm2(x))``, called as ``block(tokens, (height, width))``.

    Keys and values have a quarter of the channels. Each key joins those of 2×2 pixels, so that key windows have half
    the size of the windows. The bias table is that of the key windows, and the mask is −100.
    """

    name = "psa"
    title = "PSA block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "attn", "norm2", "mlp", "drop_path", "window_size", "shift_size", "input_resolution")
        if not parts.has(block, *names, "permuted_window_size"):
            return False
        inner = ("q", "kv", "proj", "relative_position_bias_table", "aligned_relative_position_index", "num_heads")
        return parts.has(block.attn, *inner, "scale")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention = block.attn
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and is_conv_ffn(block.mlp)):
            return "its norms or its ConvFFN are of other kinds"
        if not (parts.is_linear(attention.q) and parts.is_linear(attention.kv) and parts.is_linear(attention.proj)):
            return "its projections are no plain linear layers"
        channels = attention.q.in_features
        if channels % 4 != 0 or (attention.q.out_features, attention.kv.out_features) != (channels, channels // 2):
            return "its attention is of another kind"
        head_dim = channels // attention.num_heads
        if abs(attention.scale * head_dim**0.5 - 1) > 1e-9:
            return f"its scale is {attention.scale:g} instead of 1/sqrt({head_dim})"
        if block.window_size != 2 * block.permuted_window_size or block.shift_size % 2 != 0:
            return "its window and its shift are no whole numbers of keys"
        pixels, keys = block.window_size**2, block.permuted_window_size**2
        if attention.aligned_relative_position_index.shape != (pixels, keys):
            return "its index of relative positions has another shape"
        mask = getattr(block, "attn_mask", None)
        if mask is not None and not _is_mask(mask, block, *block.input_resolution):
            return "its mask is unknown"
        return None

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        window, shift, attention = (block.window_size,) * 2, (block.shift_size,) * 2, block.attn
        sizes = parts.sizes_label(window, shift, attention.num_heads, attention.q.in_features)
        return f"{sizes}, key window {block.permuted_window_size}"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        height, width = rows * block.window_size, columns * block.window_size
        return parts.draw(generator, batch, height * width, block.attn.q.in_features), (height, width)

    def why_not(self, block: Any, x: Tensor, x_size: Any) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        whole = parts.whole_windows(height, width, (block.window_size,) * 2)
        return None if whole else "windows do not cover the image"

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any) -> Tensor:
        """See `Adapter.forward`."""
        attention, drop_path = block.attn, block.drop_path
        height, width = x_size
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        normed, norm = parts.normalised_once(x, block.norm1, kernels)
        k, v = _join(parts.layer(normed, attention.kv, kernels, norm))
        attended = ops.window_attention(
            parts.layer(normed, attention.q, kernels, norm),
            k=k,
            v=v,
            bias=_bias(block, attention),
            window=block.window_size,
            shift=block.shift_size,
            key_window=block.permuted_window_size,
            mask=-100.0,
            kernels=kernels,
        )
        if parts.fuses_residual(drop_path):
            x = parts.layer(attended, attention.proj, kernels, residual=x)
            x = apply_conv_ffn(x, block.mlp, block.norm2, kernels, residual=x)
        else:
            x = parts.add(x, parts.layer(attended, attention.proj, kernels), drop_path)
            x = parts.add(x, apply_conv_ffn(x, block.mlp, block.norm2, kernels, None), drop_path)
        return x.flatten(1, 2)


def _join(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of 2×2 pixels, ``(B, H/2, W/2, C)``, from those of pixels, ``(B, H, W, C/2)``."""
    batch, height, width, channels = kv.shape
    pixels = kv.reshape(batch, height // 2, 2, width // 2, 2, 2, channels // 2)
    k, v = pixels.permute(5, 0, 1, 3, 2, 4, 6).flatten(4)
    return k, v


def _bias(block: Any, attention: Any) -> Tensor:
    """Return the bias of each head, query and key."""
    table, index = attention.relative_position_bias_table, attention.aligned_relative_position_index

    def gathered() -> Tensor:
        rows: Tensor = table.t()[:, index.flatten()]
        return rows.view(-1, *index.shape)

    return keep(block, "bias", (table, index), gathered)


def _is_mask(mask: Tensor, block: Any, height: int, width: int) -> bool:
    """Return whether a buffer is the mask of shifted windows: 0 within a side of the image, −100 elsewhere."""
    window, shift, key_window = block.window_size, block.shift_size, block.permuted_window_size
    sides = shift_regions(height, width, (window,) * 2, (shift,) * 2, mask.device)
    key_sides = shift_regions(height // 2, width // 2, (key_window,) * 2, (shift // 2,) * 2, mask.device)
    return torch.equal(mask, shift_mask(sides, key_sides, -100.0, mask))


register(PermutedBlock())
