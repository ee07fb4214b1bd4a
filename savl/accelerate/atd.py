"""The layers of ATD: windowed, category and dictionary attention side by side."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.accelerate import parts
from savl.accelerate.adapter import Adapter, Arguments, register
from savl.accelerate.conv_ffn import apply_conv_ffn, is_conv_ffn
from savl.ops import KernelSettings

LARGEST_SCALE = float(torch.tensor(100.0).log())
"""Largest logarithm of the factor of category attention, rounded to float32 as in the original layers."""


class TokenDictionaryLayer(Adapter):
    """``x + windows(n) + dictionary(n, td) + categories(n)`` with ``n = norm1(x)``, then ``x + ffn(norm2(x))``.

    It is called as ``layer(tokens, dictionary, (height, width), params)``, and returns the tokens and the dictionary
    that they refined, except that the last layer returns the dictionary as it is. ``params`` holds the index of
    relative positions and the mask.

    A category is the token of the dictionary that is the most similar. Rounding decides close calls, and each may
    change a whole group of tokens. The verification therefore avoids them.
    """

    name = "atd"
    title = "ATD layer"

    def matches(self, block: Any) -> bool:
        """See `Adapter.matches`."""
        names = ("norm1", "norm2", "wqkv", "attn_win", "attn_atd", "attn_aca", "convffn", "window_size", "shift_size")
        if not parts.has(block, *names, "is_last"):
            return False
        return (
            parts.has(block.attn_win, "proj", "relative_position_bias_table", "num_heads", "scale")
            and parts.has(block.attn_atd, "wq", "wk", "wv", "scale")
            and parts.has(block.attn_aca, "proj", "logit_scale", "num_heads", "category_size")
        )

    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """See `Adapter.refusal`."""
        windows, dictionary, categories = block.attn_win, block.attn_atd, block.attn_aca
        if not (parts.is_norm(block.norm1) and parts.is_norm(block.norm2) and is_conv_ffn(block.convffn)):
            return "its norms or its ConvFFN are of other kinds"
        layers = (block.wqkv, windows.proj, categories.proj, dictionary.wq, dictionary.wk, dictionary.wv)
        if not all(parts.is_linear(each) for each in layers):
            return "its projections are no plain linear layers"
        if block.wqkv.out_features != 3 * block.wqkv.in_features or categories.logit_scale.numel() != 1:
            return "its attention is of another kind"
        head_dim = block.wqkv.in_features // windows.num_heads
        if abs(windows.scale * head_dim**0.5 - 1) > 1e-9:
            return f"its scale is {windows.scale:g} instead of 1/sqrt({head_dim})"
        index = _index(network, block)
        if index is None:
            return "the network has no index of relative positions for it"
        return parts.index_refusal(index, block.window_size, windows.relative_position_bias_table)

    def label(self, block: Any) -> str:
        """See `Adapter.label`."""
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        sizes = parts.sizes_label(window, shift, block.attn_win.num_heads, block.wqkv.in_features)
        return f"{sizes}, categories of {block.attn_aca.category_size}"

    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """See `Adapter.example`."""
        window, shift, channels = (block.window_size,) * 2, (block.shift_size,) * 2, block.wqkv.in_features
        size = height, width = rows * block.window_size, columns * block.window_size
        x = parts.draw(generator, batch, height * width, channels)
        dictionary = parts.draw(generator, batch, block.attn_atd.scale.numel(), channels)
        layer, margin = copy.deepcopy(block).cpu().double(), torch.finfo(block.wqkv.weight.dtype).eps ** 0.5
        for _ in range(16):  # draws tokens again whose category is a close call
            with torch.no_grad():
                first, second = layer.attn_atd(layer.norm1(x), dictionary, size)[1].topk(2).values.unbind(-1)
            close = (first < (1 + margin) * second).unsqueeze(-1)
            x = torch.where(close, parts.draw(generator, *x.shape), x)
        mask = parts.swin_mask(height, width, window, shift)
        return x, dictionary, size, {"attn_mask": mask, "rpi_sa": _index(network, block)}

    def why_not(self, block: Any, x: Tensor, td: Tensor, x_size: Any, params: Any) -> str | None:
        """See `Adapter.why_not`."""
        height, width = x_size
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        if not parts.whole_windows(height, width, window):
            return "windows do not cover the image"
        if block.shift_size > 0 and not parts.is_shift_mask(params["attn_mask"], height, width, window, shift):
            return "its mask is unknown"
        return None

    def forward(
        self, block: Any, kernels: KernelSettings, x: Tensor, td: Tensor, x_size: Any, params: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Adapter.forward`."""
        windows, dictionary, categories = block.attn_win, block.attn_atd, block.attn_aca
        height, width = x_size
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        normed, norm = parts.normalised_once(x, block.norm1, kernels)
        qkv = parts.layer(normed, block.wqkv, kernels, norm)
        similarity = _similarity(parts.layer(normed, dictionary.wq, kernels, norm), td, dictionary)
        attended = ops.window_attention(
            qkv,
            windows.relative_position_bias_table,
            window=block.window_size,
            shift=block.shift_size,
            mask=-100.0,
            kernels=kernels,
        )
        x = parts.layer(attended, windows.proj, kernels, residual=x)
        x = parts.layer(_attend_categories(qkv, similarity, categories, kernels), categories.proj, kernels, residual=x)
        x = _add_product(x, similarity, dictionary.wv(td), kernels)
        x = apply_conv_ffn(x, block.convffn, block.norm2, kernels, residual=x).flatten(1, 2)
        if not block.is_last:
            weights = block.norm3(similarity.transpose(1, 2)).softmax(dim=-1)
            share = block.sigma.sigmoid()
            td = share * td + (1 - share) * (weights @ x)
        return x, td


