"""Bicubic resizing of images: the only implementation in the package.

The kernel is the cubic of Keys (1981) with a = −0.5, as in MATLAB's ``imresize`` and Pillow, widened where the image
shrinks (antialiasing). `torch.nn.functional.interpolate` uses it with ``antialias=True`` only; its plain bicubic mode
has a = −0.75.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bicubic_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image with the antialiased bicubic kernel.

    Args:
        image: ``(B, C, H, W)`` floating. float16 and bfloat16 are computed in float32.
        size: Height and width of the result, in pixels.

    Returns:
        ``(B, C, *size)``, dtype of ``image``. It is not clamped: the kernel overshoots at edges. ``image`` itself where
        it already has this size.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    wide = image if image.dtype == torch.float64 else image.float()
    return F.interpolate(wide, size=size, mode="bicubic", antialias=True, align_corners=False).to(image.dtype)


def bicubic_upscale(image: Tensor, scale: int) -> Tensor:
    """Upscale ``(B, C, h, w)`` to ``(B, C, scale·h, scale·w)`` with `bicubic_resize`; the result is not clamped."""
    return bicubic_resize(image, (scale * image.shape[-2], scale * image.shape[-1]))


def bicubic_downsample(x: Tensor, scale: int) -> Tensor:
    """Compute the content code z = D(x) with `bicubic_resize`.

    Args:
        x: ``(B, C, H, W)`` in [0, 1], H and W multiples of ``scale``.
        scale: Factor, at least 1.

    Returns:
        ``(B, C, H/scale, W/scale)``, clamped to [0, 1].
    """
    return bicubic_resize(x, (x.shape[-2] // scale, x.shape[-1] // scale)).clamp(0.0, 1.0)
