"""Baselines: the two attention ops, computed by `torch.nn.functional.scaled_dot_product_attention`.

They are written as in a network that uses this function: windows are cut out of the rolled image, q and k are scaled by
severity, and bias and shift mask are added to one additive mask. Each call computes this mask, as a network must if it
accepts images of any size. With ``kept``, a precomputed mask is used instead; this is faster, but the memory of the
masks grows with the size of the image and the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from savl import ops
from savl.ops.overlapping_window_attention import partition_overlapping_windows
from savl.ops.relative_position import gather_bias
from savl.ops.window_attention import merge_windows, partition_windows, shift_mask, shift_regions


def folded_mask(
    bias_table: Tensor, height: int, width: int, window: int, key_window: int, shift: int, batch: int | None = 1
) -> Tensor:
    """Return the sum of bias and shift mask, (windows of the batch, heads, w², o²).

    The first dimension is 1 without a shift.

    Args:
        bias_table: Bias table.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        window: Side w of the windows.
        key_window: Side o of the key windows.
        shift: Shift of the windows in pixels.
        batch: Number of images; None for one image and a contiguous result, which copies only the bias.
    """
    bias = gather_bias(bias_table, window, key_window)[None]
    if not shift:
        return bias
    sides = shift_regions(height, width, (window, window), (shift, shift), bias.device)
    mask = shift_mask(sides, sides, float("-inf"), bias)[:, None]
    return bias.contiguous() + mask if batch is None else (bias + mask).repeat(batch, 1, 1, 1)


def queries_keys_values(
    qkv: Tensor, severity: Tensor | None, heads: int, window: int, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v (windows, heads, w², d) of a shifted image, q and k multiplied by the severity."""
    pixels = window * window
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    windows = partition_windows(qkv, window).view(-1, pixels, 3, heads, qkv.shape[3] // 3 // heads)
    q, k, v = windows.permute(2, 0, 3, 1, 4)
    if severity is not None:
        severity = severity.to(qkv.dtype)
        s = severity.roll((-shift, -shift), (1, 2)) if shift else severity
        s = partition_windows(s[..., None], window).view(-1, 1, pixels, 1)
        q, k = s * q, s * k
    return q, k, v


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None = None,
    *,
    window: int,
    shift: int = 0,
    kernels: Any = None,
    kept: Tensor | None = None,
    padded_head_dim: int | None = None,
    backend: SDPBackend | None = None,
) -> Tensor:
    """Compute `savl.ops.window_attention`; ``kept`` is a result of `folded_mask` to use again."""
    batch, height, width, channels3 = qkv.shape
    heads, pixels = bias_table.shape[1], window * window
    images = None if backend is not None and batch == 1 else batch
    mask = folded_mask(bias_table, height, width, window, window, shift, images) if kept is None else kept
    q, k, v = queries_keys_values(qkv, severity, heads, window, shift)
    out = _attend(q, k, v, mask, padded_head_dim, backend)
    out = merge_windows(out.transpose(1, 2).reshape(batch, -1, pixels, channels3 // 3), window, height, width)
    return out.roll((shift, shift), (1, 2)) if shift else out


def overlapping_window_attention(
    q: Tensor,
    kv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None = None,
    *,
    window: int,
    key_window: int,
    kernels: Any = None,
    kept: Tensor | None = None,
    padded_head_dim: int | None = None,
    backend: SDPBackend | None = None,
) -> Tensor:
    """Compute `savl.ops.overlapping_window_attention`; ``kept`` is a result of `folded_mask` to use again."""
    batch, height, width, channels = q.shape
    heads, pixels, keys = bias_table.shape[1], window * window, key_window * key_window
    mask = folded_mask(bias_table, height, width, window, key_window, 0) if kept is None else kept
    if severity is not None:
        s = severity.to(q.dtype)[..., None]
        k, v = kv.chunk(2, dim=-1)
        q, kv = s * q, F.pad(s * k, (0, channels)) + F.pad(v, (channels, 0))
    queries = partition_windows(q, window).view(-1, pixels, heads, channels // heads).transpose(1, 2)
    keys_values = partition_overlapping_windows(kv, window, key_window)
    k, v = keys_values.view(-1, keys, 2, heads, channels // heads).permute(2, 0, 3, 1, 4)
    out = _attend(queries, k, v, mask, padded_head_dim, backend)
    return merge_windows(out.transpose(1, 2).reshape(batch, -1, pixels, channels), window, height, width)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padded_head_dim: int | None, backend: SDPBackend | None
) -> Tensor:
    head_dim = q.shape[-1]
    scale = None
    if padded_head_dim is not None and padded_head_dim > head_dim:
        scale = head_dim**-0.5
        q, k, v = (F.pad(each, (0, padded_head_dim - head_dim)) for each in (q, k, v))
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        # These kernels read 16 bytes of the mask at a time along the keys; in a gathered bias the heads are innermost.
        mask = mask.contiguous().expand(q.shape[0], -1, -1, -1)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[..., :head_dim]


@contextmanager
def in_every_network(**options: Any) -> Iterator[None]:
    """Use these attention functions in savl's networks while the context is active; all other operations are eager.

    Args:
        options: Values of ``padded_head_dim`` and ``backend`` for both functions.
    """
    before = ops.window_attention, ops.overlapping_window_attention
    ops.window_attention = partial(window_attention, **options)
    ops.overlapping_window_attention = partial(overlapping_window_attention, **options)
    try:
        yield
    finally:
        ops.window_attention, ops.overlapping_window_attention = before


def patched(network: nn.Module) -> nn.Module | None:
    """Put `torch.nn.functional.scaled_dot_product_attention` into the window attention of another author's network.

    Modules with q, k and v from one linear layer and a table of relative positions are changed, as those of SwinIR,
    DRCT and HAT: called as ``attention(windows, mask)`` or ``attention(windows, index, mask)``.

    Returns:
        The network, changed in place; None if it has no such attention.
    """
    found = False
    for module in network.modules():
        if all(hasattr(module, name) for name in ("qkv", "proj", "relative_position_bias_table", "attn_drop", "scale")):
            module.forward = partial(_window_attention_of, module)
            found = True
    return network if found else None


def _window_attention_of(attention: Any, x: Tensor, rpi: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    count, pixels, channels = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).view(count, pixels, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    if rpi is None or rpi.is_floating_point():  # SwinIR's second argument is the mask
        rpi, mask = attention.relative_position_index, rpi if mask is None else mask
    bias = attention.relative_position_bias_table[rpi.view(-1)].view(pixels, pixels, heads).permute(2, 0, 1)[None]
    if mask is not None:
        bias = (bias + mask[:, None]).repeat(count // mask.shape[0], 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
    projected: Tensor = attention.proj(out.transpose(1, 2).reshape(count, pixels, channels))
    return projected
