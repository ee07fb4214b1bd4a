"""Operations on float planes: transparency, premultiplied resizing, and quantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from savl.bicubic import bicubic_resize

# From this alpha on, a pixel keeps its own colour. At lower alpha the colour is often rounding noise: software that
# computes with premultiplied colour recovers it only to within 1/alpha levels.
_TRUSTED_ALPHA = 16 / 255
# Below this alpha a colour divided by its alpha is mostly rounding noise, and nobody can see it.
_VISIBLE_ALPHA = 1 / 255


def fill_transparent(colour: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Replace the colours of transparent pixels by a smooth continuation of the visible colours.

    A network and a resampling filter read neighbouring pixels, so the colours that an editor left under transparent
    pixels (often black, white or green) would appear as a fringe along visible edges. The continuation is a normalised
    convolution over a pyramid ("pull-push", Gortler et al., The Lumigraph, 1996): colours are averaged in premultiplied
    space down to one pixel, then each level fills the holes of the next finer one. It takes the memory of one and a
    third images.

    Args:
        colour: (1, C, H, W) float in [0, 1], not premultiplied.
        alpha: (1, 1, H, W) float in [0, 1].

    Returns:
        (1, C, H, W): `colour` where alpha is at least 16/255, the continuation where it is 0, and a mixture in between.
        Zeros if the whole image is transparent. Channels that are equal stay equal.
    """
    if bool((alpha >= _TRUSTED_ALPHA).all()):
        return colour
    levels: list[tuple[torch.Tensor, torch.Tensor]] = [(colour * alpha, alpha)]
    while max(levels[-1][1].shape[-2:]) > 1:
        weighted, weight = levels[-1]
        levels.append((F.avg_pool2d(weighted, 2, ceil_mode=True), F.avg_pool2d(weight, 2, ceil_mode=True)))
    filled = torch.zeros_like(levels[-1][0])
    for weighted, weight in reversed(levels):
        own = weighted / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        size = (weight.shape[-2], weight.shape[-1])
        coarse = F.interpolate(filled, size=size, mode="bilinear", align_corners=False)
        filled = torch.lerp(coarse, own, (weight / _TRUSTED_ALPHA).clamp_max(1))
    # Multiplying and dividing by alpha rounds, so visible colours are copied to stay exactly as they were.
    return torch.where(alpha >= _TRUSTED_ALPHA, colour, filled.clamp(0, 1))


def resize_premultiplied(colour: torch.Tensor, alpha: torch.Tensor, new_alpha: torch.Tensor) -> torch.Tensor:
    """Resize colour planes so that every pixel counts in proportion to its alpha (premultiplied space).

    Args:
        colour: (1, C, H, W) float in [0, 1], not premultiplied, with sensible values under transparent pixels
            (`fill_transparent`).
        alpha: (1, 1, H, W) float in [0, 1].
        new_alpha: (1, 1, H', W') float in [0, 1], alpha already resized.

    Returns:
        (1, C, H', W') float, not premultiplied, not clamped. Where ``new_alpha`` is below 1/255 it is the colour
        resized without regard to alpha, which shows no outline of the transparent region.
    """
    size = (new_alpha.shape[-2], new_alpha.shape[-1])
    weighted = bicubic_resize(colour * alpha, size) / new_alpha.clamp_min(_VISIBLE_ALPHA)
    return torch.where(new_alpha > _VISIBLE_ALPHA, weighted, bicubic_resize(colour, size))


_STRIP_ROWS = 256


def sample_peak(dtype: np.dtype[Any]) -> float:
    """Return the sample value that stands for 1.0: 255, 65535, or 1.0 for floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def quantise_plane(plane: torch.Tensor, out: NDArray[Any]) -> None:
    """Write a plane into an array: clamp it to [0, 1], scale it to the array's dtype, and round to nearest.

    The plane is processed in strips, so that temporary tensors take a few megabytes even for planes of hundreds.

    Args:
        plane: (H, W) float.
        out: (H, W) uint8, uint16 or float; may be a strided view.

    Raises:
        RuntimeError: The plane contains NaN or infinity.
    """
    peak = sample_peak(out.dtype)
    for top in range(0, plane.shape[0], _STRIP_ROWS):
        strip = plane[top : top + _STRIP_ROWS].to(torch.float32 if out.dtype.kind == "u" else torch.float64)
        if not bool(torch.isfinite(strip).all()):
            raise RuntimeError(
                "the network gave NaN or infinite values, so nothing was written; "
                "try float32, and check the weights if that does not help"
            )
        strip = strip.clamp(0, 1)
        if out.dtype.kind == "u":
            strip = strip.mul_(peak).round_()
        out[top : top + _STRIP_ROWS] = strip.numpy()
