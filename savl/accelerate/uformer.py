"""The blocks of Uformer: Swin blocks over square images, with a modulator and a depthwise convolution in the MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, register
from savl.accelerate.channels import over_channels_last
from savl.ops import KernelSettings


class LocallyEnhancedBlock(Adapter):
    """``x + attention(norm1(x) + modulator)``, then ``x + mlp(norm2(x))``, called as ``block(tokens)``.

    The modulator, which not every network has, is a vector for each pixel of a window. The MLP is that of Swin, or has
    a convolution with an activation between its layers. Between the sides of a shifted image the mask is −100.
    """

    name = "uformer"
    title = "Uformer block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "attn", "norm2", "mlp", "drop_path", "win_size", "shift_size", "modulator", "cross_modulator")
        if not parts.has(block, *names):
            return False
        return parts.has(block.attn, "qkv", "proj", "relative_position_bias_table", "relative_position_index", "scale")

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention, mlp = block.attn, block.mlp
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2)):
            return "its norms are of other kinds"
        if not parts.is_mlp(mlp) and not _is_convolution_mlp(mlp):
            return "its MLP is of another kind"
        projections = attention.qkv
        if not parts.has(projections, "to_q", "to_kv"):
            return "its projections are no plain linear layers"
        if not all(parts.is_linear(each) for each in (projections.to_q, projections.to_kv, attention.proj)):
            return "its projections are no plain linear layers"
        if block.cross_modulator is not None:
            return "it has attention to a modulator"
        channels, heads = projections.to_q.in_features, attention.num_heads
        if projections.to_q.out_features != channels or projections.to_kv.out_features != 2 * channels:
            return "its attention is of another kind"
        if abs(attention.scale * (channels // heads) ** 0.5 - 1) > 1e-9:
            return f"its scale is {attention.scale:g} instead of 1/sqrt({channels // heads})"
        window = block.win_size
        if block.modulator is not None and block.modulator.weight.shape != (window**2, channels):
            return "its modulator has another shape"
        index, table = attention.relative_position_index, attention.relative_position_bias_table
        return parts.index_refusal(index, window, table)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        window, shift = (block.win_size,) * 2, (block.shift_size,) * 2
        return parts.sizes_label(window, shift, block.attn.num_heads, block.attn.proj.in_features)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        side = max(rows, columns) * block.win_size
        return (parts.draw(generator, batch, side * side, block.attn.proj.in_features),)

    def why_not(self, block: Any, x: Tensor, mask: Tensor | None = None) -> str | None:
        """See `Adapter.why_not`."""
        if mask is not None:
            return "it is called with a mask"
        side = math.isqrt(x.shape[1])
        whole = side * side == x.shape[1] and side % block.win_size == 0
        return None if whole else "windows do not cover the image"

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Adapter.forward`."""
        attention, mlp, drop_path = block.attn, block.mlp, block.drop_path
        window, shift = block.win_size, block.shift_size
        side = math.isqrt(x.shape[1])
        x = x.reshape(x.shape[0], side, side, x.shape[2])
        norm: nn.LayerNorm | None
        if block.modulator is None:
            normed, norm = parts.normalised_once(x, block.norm1, kernels)
        else:
            normed = ops.layer_norm(x, block.norm1.weight, block.norm1.bias, eps=block.norm1.eps, kernels=kernels)
            normed, norm = normed + _modulation(block.modulator.weight, window, shift, side // window), None
        k, v = parts.layer(normed, attention.qkv.to_kv, kernels, norm).chunk(2, dim=-1)
        attended = ops.window_attention(
            parts.layer(normed, attention.qkv.to_q, kernels, norm),
            attention.relative_position_bias_table,
            k=k,
            v=v,
            window=window,
            shift=shift,
            mask=-100.0,
            kernels=kernels,
        )
        apply = parts.apply_mlp if parts.is_mlp(mlp) else _apply_convolution_mlp
        if parts.fuses_residual(drop_path):
            x = parts.layer(attended, attention.proj, kernels, residual=x)
            x = apply(x, mlp, block.norm2, kernels, x)
        else:
            x = parts.add(x, parts.layer(attended, attention.proj, kernels), drop_path)
            x = parts.add(x, apply(x, mlp, block.norm2, kernels, None), drop_path)
        return x.flatten(1, 2)


def _modulation(weight: Tensor, window: int, shift: int, count: int) -> Tensor:
    """Return the modulator of every pixel: ``(w², C)`` → ``(count·w, count·w, C)``. It moves with shifted windows."""
    pixels = weight.view(window, window, -1).roll((shift, shift), dims=(0, 1))
    return pixels.repeat(count, count, 1)


def _is_convolution_mlp(mlp: Any) -> bool:
    """Return whether a module is linear layer – activation – convolution – linear layer, as Uformer's LeFF."""
    if (
        not parts.has(mlp, "linear1", "dwconv", "linear2")
        or type(getattr(mlp, "eca", nn.Identity())) is not nn.Identity
    ):
        return False
    first, last = mlp.linear1, mlp.linear2
    if not all(isinstance(each, nn.Sequential) for each in (first, last)) or (len(first), len(last)) != (2, 1):
        return False
    return parts.is_linear(first[0]) and parts.activation_of(first[1]) is not None and parts.is_linear(last[0])


def _apply_convolution_mlp(
    x: Tensor, mlp: Any, norm: nn.LayerNorm | None, kernels: KernelSettings, residual: Tensor | None
) -> Tensor:
    """Return ``residual + linear2(dwconv(linear1(norm(x))))`` for a module that `_is_convolution_mlp`."""
    hidden = parts.layer(x, mlp.linear1[0], kernels, norm, **parts.activation_of(mlp.linear1[1]) or {})
    return parts.layer(over_channels_last(mlp.dwconv, hidden), mlp.linear2[0], kernels, residual=residual)


register(LocallyEnhancedBlock())
