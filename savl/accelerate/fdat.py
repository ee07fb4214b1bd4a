"""The blocks of FDAT: attention within windows or over channels, beside a depthwise convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, register
from savl.accelerate.channels import channel_attention, over_channels_last
from savl.ops import KernelSettings


class AggregationBlock(Adapter):
    """``x + inter(attn(n1(x)), conv(n1(x)))``, then ``x + ffn(n2(x))``, called as ``block(tokens, height, width)``.

    The attention of a spatial block has a dense bias and no shift, and pads the image with zeros after the
    normalisation. The attention of a channel block is computed by torch; its layers are savl's ops.
    """

    name = "fdat"
    title = "FDAT block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        if not parts.has(block, "n1", "n2", "attn", "conv", "inter", "ffn", "btype", "dp"):
            return False
        names = ("ws", "bias", "scale") if block.btype == "spatial" else ("temp",)
        return block.btype in ("spatial", "channel") and parts.has(block.attn, "qkv", "proj", "nh", *names)

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        attention, ffn = block.attn, block.ffn
        if not (
            parts.is_norm(block.n1) and parts.is_norm(block.n2) and parts.is_mlp(ffn) and parts.activation_of(ffn.act)
        ):
            return "its norms or its feed-forward layers are of other kinds"
        if not (parts.is_linear(attention.qkv) and parts.is_linear(attention.proj)):
            return "its projections are no plain linear layers"
        if not parts.has(ffn, "smix") or not parts.has(block.inter, "sg", "cg"):
            return "its convolutions are of another kind"
        channels, heads = attention.qkv.in_features, attention.nh
        if attention.qkv.out_features != 3 * channels or channels % heads != 0:
            return "its attention is of another kind"
        if block.btype == "channel":
            return None if attention.temp.shape == (heads, 1, 1) else "its attention is of another kind"
        if abs(attention.scale * (channels // heads) ** 0.5 - 1) > 1e-9:
            return f"its scale is {attention.scale:g} instead of 1/sqrt({channels // heads})"
        pixels = attention.ws**2
        return None if attention.bias.shape == (heads, pixels, pixels) else "its bias has another shape"

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        heads, channels = block.attn.nh, block.attn.qkv.in_features
        if block.btype == "channel":
            return f"channels, {heads} heads of {channels // heads}"
        return parts.sizes_label((block.attn.ws,) * 2, (0, 0), heads, channels)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        window = block.attn.ws if block.btype == "spatial" else 8
        height, width = rows * window - (rows == 1), columns * window  # with padding, and without
        return parts.draw(generator, batch, height * width, block.attn.qkv.in_features), height, width

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor, height: int, width: int) -> Tensor:
        """See `Adapter.forward`."""
        ffn, drop_path = block.ffn, block.dp
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        fused = parts.fuses_residual(drop_path)
        mix = _spatial if block.btype == "spatial" else _channel
        normed = ops.layer_norm(x, block.n1.weight, block.n1.bias, eps=block.n1.eps, kernels=kernels)
        convolved = over_channels_last(block.conv, normed)
        mixed = mix(block, kernels, normed, convolved, x if fused else None)
        x = mixed if fused else parts.add(x, mixed, drop_path)
        hidden = parts.layer(x, ffn.fc1, kernels, block.n2, **parts.activation_of(ffn.act) or {})
        hidden = over_channels_last(ffn.smix, hidden)
        if fused:
            x = parts.layer(hidden, ffn.fc2, kernels, residual=x)
        else:
            x = parts.add(x, parts.layer(hidden, ffn.fc2, kernels), drop_path)
        return x.flatten(1, 2)


def _spatial(block: Any, kernels: KernelSettings, normed: Tensor, convolved: Tensor, x: Tensor | None) -> Tensor:
    """Return ``x + gate · attention(normed) + convolved``: the convolution decides the gate of the channels."""
    attention, window = block.attn, block.attn.ws
    height, width = normed.shape[1:3]
    below, right = -height % window, -width % window
    padded = F.pad(normed, (0, 0, 0, right, 0, below)) if below or right else normed
    attended = ops.window_attention(
        parts.layer(padded, attention.qkv, kernels), bias=attention.bias, window=window, kernels=kernels
    )
    gate = over_channels_last(block.inter.cg, convolved)
    residual = convolved if x is None else x + convolved
    return parts.layer(attended[:, :height, :width], attention.proj, kernels, residual=residual, gate=gate)


def _channel(block: Any, kernels: KernelSettings, normed: Tensor, convolved: Tensor, x: Tensor | None) -> Tensor:
    """Return ``x + attention(normed) + gate · convolved``: the attention decides the gate of the pixels."""
    attention = block.attn
    qkv = parts.layer(normed, attention.qkv, kernels).flatten(1, 2)
    q, k, _ = qkv.unflatten(-1, (3, attention.nh, -1)).permute(2, 0, 3, 1, 4)
    v = qkv[..., -normed.shape[-1] :]
    attended = channel_attention(q, k, v, attention.temp, attention.proj.weight, attention.proj.bias)
    attended = attended.view(normed.shape)
    gate = over_channels_last(block.inter.sg, attended)
    mixed = attended + convolved * gate
    return mixed if x is None else x + mixed


register(AggregationBlock())
