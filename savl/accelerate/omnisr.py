"""The block of OmniSR: attention within windows, over a grid, and over channels, with depthwise convolutions."""

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

_CUTS = (
    (1, "b d (x w1) (y w2) -> b x y w1 w2 d"),
    (3, "b x y w1 w2 d -> b d (x w1) (y w2)"),
    (7, "b d (w1 x) (w2 y) -> b x y w1 w2 d"),
    (9, "b x y w1 w2 d -> b d (w1 x) (w2 y)"),
)
"""The modules of a block that cut features into windows, and that join them."""


class OmniBlock(Adapter):
    """OmniSR's block, over ``(B, C, H, W)``: a sequence ``layer`` of 13 modules.

    A bottleneck with squeeze and excitation comes first. Two rounds follow: attention, gated feed-forward layers,
    attention between the channels of windows, and gated feed-forward layers. The windows of the second round are
    dilated over the whole image. Features stay in the channels-last layout, in which depthwise convolutions are
    fastest, so the result is a channels-last view.
    """

    name = "omnisr"
    title = "OmniSR block"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        sequence = getattr(block, "layer", None)
        if not isinstance(sequence, nn.Sequential) or len(sequence) != 13:
            return False
        names = {2: ("to_qkv", "to_out", "heads", "scale", "with_pe"), 5: ("qkv", "qkv_dwconv", "temperature", "ps")}
        names |= {8: names[2], 11: names[5]}
        layers: list[Any] = list(sequence)
        return all(hasattr(layers[i], "fn") and parts.has(layers[i].fn, *each) for i, each in names.items())

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        layers: Any = block.layer
        window = layers[5].fn.ps
        sizes = {"w1": window, "w2": window}
        if any(_pattern(layers[i]) != each for i, each in _CUTS) or any(
            layers[i].axes_lengths != sizes for i in (1, 7)
        ):
            return "its windows are of another kind"
        if not _is_bottleneck(layers[0]):
            return "its bottleneck is of another kind"
        if not all(_is_feed_forward(layers[i]) for i in (4, 6, 10, 12)):
            return "its feed-forward layers are of another kind"
        if not all(_is_channel_attention(layers[i], window) for i in (5, 11)):
            return "its attention between channels is of another kind"
        return _attention_refusal(layers[2], window) or _attention_refusal(layers[8], window)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        attention = block.layer[2].fn
        return parts.sizes_label((block.layer[5].fn.ps,) * 2, (0, 0), attention.heads, attention.to_qkv.in_features)

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        window, channels = block.layer[5].fn.ps, block.layer[2].fn.to_qkv.in_features
        return (parts.draw(generator, batch, channels, rows * window, columns * window),)

    def why_not(self, block: Any, x: Tensor) -> str | None:
        """See `Adapter.why_not`."""
        bottleneck = block.layer[0]
        if bottleneck.dropsample.training and bottleneck.dropsample.prob > 0:
            return "dropout is active"
        whole = parts.whole_windows(x.shape[2], x.shape[3], (block.layer[5].fn.ps,) * 2)
        return None if whole else "windows do not cover the image"

    def forward(self, block: Any, kernels: KernelSettings, x: Tensor) -> Tensor:
        """See `Adapter.forward`."""
        layers = block.layer
        x = _bottleneck(x.permute(0, 2, 3, 1).contiguous(), layers[0].fn, kernels)
        for first, dilated in ((2, False), (8, True)):
            x = _attend(x, layers[first], layers[5].fn.ps, dilated, kernels)
            x = _feed_forward(x, layers[first + 2], kernels)
            x = _attend_channels(x, layers[first + 3], dilated, kernels)
            x = _feed_forward(x, layers[first + 4], kernels)
        return x.permute(0, 3, 1, 2)


# The modules of a block, over features (B, H, W, C)


def _bottleneck(x: Tensor, sequence: Any, kernels: KernelSettings) -> Tensor:
    """Return ``x + expand(excitation(gelu(depthwise(gelu(squeeze(x))))))``."""
    hidden = parts.layer(x, sequence[0], kernels, activation="gelu")
    for each in sequence[2:5]:
        hidden = over_channels_last(each, hidden)
    return parts.layer(hidden, sequence[5], kernels, residual=x)


def _attend(x: Tensor, module: Any, window: int, dilated: bool, kernels: KernelSettings) -> Tensor:
    """Return ``x + attention(norm(x))`` within windows."""
    attention = module.fn
    attended: Tensor = ops.window_attention(
        parts.layer(x, attention.to_qkv, kernels, module.norm),
        attention.rel_pos_bias.weight if attention.with_pe else None,
        window=window,
        dilated=dilated,
        heads=attention.heads,
        kernels=kernels,
    )
    return parts.layer(attended, attention.to_out[0], kernels, residual=x)


