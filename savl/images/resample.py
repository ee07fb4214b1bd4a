"""Antialiased bicubic resampling of single planes, plain and alpha-weighted."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Below this coverage a colour divided by its alpha is mostly rounding noise, and nobody can see it.
_VISIBLE_ALPHA = 1 / 255


def bicubic(plane: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resamples one plane with the antialiased Catmull-Rom kernel (Keys, a = -0.5).

    Args:
        plane: (H, W) float.
        size: height and width to reach, pixels.

    Returns:
        `size` float, not clamped: the kernel overshoots at edges. `plane` itself when it has that size
        already.
    """
    if tuple(plane.shape) == tuple(size):
        return plane
    return F.interpolate(plane[None, None], size=size, mode="bicubic", align_corners=False, antialias=True)[0, 0]


def bicubic_premultiplied(plane: torch.Tensor, alpha: torch.Tensor, new_alpha: torch.Tensor) -> torch.Tensor:
    """Resamples one colour plane so that a pixel counts by how opaque it is (premultiplied space).

    Args:
        plane: (H, W) float in [0, 1], with sensible values under transparent pixels (`fill_transparent`).
        alpha: (H, W) float in [0, 1].
        new_alpha: the resampled alpha, (H', W') float in [0, 1].

    Returns:
        (H', W') float colour, not premultiplied, not clamped. Where nothing is visible it is the plain
        resampled colour, which has no outlines of the transparent region in it.
    """
    size = (new_alpha.shape[0], new_alpha.shape[1])
    weighted = bicubic(plane * alpha, size)
    return torch.where(new_alpha > _VISIBLE_ALPHA, weighted / new_alpha.clamp_min(_VISIBLE_ALPHA), bicubic(plane, size))
