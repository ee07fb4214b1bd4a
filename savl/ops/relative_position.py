"""Relative position bias of windowed attention: the row of the table for each pair of pixels.

Query windows of side w lie centred in key windows of side o ≥ w (o = w for plain window attention). Along one axis
the difference query − key takes w + o − 1 values, from −(w + o)/2 + 1 to (w + o)/2 − 1 pixels, so one formula serves
both attentions: row = (dy + half) · (w + o − 1) + dx + half with half = (w + o)/2 − 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_position_index(window: int, key_window: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the row of the table for every (query pixel, key pixel) of one window.

    Args:
        window: Side w of the query window in pixels.
        key_window: Side o ≥ w of the key window in pixels, o − w even; both windows share their centre.
        device: Device of the index.

    Returns:
        ``(w², o²)`` int64, values in ``[0, (w + o − 1)²)``.
    """
    margin = (key_window - window) // 2
    span = window + key_window - 1
    half = (window + key_window) // 2 - 1
    query = torch.arange(window, device=device)
    key = torch.arange(key_window, device=device) - margin
    offset = query[:, None] - key[None, :] + half  # (w, o), 0 ... span − 1
    index = offset[:, None, :, None] * span + offset[None, :, None, :]  # (qy, qx, ky, kx)
    return index.reshape(window * window, key_window * key_window)


def gather_bias(bias_table: Tensor, window: int, key_window: int) -> Tensor:
    """Return the bias of every pair of pixels: ``((w + o − 1)², heads)`` → ``(heads, w², o²)``."""
    index = relative_position_index(window, key_window, bias_table.device)
    bias = bias_table[index.reshape(-1)].view(window * window, key_window * key_window, bias_table.shape[1])
    return bias.permute(2, 0, 1)
