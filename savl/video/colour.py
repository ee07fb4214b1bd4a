"""Convert the planes of a frame to RGB and back, with the matrix and the range that the video names.

The conversion is computed here instead of by FFmpeg's scaler, because that one rounds RGB to whole levels before the
network sees it, and assumes BT.601 for frames whose matrix it is not told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RGB, BT709, UNSPECIFIED, BT470BG, SMPTE170M = 0, 1, 2, 5, 6
LIMITED, FULL = 1, 2
"""Values of AVColorRange; 0 is unspecified."""

# Weights of red and blue in luma, by the value of AVColorSpace (ITU-T H.273, table 4).
_WEIGHTS = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # BT.601, 625 lines
    6: (0.299, 0.114),  # BT.601, 525 lines
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
}
_NAMES = {1: "BT.709", 5: "BT.601", 6: "BT.601"}


@dataclass(frozen=True)
class Colour:
    """How samples stand for colours.

    Attributes:
        matrix: Value of AVColorSpace; `RGB` for frames that store RGB.
        full: Whether the samples use the full range, 0 to 255 with 8 bits, instead of 16 to 235.
        primaries: Value of AVColorPrimaries, which is only copied.
        transfer: Value of AVColorTransferCharacteristic, which is only copied: the network sees the values as they are
            stored.
    """

    matrix: int
    full: bool
    primaries: int
    transfer: int

    def encoded(self) -> Colour:
        """Return the colours of the result, which always stores YCbCr."""
        return Colour(BT709, False, self.primaries, self.transfer) if self.matrix == RGB else self


def colour_of(
    matrix: int, colour_range: int, primaries: int, transfer: int, *, rgb: bool, jpeg: bool, width: int, height: int
) -> tuple[Colour, str | None]:
    """Return how the samples of a video stand for colours, from its tags.

    Without a tag of the matrix, BT.709 is assumed for at least 1280 pixels of width or more than 576 of height, and
    BT.601 otherwise, as players do. Without a tag of the range, YCbCr has the limited range and RGB the full one.

    Args:
        matrix: Tag of the video, a value of AVColorSpace.
        colour_range: Tag of the video, a value of AVColorRange.
        primaries: Tag of the video, a value of AVColorPrimaries.
        transfer: Tag of the video, a value of AVColorTransferCharacteristic.
        rgb: Whether the frames store RGB.
        jpeg: Whether the pixel format implies the full range (yuvj420p).
        width: Width of the frames in pixels.
        height: Height of the frames in pixels.

    Returns:
        The colours, and a sentence about what was assumed, or None.

    Raises:
        ValueError: The matrix is not supported.
    """
    note = None
    if rgb:
        matrix = RGB
    elif matrix in (UNSPECIFIED, RGB):
        matrix = BT709 if width >= 1280 or height > 576 else BT470BG if height == 576 else SMPTE170M
        note = f"it does not name its colour matrix; {_NAMES[matrix]} is assumed and stored, as players do by the size"
    if matrix != RGB and matrix not in _WEIGHTS:
        raise ValueError(f"its colour matrix (number {matrix} of ITU-T H.273) is not supported")
    full = colour_range == FULL or (colour_range != LIMITED and (rgb or jpeg))
    return Colour(matrix, full, primaries, transfer), note


def to_rgb(planes: list[NDArray[np.uint8] | NDArray[np.uint16]], colour: Colour, bits: int, centred: bool) -> Tensor:
    """Convert the planes of a frame to RGB.

    Args:
        planes: Y, or Y, Cb and Cr, or (`Colour.matrix` is `RGB`) G, B and R; unsigned integers. The chroma planes have
            the size of the first one, or half of its width, or half of its width and height.
        colour: How the samples stand for colours.
        bits: Bits per sample.
        centred: Whether halved chroma samples lie between two columns, as in MPEG-1 and JPEG, instead of on the left
            one. Chroma samples of halved height always lie between two rows.

    Returns:
        ``(H, W, 3)`` float32 in [0, 1].
    """
    offset, luma_range, chroma_range = _levels(bits, colour.full)
    first = torch.from_numpy(planes[0].astype(np.float32)).sub_(offset).div_(luma_range)
    if colour.matrix == RGB:
        others = [torch.from_numpy(plane.astype(np.float32)).sub_(offset).div_(luma_range) for plane in planes[1:]]
        return torch.stack([others[1], first, others[0]], dim=2).clamp_(0, 1)
    if len(planes) == 1:
        return first.clamp_(0, 1)[:, :, None].repeat(1, 1, 3)
    height, width = first.shape
    chroma = []
    for plane in planes[1:]:
        values = torch.from_numpy(plane.astype(np.float32)).sub_(2.0 ** (bits - 1)).div_(chroma_range)
        if values.shape[0] != height:
            values = _doubled(values, centred=True)[:height]
        if values.shape[1] != width:
            values = _doubled(values.T, centred=centred).T[:, :width]
        chroma.append(values)
    blue, red = chroma
    kr, kb = _WEIGHTS[colour.matrix]
    kg = 1 - kr - kb
    rgb = torch.empty(height, width, 3)
    # No term besides luma where chroma is neutral, so that gray is exactly gray.
    rgb[:, :, 0] = first + 2 * (1 - kr) * red
    rgb[:, :, 1] = first - (2 * kr * (1 - kr) / kg) * red - (2 * kb * (1 - kb) / kg) * blue
    rgb[:, :, 2] = first + 2 * (1 - kb) * blue
    return rgb.clamp_(0, 1)


def from_rgb(rgb: NDArray[np.float32], colour: Colour, bits: int) -> list[NDArray[np.uint8] | NDArray[np.uint16]]:
    """Convert RGB to the planes of a 4:2:0 frame, whose chroma samples lie on the left column and between two rows.

    Args:
        rgb: ``(H, W, 3)`` float32 in [0, 1]; H and W are even.
        colour: How the samples are to stand for colours; not RGB.
        bits: Bits per sample, 8 or more.

    Returns:
        Y (H, W), Cb and Cr (H / 2, W / 2); uint8 for 8 bits, else uint16.
    """
    offset, luma_range, chroma_range = _levels(bits, colour.full)
    kr, kb = _WEIGHTS[colour.matrix]
    red, green, blue = torch.from_numpy(rgb).unbind(dim=2)
    luma = red * kr
    luma.add_(green, alpha=1 - kr - kb).add_(blue, alpha=kb)
    planes = [_quantised(luma * luma_range + offset, bits)]
    for channel, weight in ((blue, kb), (red, kr)):
        difference = (channel - luma).div_(2 * (1 - weight))
        rows = (difference[0::2] + difference[1::2]).div_(2)
        left = torch.cat([rows[:, :1], rows[:, 1:-1:2]], dim=1)  # the columns at 2 j - 1
        halved = rows[:, 0::2].mul(2).add_(left).add_(rows[:, 1::2]).div_(4)
        planes.append(_quantised(halved.mul_(chroma_range).add_(2.0 ** (bits - 1)), bits))
    return planes


def _levels(bits: int, full: bool) -> tuple[float, float, float]:
    """Return the sample of black, and the ranges of luma and chroma, in samples."""
    if full:
        return 0.0, 2.0**bits - 1, 2.0**bits - 1
    unit = 2.0 ** (bits - 8)
    return 16 * unit, 219 * unit, 224 * unit


def _doubled(values: Tensor, *, centred: bool) -> Tensor:
    """Interpolate linearly between rows to twice as many.

    Args:
        values: ``(H, W)``.
        centred: Whether the rows lie between two of the result, instead of on the even ones.
    """
    above = torch.cat([values[:1], values[:-1]])
    below = torch.cat([values[1:], values[-1:]])
    if centred:
        pair = torch.lerp(values, above, 0.25), torch.lerp(values, below, 0.25)
    else:
        pair = values, torch.lerp(values, below, 0.5)
    return torch.stack(pair, dim=1).reshape(2 * values.shape[0], values.shape[1])


def _quantised(values: Tensor, bits: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    rounded = values.round_().clamp_(0, 2**bits - 1).numpy()
    return rounded.astype(np.uint8) if bits == 8 else rounded.astype(np.uint16)
