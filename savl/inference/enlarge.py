"""Samples in, network, samples out: what happens to one picture between its two files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from savl.bicubic import bicubic_resize
from savl.images.planes import fill_transparent, quantise_plane, resize_premultiplied, sample_peak

OnTile = Callable[[int, int], None]

# Nobody's memory holds more: one float32 plane of that many pixels takes 64 GiB.
_MOST_PIXELS = 2**34


class UpscalerOutput(Protocol):
    """What an upscaler returns; see `savl.inference.upscaler.Upscaled`."""

    @property
    def sr(self) -> torch.Tensor:
        """(B, 3, s*h, s*w) float32 in [0, 1], CPU."""

    @property
    def severity(self) -> torch.Tensor:
        """(B, h, w) float32 in [0, 2], CPU."""


class ImageUpscaler(Protocol):
    """Anything that upscales by a whole factor; see `savl.inference.upscaler.Upscaler`."""

    @property
    def scale(self) -> int:
        """The factor."""

    def __call__(self, lr: torch.Tensor, *, on_tile: OnTile | None = None) -> UpscalerOutput:
        """Upscales (B, 3, h, w) float in [0, 1]."""


@dataclass(frozen=True)
class Enlarged:
    """A picture after the network.

    Attributes:
        pixels: (H, W, bands), bands as before, or without alpha where a background was given.
        severity: (h, w) float32 in [0, 2], one value per input pixel.
    """

    pixels: NDArray[Any]
    severity: NDArray[np.float32]


def output_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height in pixels of a picture scaled by `scale`, rounded to nearest, at least 1 each.

    Raises:
        ValueError: so many pixels that no memory could hold them.
    """
    new_width, new_height = max(1, width * scale), max(1, height * scale)
    if new_width * new_height > _MOST_PIXELS:
        raise ValueError(
            f"scale {scale:g} would make {new_width:.6g} x {new_height:.6g} pixels of {width} x {height}; "
            f"at most {_MOST_PIXELS} are accepted"
        )
    return round(new_width), round(new_height)


def check_scale(scale: object) -> float:
    """Returns `scale` when it is a finite number above 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or not above 0.
    """
    if not isinstance(scale, Real):
        raise TypeError(f"scale must be a finite number above 0, got {scale!r}")
    try:
        number = float(scale)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"scale must be a finite number above 0, got {number}")
    return number


def enlarge(
    pixels: NDArray[Any],
    upscaler: ImageUpscaler,
    *,
    scale: float | None = None,
    dtype: np.dtype[Any] | None = None,
    background: float | None = None,
    on_tile: OnTile | None = None,
) -> Enlarged:
    """Upscales one picture, whatever its bands and depth.

    Gray goes through the network as three equal channels and is averaged afterwards; so is RGB whose channels
    are all equal, which therefore never gains a tint.

    Alpha is coverage and not a photograph: it has no noise or blur to take away, and a network can leave specks
    where it should be exactly 0 or 1. It is resampled bicubically, and colour under transparent pixels is made up
    from the visible neighbourhood beforehand.

    Args:
        pixels: (H, W, bands) uint8, uint16 or float in [0, 1]; 1 gray, 2 gray+alpha, 3 RGB, 4 RGBA, not
            premultiplied.
        upscaler: the network, tiled as it likes.
        scale: output pixels per input pixel; None is the upscaler's own. Other factors are resampled from the
            upscaler's own in float, antialiased bicubic, in premultiplied space where there is alpha.
        dtype: sample type to return; None is the input's.
        background: flatten alpha onto this value in [0, 1] and return no alpha band; None keeps alpha.
        on_tile: called with (tiles done, tiles in all).

    Raises:
        TypeError, ValueError: `scale` is not a finite number above 0, or gives more pixels than memory can hold.
        RuntimeError: the network gave NaN or infinity.
    """
    height, width, bands = pixels.shape
    scale = upscaler.scale if scale is None else check_scale(scale)
    new_width, new_height = output_size(width, height, scale)
    size = (new_height, new_width)

    colour, alpha = _split(pixels)
    if alpha is not None:
        colour = fill_transparent(colour, alpha)
    gray = colour.shape[1] == 1 or all(torch.equal(colour[:, 0], colour[:, c]) for c in (1, 2))
    if alpha is not None:
        native = (height * upscaler.scale, width * upscaler.scale)
        alpha = bicubic_resize(alpha, native).clamp_(0, 1)

    colour = colour.expand(1, 3, height, width).contiguous()
    upscaled = upscaler(colour, on_tile=on_tile)
    severity = upscaled.severity[0].numpy()
    planes = [upscaled.sr.mean(dim=1, keepdim=True)] if gray else list(upscaled.sr.split(1, dim=1))
    del upscaled  # for gray, two thirds of the memory go free here

    new_alpha = None if alpha is None else bicubic_resize(alpha, size).clamp(0, 1)
    colours = _resampled(planes, alpha, new_alpha, size, background)
    colour_bands = 1 if bands < 3 else 3
    out_bands = colour_bands + (1 if alpha is not None and background is None else 0)
    out = np.empty((*size, out_bands), dtype or pixels.dtype)
    for band, plane in enumerate(colours):
        quantise_plane(plane[0, 0], out[..., band])
    if gray and colour_bands == 3:
        out[..., 1] = out[..., 0]
        out[..., 2] = out[..., 0]
    if new_alpha is not None and background is None:
        quantise_plane(new_alpha[0, 0], out[..., -1])
    return Enlarged(out, severity)


def _split(pixels: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(H, W, bands) samples to colour (1, C, H, W) and alpha (1, 1, H, W), float32 in [0, 1]."""
    peak = sample_peak(pixels.dtype)
    copied = np.array(pixels.transpose(2, 0, 1), dtype=np.float32, order="C")
    planes = torch.from_numpy(copied)[None].div_(peak).clamp_(0, 1)
    if pixels.shape[2] in (2, 4):
        return planes[:, :-1], planes[:, -1:]
    return planes, None


def _resampled(
    planes: list[torch.Tensor],
    alpha: torch.Tensor | None,
    new_alpha: torch.Tensor | None,
    size: tuple[int, int],
    background: float | None,
) -> Iterator[torch.Tensor]:
    """Colour planes at the output size, one at a time, so that only one extra plane is alive."""
    for plane in planes:
        if alpha is None or new_alpha is None:
            yield bicubic_resize(plane, size)
            continue
        if tuple(plane.shape[-2:]) != size:
            plane = resize_premultiplied(plane, alpha, new_alpha)
        if background is not None:
            plane = torch.lerp(torch.full_like(plane, background), plane, new_alpha)
        yield plane
