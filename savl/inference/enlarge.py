"""Upscale the samples of one image: split alpha, run the network, resize to the requested scale, and quantise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from savl.bicubic import bicubic_resize
from savl.images.planes import fill_transparent, quantise_plane, resize_premultiplied, sample_peak

OnTile = Callable[[int, int], None]
Strength = float | Literal["auto"]

# One float32 plane of that many pixels takes 64 GiB.
_MAX_PIXELS = 2**34


class UpscalerOutput(Protocol):
    """Result of an upscaler; see `savl.inference.upscaler.Upscaled`. An attribute ``strength`` is optional."""

    @property
    def sr(self) -> torch.Tensor:
        """Upscaled images, ``(B, 3, scale·h, scale·w)`` float32 in [0, 1], on the CPU."""

    @property
    def severity(self) -> torch.Tensor:
        """Severity maps, ``(B, h, w)`` float32 in [0, 2], on the CPU."""


class ImageUpscaler(Protocol):
    """Anything that upscales by a whole factor; see `savl.inference.upscaler.Upscaler`."""

    @property
    def scale(self) -> int:
        """Upscaling factor."""

    def __call__(self, lr: torch.Tensor, *, on_tile: OnTile | None = None) -> UpscalerOutput:
        """Upscale ``(B, 3, h, w)`` float in [0, 1]."""


@dataclass(frozen=True)
class ByBitDepth:
    """Two upscalers with the same network: `enlarge` uses one for images that it returns with 8 bits per sample."""

    eight_bit: ImageUpscaler
    other: ImageUpscaler

    @property
    def has_field(self) -> bool:
        """Whether the network infers a degradation field; True for an upscaler that does not say."""
        return bool(getattr(self.other, "has_field", True))

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.other.scale

    def __call__(self, lr: torch.Tensor, *, on_tile: OnTile | None = None) -> UpscalerOutput:
        """Upscale a tensor, which has more than 8 bits."""
        return self.other(lr, on_tile=on_tile)

    def for_samples(self, dtype: np.dtype[Any]) -> ImageUpscaler:
        """Return the upscaler for an image whose result has samples of a dtype."""
        return self.eight_bit if dtype == np.uint8 else self.other


@dataclass(frozen=True)
class Enlarged:
    """An upscaled image.

    Attributes:
        pixels: ``(H, W, bands)``, bands as in the input, without alpha if a background was given.
        severity: ``(h, w)`` float32 in [0, 2], one value per input pixel.
        strength: ``(h, w)`` float32 in [0, 1], how strongly each input pixel was restored.
    """

    pixels: NDArray[Any]
    severity: NDArray[np.float32]
    strength: NDArray[np.float32]


def output_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Return width and height in pixels of an image scaled by `scale`, rounded to nearest, at least 1 each.

    Raises:
        ValueError: The result would have more than 2**34 pixels.
    """
    new_width, new_height = max(1, width * scale), max(1, height * scale)
    if new_width * new_height > _MAX_PIXELS:
        raise ValueError(
            f"scale {scale:g} would make {new_width:.6g} x {new_height:.6g} pixels of {width} x {height}; "
            f"at most {_MAX_PIXELS} are accepted"
        )
    return round(new_width), round(new_height)


def check_scale(scale: object) -> float:
    """Return `scale` as a float if it is a finite number above 0.

    Raises:
        TypeError: `scale` is not a number.
        ValueError: `scale` is not finite, or not above 0.
    """
    if not isinstance(scale, Real):
        raise TypeError(f"scale must be a finite number above 0, got {scale!r}")
    try:
        number = float(scale)
    except OverflowError:  # an int larger than any float
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"scale must be a finite number above 0, got {number}")
    return number


def check_strength(strength: object) -> Strength:
    """Return `strength` if it is "auto", or as a float if it is a number from 0 to 1.

    Raises:
        TypeError: `strength` is neither a number nor a string.
        ValueError: `strength` is another string, or a number that is not in [0, 1].
    """
    if strength == "auto":
        return "auto"
    accepted = "strength must be 'auto' or a number from 0 to 1"
    if isinstance(strength, bool) or not isinstance(strength, (Real, str)):
        raise TypeError(f"{accepted}, got {type(strength).__name__} {strength!r}")
    if isinstance(strength, str) or not 0 <= float(strength) <= 1:
        raise ValueError(f"{accepted}, got {strength!r}")
    return float(strength)


def enlarge(
    pixels: NDArray[Any],
    upscaler: ImageUpscaler,
    *,
    scale: float | None = None,
    dtype: np.dtype[Any] | None = None,
    background: float | None = None,
    on_tile: OnTile | None = None,
) -> Enlarged:
    """Upscale one image, gray or RGB, with or without alpha, of any sample type.

    Gray is passed to the network as three equal channels, whose results are averaged. RGB with three equal channels is
    treated in the same way, so that it stays gray.

    Alpha is resized bicubically instead: it has no noise or blur to remove, and a network may leave specks where alpha
    should be exactly 0 or 1. Before the network runs, colour under transparent pixels is replaced by a continuation of
    the visible colours around them.

    Args:
        pixels: ``(H, W, bands)`` uint8, uint16 or float in [0, 1]; 1 band is gray, 2 gray and alpha, 3 RGB, 4 RGBA.
            Colour is not premultiplied.
        upscaler: The network.
        scale: Output pixels per input pixel; None is that of the upscaler. For another scale, the upscaler's output is
            resized in float, antialiased bicubic, in premultiplied space if there is alpha.
        dtype: Sample type to return; None is that of the input.
        background: Gray value in [0, 1] onto which alpha is flattened, so that no alpha band is returned; None keeps
            alpha.
        on_tile: Callback, called with (tiles done, number of tiles) after every tile.

    Raises:
        TypeError, ValueError: `scale` is not a finite number above 0, or the result would have too many pixels.
        RuntimeError: The network returned NaN or infinity.
    """
    if isinstance(upscaler, ByBitDepth):
        upscaler = upscaler.for_samples(dtype or pixels.dtype)
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
    applied = getattr(upscaled, "strength", None)
    strength = np.ones_like(severity) if applied is None else applied[0].numpy()
    planes = [upscaled.sr.mean(dim=1, keepdim=True)] if gray else list(upscaled.sr.split(1, dim=1))
    del upscaled  # for gray, this frees two thirds of the memory

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
    return Enlarged(out, severity, strength)


def _split(pixels: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split ``(H, W, bands)`` samples into colour (1, C, H, W) and alpha (1, 1, H, W) or None, float32 in [0, 1]."""
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
    """Yield colour planes at the output size, one at a time, so that only one additional plane is in memory."""
    for plane in planes:
        if alpha is None or new_alpha is None:
            yield bicubic_resize(plane, size)
            continue
        if tuple(plane.shape[-2:]) != size:
            plane = resize_premultiplied(plane, alpha, new_alpha)
        if background is not None:
            plane = torch.lerp(torch.full_like(plane, background), plane, new_alpha)
        yield plane
