"""Bicubic resizing of images: the only implementation in the package.

The kernel is the cubic of Keys (1981) with a = −0.5, as in MATLAB's ``imresize`` and Pillow, widened where the image
shrinks (antialiasing). `torch.nn.functional.interpolate` uses it with ``antialias=True`` only; its plain bicubic mode
has a = −0.75.
"""

from __future__ import annotations

from contextlib import nullcontext

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
    """Upscale ``(B, C, h, w)`` to ``(B, C, scale·h, scale·w)`` with `bicubic_resize`; the result is not clamped.

    In a program that `torch.export` makes, it is computed with convolutions, because ONNX would describe the weights at
    the border by the attribute ``exclude_outside`` of Resize, which OpenVINO ignores.
    """
    if torch.compiler.is_exporting():
        device = image.device.type
        # Autocast, which leaves interpolation in float32, would compute these convolutions in a lower precision.
        exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with exact:
            return _bicubic_by_convolution(image, scale)
    return bicubic_resize(image, (scale * image.shape[-2], scale * image.shape[-1]))


def _bicubic_by_convolution(image: Tensor, scale: int) -> Tensor:
    """Compute `bicubic_upscale` with one convolution over 5×5 pixels for each of the ``scale``² positions in a pixel.

    Weights of pixels outside the image are left out, and the others scaled to the sum 1.
    """
    batch, channels, height, width = image.shape
    wide = image if image.dtype == torch.float64 else image.float()
    # Distance in pixels from an output pixel to the two input pixels on either side of the one that contains it.
    offset = (torch.arange(scale, device=image.device, dtype=wide.dtype) + 0.5) / scale - 0.5
    distance = (torch.arange(-2, 3, device=image.device, dtype=wide.dtype) - offset[:, None]).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    taps = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    kernels = (taps[:, None, :, None] * taps[None, :, None, :]).reshape(scale**2, 1, 5, 5)

    def convolve(planes: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(planes, kernels, padding=2), scale)

    inside = torch.ones_like(wide[:1, :1])
    resized = convolve(wide.reshape(batch * channels, 1, height, width)) / convolve(inside)
    return resized.reshape(batch, channels, scale * height, scale * width).to(image.dtype)


def bicubic_downsample(x: Tensor, scale: int) -> Tensor:
    """Compute the content code z = D(x) with `bicubic_resize`.

    Args:
        x: ``(B, C, H, W)`` in [0, 1], H and W multiples of ``scale``.
        scale: Factor, at least 1.

    Returns:
        ``(B, C, H/scale, W/scale)``, clamped to [0, 1].
    """
    return bicubic_resize(x, (x.shape[-2] // scale, x.shape[-1] // scale)).clamp(0.0, 1.0)
