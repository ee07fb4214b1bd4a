"""A baseline: both attentions with `torch.nn.attention.flex_attention`, to be compiled as a whole.

This is how an experienced user of flex_attention would write it: the rolled image is partitioned into windows, q and k
are multiplied by the severity, a score_mod looks up the bias of each pair in the table, and the shift is a BlockMask,
with which whole blocks of pairs are skipped or need no mask. The BlockMask depends only on the size of the image, so
that a network can compute it once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.peers.sdpa import queries_keys_values
from savl.ops.overlapping_window_attention import partition_overlapping_windows
from savl.ops.window_attention import merge_windows, partition_windows, shift_regions

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def relative_bias(bias_table: Tensor, window: int, key_window: int) -> ScoreMod:
    """Return the score_mod that adds the bias, looked up by the positions of query and key.

    Args:
        bias_table: ``((window + key_window − 1)², heads)``.
        window: Side of the query windows in pixels.
        key_window: Side of the key windows in pixels.
    """
    span = window + key_window - 1

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        dy = query // window - key // key_window + (key_window - 1)
        dx = query % window - key % key_window + (key_window - 1)
        return score + bias_table[dy * span + dx, head]

    return add_bias


def shift_block_mask(
    height: int, width: int, window: int, shift: int, batch: int = 1, device: torch.device | str = "cpu"
) -> BlockMask:
    """Return the block mask of shifted windows: pairs of pixels that come from the same side of the image.

    Args:
        height: Image height in pixels.
        width: Image width in pixels.
        window: Side of the windows in pixels.
        shift: Cyclic shift in pixels, 0 < shift < window.
        batch: Images.
        device: Where the mask should live.
    """
    region = shift_regions(height, width, (window, window), (shift, shift), device)
    region = region.repeat(batch, 1)  # (windows of the batch, w²)

    def same_side(image_window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return region[image_window, query] == region[image_window, key]

    pixels = window * window
    return create_block_mask(same_side, len(region), None, pixels, pixels, device=device)


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None = None,
    *,
    window: int,
    shift: int = 0,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """Compute `savl.ops.window_attention`; with a shift, ``block_mask`` is a result of `shift_block_mask`."""
    batch, height, width, channels3 = qkv.shape
    heads, pixels = bias_table.shape[1], window * window
    q, k, v = queries_keys_values(qkv, severity, heads, window, shift)
    out = _attend(q, k, v, relative_bias(bias_table, window, window), block_mask)
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
) -> Tensor:
    """Compute `savl.ops.overlapping_window_attention`."""
    batch, height, width, channels = q.shape
    heads, pixels, keys = bias_table.shape[1], window * window, key_window * key_window
    if severity is not None:
        s = severity.to(q.dtype)[..., None]
        k, v = kv.chunk(2, dim=-1)
        q, kv = s * q, torch.cat((s * k, v), dim=-1)
    queries = partition_windows(q, window).view(-1, pixels, heads, channels // heads).transpose(1, 2)
    keys_values = partition_overlapping_windows(kv, window, key_window)
    k, v = keys_values.view(-1, keys, 2, heads, channels // heads).permute(2, 0, 3, 1, 4)
    out = _attend(queries, k, v, relative_bias(bias_table, window, key_window))
    return merge_windows(out.transpose(1, 2).reshape(batch, -1, pixels, channels), window, height, width)


def _attend(q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod, block_mask: BlockMask | None = None) -> Tensor:
    # torch 2.13 gives wrong results for views of larger tensors when it compiles for CPUs. This is no additional copy,
    # because the compiler merges it with the one that partitions the windows.
    q, k, v = (each.contiguous() for each in (q, k, v))
    out: Tensor = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
    return out
