"""Relative position bias of windowed attention: the row of the table for each pair of pixels.

Query windows of side w lie centred in key windows of side o ≥ w (o = w for plain window attention). Along one axis
the difference query − key takes w + o − 1 values, from −(w + o)/2 + 1 to (w + o)/2 − 1 pixels, so one formula serves
both attentions: row = (dy + half) · (w + o − 1) + dx + half with half = (w + o)/2 − 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_position_index(
    window: int | tuple[int, int], key_window: int | tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return the row of the table for every (query pixel, key pixel) of one window.

    Args:
        window: Size of the query window in pixels: a side w, or a pair (vertical, horizontal).
        key_window: Size of the key window in pixels, o ≥ w and o − w even along each axis; both windows share their
            centre.
        device: Device of the index.

    Returns:
        ``(w², o²)`` int64, values in ``[0, (w + o − 1)²)``; for a pair, products take the place of squares.
    """

    def offsets(length: int, key_length: int) -> Tensor:  # (w, o), from 0 to the span of the table minus 1
        query = torch.arange(length, device=device)
        key = torch.arange(key_length, device=device) - (key_length - length) // 2
        return query[:, None] - key[None, :] + (length + key_length) // 2 - 1

    def pair(size: int | tuple[int, int]) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else size

    (height, width), (key_height, key_width) = pair(window), pair(key_window)
    rows, columns = offsets(height, key_height), offsets(width, key_width)
    index = rows[:, None, :, None] * (width + key_width - 1) + columns[None, :, None, :]  # (qy, qx, ky, kx)
    return index.reshape(height * width, key_height * key_width)


def gather_bias(bias_table: Tensor, window: int | tuple[int, int], key_window: int | tuple[int, int]) -> Tensor:
    """Return the bias of every pair of pixels: ``((w + o − 1)², heads)`` → ``(heads, w², o²)``."""
    index = relative_position_index(window, key_window, bias_table.device)
    return bias_table[index.reshape(-1)].view(*index.shape, bias_table.shape[1]).permute(2, 0, 1)