def _attend_channels(x: Tensor, module: Any, dilated: bool, kernels: KernelSettings) -> Tensor:
    """Return ``x + attention(norm(x))`` between channels.

    They are compared over the pixels of each window, or, if ``dilated``, over those at one place of all windows.
    """
    attention = module.fn
    channels, heads, side = x.shape[3], attention.heads, attention.ps
    qkv = over_channels_last(attention.qkv_dwconv, parts.layer(x, attention.qkv, kernels, module.norm))

    def cut(features: Tensor) -> Tensor:  # (B, groups along both axes, pixels along both axes, K), a view
        windows: Tensor = features.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return windows.permute(0, 2, 4, 1, 3, 5) if dilated else windows.transpose(2, 3)

    residual = cut(x)
    groups, pixels = residual.shape[:3].numel(), residual.shape[3:5].numel()
    both = cut(qkv[..., : 2 * channels]).unflatten(-1, (2, heads, -1)).permute(5, 0, 1, 2, 6, 3, 4, 7)
    q, k = both.reshape(2, groups, heads, pixels, -1)
    v = cut(qkv[..., 2 * channels :]).reshape(groups, pixels, channels)
    out = channel_attention(q, k, v, attention.temperature, attention.project_out.weight.flatten(1))
    out = residual + out.view(residual.shape)  # in the layout of x, so that joining the groups is a view
    out = out.permute(0, 3, 1, 4, 2, 5) if dilated else out.transpose(2, 3)
    return out.reshape(x.shape)


def _feed_forward(x: Tensor, module: Any, kernels: KernelSettings) -> Tensor:
    """Return ``x + project_out(gelu(u) · v)``, with the channels ``[u, v]`` of ``dwconv(project_in(norm(x)))``."""
    layers = module.fn
    hidden = over_channels_last(layers.dwconv, parts.layer(x, layers.project_in, kernels, module.norm))
    u, v = hidden.chunk(2, dim=-1)
    return parts.layer(F.gelu(u) * v, layers.project_out, kernels, residual=x)


# Their structure


def _pattern(module: Any) -> str:
    """Return the pattern of a layer of einops; an empty string if it is no such layer."""
    return " ".join(str(getattr(module, "pattern", "")).split())


def _is_channel_norm(norm: Any) -> bool:
    """Return whether a module seems to normalise over the channels of ``(B, C, H, W)``, with weight and bias."""
    names = [name for name, _ in norm.named_parameters()]
    return names == ["weight", "bias"] and norm.weight.dim() == 1 and parts.has(norm, "eps")


def _is_pointwise(*layers: object) -> bool:
    """Return whether all layers are 1×1 convolutions."""
    return all(parts.is_convolution(each) and each.kernel_size == (1, 1) for each in layers)  # type: ignore


def _is_bottleneck(module: Any) -> bool:
    if not parts.has(module, "fn", "dropsample") or not hasattr(module.dropsample, "prob"):
        return False
    sequence = module.fn
    if not isinstance(sequence, nn.Sequential) or len(sequence) != 6 or not _is_pointwise(sequence[0], sequence[5]):
        return False
    return parts.activation_of(sequence[1]) == {"activation": "gelu"}


def _is_feed_forward(module: Any) -> bool:
    if not parts.has(module, "norm", "fn") or not parts.has(module.fn, "project_in", "dwconv", "project_out"):
        return False
    return _is_channel_norm(module.norm) and _is_pointwise(module.fn.project_in, module.fn.project_out)


def _is_channel_attention(module: Any, window: int) -> bool:
    attention = module.fn
    if not _is_channel_norm(module.norm) or not _is_pointwise(attention.qkv, attention.project_out):
        return False
    shape = (attention.heads, 1, 1)
    return attention.ps == window and attention.temperature.shape == shape and attention.project_out.bias is None


def _attention_refusal(module: Any, window: int) -> str | None:
    """Return why savl's op cannot compute the attention of a module; None if it can."""
    attention = module.fn
    out = attention.to_out
    linear = isinstance(out, nn.Sequential) and len(out) == 2 and parts.is_linear(out[0])
    if not (parts.is_norm(module.norm) and parts.is_linear(attention.to_qkv) and linear):
        return "its norms or its projections are of other kinds"
    channels = attention.to_qkv.in_features
    if attention.to_qkv.out_features != 3 * channels or channels % attention.heads != 0:
        return "its attention is of another kind"
    if abs(attention.scale * (channels // attention.heads) ** 0.5 - 1) > 1e-9:
        return f"its scale is {attention.scale:g} instead of 1/sqrt({channels // attention.heads})"
    if not attention.with_pe:
        return None
    return parts.index_refusal(attention.rel_pos_indices, window, attention.rel_pos_bias.weight)


register(OmniBlock())
