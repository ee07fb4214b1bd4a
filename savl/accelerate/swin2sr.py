"""The blocks of Swin2SR: Swin blocks with cosine attention that normalise after attention and MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import keep, register
from savl.accelerate.tokens import TokenBlock
from savl.ops import KernelSettings

LARGEST_SCALE = float(torch.tensor(100.0).log())
"""Largest logarithm of the factor of a cosine, rounded to float32 as in the original blocks."""


class Swin2SRBlock(TokenBlock):
    """``x + norm1(attention(x))``, then ``x + norm2(mlp(x))``, called as ``block(tokens, (height, width))``.

    An MLP computes the bias table from relative positions. The linear layer for q, k and v has a bias for q and v only.
    The mask is −100, which the block makes itself.
    """

    name = "swin2sr"
    title = "Swin2SR block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "attn", "norm2", "mlp", "drop_path", "window_size", "shift_size", "input_resolution")
        if not parts.has(block, *names):
            return False
        inner = ("qkv", "q_bias", "v_bias", "proj", "logit_scale", "cpb_mlp", "relative_coords_table", "num_heads")
        return parts.has(block.attn, *inner, "relative_position_index")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention, window, shift = block.attn, (block.window_size,) * 2, (block.shift_size,) * 2
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and parts.is_mlp(block.mlp)):
            return "its norms or its MLP are of other kinds"
        if not (parts.is_linear(attention.qkv) and parts.is_linear(attention.proj)):
            return "its projections are no plain linear layers"
        if attention.qkv.bias is not None or attention.qkv.out_features != 3 * attention.qkv.in_features:
            return "its attention is of another kind"
        if attention.logit_scale.numel() != attention.num_heads:
            return "its attention has no scale for each head"
        mask, (height, width) = getattr(block, "attn_mask", None), block.input_resolution
        if mask is not None and not parts.is_shift_mask(mask, height, width, window, shift):
            return "its mask is unknown"
        positions = attention.relative_coords_table.flatten(0, -2)
        return parts.index_refusal(attention.relative_position_index, window, positions)

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, x_size: Any) -> Tensor:
        """See `Adapter.forward`."""
        attention, mlp = block.attn, block.mlp
        height, width = x_size
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        attended = ops.window_attention(
            ops.convolution(x, attention.qkv.weight, _bias(attention), kernels=kernels),
            _bias_table(block, attention),
            scale=attention.logit_scale.flatten().clamp(max=LARGEST_SCALE).exp(),
            window=block.window_size,
            shift=block.shift_size,
            mask=-100.0,
            kernels=kernels,
        )
        x = _add_normalised(x, parts.layer(attended, attention.proj, kernels), block.norm1, block.drop_path, kernels)
        x = _add_normalised(x, parts.apply_mlp(x, mlp, None, kernels, None), block.norm2, block.drop_path, kernels)
        return x.flatten(1, 2)


def _bias(attention: Any) -> Tensor | None:
    """Return the bias of the layer for q, k and v."""
    if attention.q_bias is None:
        return None
    return torch.cat((attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias))


def _bias_table(block: Any, attention: Any) -> Tensor:
    """Return the bias table."""
    positions, mlp = attention.relative_coords_table, attention.cpb_mlp

    def compute() -> Tensor:
        table: Tensor = 16 * torch.sigmoid(mlp(positions).view(-1, attention.num_heads))
        return table

    return keep(block, "table", (positions, *mlp.parameters()), compute)


def _add_normalised(
    residual: Tensor, branch: Tensor, norm: nn.LayerNorm, drop_path: nn.Module, kernels: KernelSettings
) -> Tensor:
    """Return ``residual + drop_path(norm(branch))``."""
    normed = ops.layer_norm(branch, norm.weight, norm.bias, eps=norm.eps, kernels=kernels)
    if parts.fuses_residual(drop_path):
        return parts.added(normed, residual)
    return parts.add(residual, normed, drop_path)


register(Swin2SRBlock())