def _similarity(q: Tensor, td: Tensor, attention: Any) -> Tensor:
    """Return the attention weights of each token of the dictionary, ``(B, H·W, tokens)``, for queries (B, H, W, r)."""
    scale = 1 + attention.scale.clamp(0, 1) * math.log(attention.scale.numel())
    k: Tensor = F.normalize(attention.wk(td), dim=-1) * scale[:, None]
    return (F.normalize(q.flatten(1, 2), dim=-1) @ k.transpose(1, 2)).softmax(dim=-1)


def _add_product(x: Tensor, weights: Tensor, values: Tensor, kernels: KernelSettings) -> Tensor:
    """Return ``x + weights @ values``; ``x`` is ``(B, H, W, C)``. Each image has linear layers of its own."""
    images = zip(x.split(1), weights.view(*x.shape[:3], -1).split(1), values, strict=True)
    sums = [ops.convolution(each, value.t(), residual=image, kernels=kernels) for image, each, value in images]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _attend_categories(qkv: Tensor, similarity: Tensor, attention: Any, kernels: KernelSettings) -> Tensor:
    """Return attention within groups of tokens that are sorted by category, ``(B, H, W, C)``.

    Groups are windows of one row. The last tokens fill up the last group, in reverse order.
    """
    batch, height, width, channels = qkv.shape
    count = height * width
    group = min(count, attention.category_size)
    order = torch.sort(similarity.argmax(dim=-1), dim=-1, stable=False).indices
    positions = torch.arange(count, device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter_(1, order, positions)  # of each token in the order
    padded = torch.cat((order, order[:, count - -count % group :].flip(1)), dim=1)

    # The logits are s · s · (q · k) / √d with a severity s that is the same everywhere.
    head_dim = channels // 3 // attention.num_heads
    logit_scale = attention.logit_scale.clamp(max=LARGEST_SCALE)
    scale = logit_scale.to(torch.promote_types(logit_scale.dtype, torch.float32)).exp()
    tokens = _take(qkv.flatten(1, 2), padded).view(batch, -1, group, channels)
    attended = ops.window_attention(
        tokens,
        severity=(scale * head_dim**0.5).sqrt().expand(tokens.shape[:3]),
        window=(1, group),
        heads=attention.num_heads,
        kernels=kernels,
    )
    return _take(attended.flatten(1, 2), place).view(batch, height, width, -1)


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """Return tokens ``(B, N, C)`` in an order ``(B, M)``."""
    batch, count, channels = tokens.shape
    rows = order + count * torch.arange(batch, device=order.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(batch, -1, channels)


def _index(network: nn.Module, block: Any) -> Tensor | None:
    """Return the index of relative positions that the network calls a layer with."""
    size = block.window_size**4
    found = (each for name, each in network.named_buffers() if name.endswith("relative_position_index_SA"))
    return next((each for each in found if each.numel() == size), None)


register(TokenDictionaryLayer())
