"""Swin blocks for super-resolution: SwinIR and DRCT, and the networks built of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import register
from savl.accelerate.tokens import TokenBlock
from savl.ops import KernelSettings


class SwinBlock(TokenBlock):
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``, called as ``block(tokens, (height, width))``.

    The attention has a bias table and its index, and one linear layer for q, k and v. Between the sides of a shifted
    image the mask is −100, which the block makes itself.
    """

    name = "swin"
    title = "Swin block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "norm1", "attn", "norm2", "mlp", "window_size", "shift_size", "calculate_mask"):
            return False
        names = ("qkv", "proj", "relative_position_bias_table", "relative_position_index", "num_heads", "scale")
        return parts.has(block.attn, *names)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention = block.attn
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and parts.is_mlp(block.mlp)):
            return "its norms or its MLP are of other kinds"
        if not (parts.is_linear(attention.qkv) and parts.is_linear(attention.proj)):
            return "its projections are no plain linear layers"
        if parts.has(attention, "logit_scale") or attention.qkv.out_features != 3 * attention.qkv.in_features:
            return "its attention is of another kind"
        head_dim = attention.qkv.in_features // attention.num_heads
        if abs(attention.scale * head_dim**0.5 - 1) > 1e-9:
            return f"its scale is {attention.scale:g} instead of 1/sqrt({head_dim})"
        index, table = attention.relative_position_index, attention.relative_position_bias_table
        return parts.index_refusal(index, block.window_size, table)

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any) -> Tensor:
        """See `Adapter.forward`."""
        attention, drop_path = block.attn, block.drop_path
        height, width = x_size
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        attended = ops.window_attention(
            parts.layer(x, attention.qkv, kernels, block.norm1),
            attention.relative_position_bias_table,
            window=block.window_size,
            shift=block.shift_size,
            mask=-100.0,
            kernels=kernels,
        )
        if parts.fuses_residual(drop_path):
            x = parts.layer(attended, attention.proj, kernels, residual=x)
            x = parts.apply_mlp(x, block.mlp, block.norm2, kernels, residual=x)
        else:
            x = parts.add(x, parts.layer(attended, attention.proj, kernels), drop_path)
            x = parts.add(x, parts.apply_mlp(x, block.mlp, block.norm2, kernels, None), drop_path)
        return x.flatten(1, 2)


register(SwinBlock())
