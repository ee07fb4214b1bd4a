"""White stays white: where the picture is exactly flat, so is its enlargement."""

from __future__ import annotations

import torch
from torch.nn import functional as F

RADIUS = 4
"""A pixel is flat when all pixels up to this many away, in both directions, have its very colour."""


def keep_flat(sr: torch.Tensor, lr: torch.Tensor) -> None:
    """Gives flat parts of the picture their exact colour back, in place.

    A network meets a flat area within a level or two only, and worse at the border of the image, where its
    convolutions see zeros: clipped skies and paper would come out a little gray. Nothing can be said about such an
    area but its colour, so that is what it gets. Around it the network's answer stands.

    Args:
        sr: (B, 3, s*h, s*w) contiguous, written to.
        lr: (B, 3, h, w), the picture it was made from.
    """
    side = 2 * RADIUS + 1
    highest = F.max_pool2d(lr, side, stride=1, padding=RADIUS)  # beyond the border there is nothing to compare with
    lowest = -F.max_pool2d(-lr, side, stride=1, padding=RADIUS)
    flat = (highest == lowest).all(dim=1, keepdim=True)
    if not bool(flat.any()):
        return
    batch, channels, height, width = lr.shape
    scale = sr.shape[-1] // width
    blocks = sr.view(batch, channels, height, scale, width, scale)
    for row in range(scale):
        for column in range(scale):
            subpixels = blocks[:, :, :, row, :, column]
            subpixels.copy_(torch.where(flat, lr, subpixels))
