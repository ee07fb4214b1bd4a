"""The content code: the clean low-resolution image that a degraded one is compared with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bicubic_downsample(x: Tensor, scale: int) -> Tensor:
    """The content code z = D(x): antialiased bicubic, as MATLAB's imresize.

    Args:
        x: ``(B, 3, H, W)`` in [0, 1], H and W multiples of ``scale``.
        scale: Factor, at least 1.

    Returns:
        ``(B, 3, H/scale, W/scale)``, clamped to [0, 1].
    """
    size = (x.shape[-2] // scale, x.shape[-1] // scale)
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
