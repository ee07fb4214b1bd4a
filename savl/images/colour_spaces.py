"""Conversion of CIELAB, ICCLAB and YCbCr samples to RGB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Linear sRGB to XYZ relative to D50, with Bradford's adaptation from D65, as in the ICC's sRGB profiles.
_FROM_LINEAR_SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
_TO_LINEAR_SRGB = np.linalg.inv(_FROM_LINEAR_SRGB)
_D50 = _FROM_LINEAR_SRGB.sum(axis=1)


def cielab_to_srgb(samples: NDArray[Any]) -> NDArray[Any]:
    """Convert TIFF's CIELab to sRGB: (H, W, 3) uint8 or uint16 to the same dtype.

    L* from 0 to 100 covers the range of the dtype. a* and b* are signed; in 16 bits they have 8 fractional bits.
    """
    peak = np.iinfo(samples.dtype).max
    signed = np.ascontiguousarray(samples[..., 1:]).view(np.int8 if peak == 255 else np.int16).astype(np.float32)
    lightness = samples[..., :1].astype(np.float32) * (100 / peak)
    return _srgb(np.concatenate([lightness, signed if peak == 255 else signed / 256], axis=2), samples.dtype)


def icclab_to_srgb(samples: NDArray[Any]) -> NDArray[Any]:
    """Convert TIFF's ICCLab to sRGB: (H, W, 3) uint8 or uint16 to the same dtype.

    a* and b* are stored with 128 added; in 16 bits, 0xFF00 stands for L* = 100.
    """
    peak = np.iinfo(samples.dtype).max
    values = samples.astype(np.float32) / (1 if peak == 255 else 256)
    return _srgb(values * np.array([100 / 255, 1, 1], np.float32) - np.array([0, 128, 128], np.float32), samples.dtype)


def _srgb(lab: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert L*, a*, b* (H, W, 3) to sRGB of the given dtype; colours outside sRGB are clipped."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * (3 * (6 / 29) ** 2)) * _D50.astype(np.float32)
    linear = np.clip(xyz @ _TO_LINEAR_SRGB.T.astype(np.float32), 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    samples: NDArray[Any] = np.rint(encoded * np.iinfo(dtype).max).astype(dtype)
    return samples


@dataclass(frozen=True)
class YCbCrCoding:
    """Coding of YCbCr samples.

    Attributes:
        luma: Weights of red, green and blue in Y; those of ITU-R BT.601 unless a file defines others.
        black_white: Codes of black and white for Y, and of 0 and the largest value for Cb and Cr.
    """

    luma: tuple[float, float, float]
    black_white: tuple[float, float, float, float, float, float]

    @staticmethod
    def of_tiff(bits: int, coefficients: Sequence[float], black_white: Sequence[float]) -> YCbCrCoding:
        """Return the coding of a TIFF page, with defaults for missing and invalid fields."""
        peak, middle = float(2**bits - 1), float(2 ** (bits - 1))
        luma = (0.299, 0.587, 0.114)
        if len(coefficients) == 3 and all(0 < part < 1 for part in coefficients):
            luma = (coefficients[0], coefficients[1], coefficients[2])
        ends = (0.0, peak, middle, peak, middle, peak)
        if len(black_white) == 6 and all(black_white[index + 1] > black_white[index] for index in (0, 2, 4)):
            ends = tuple(black_white)  # type: ignore[assignment]
        return YCbCrCoding(luma, ends)


def ycbcr_to_rgb(samples: NDArray[Any], coding: YCbCrCoding) -> NDArray[Any]:
    """Convert YCbCr samples (H, W, 3), uint8 or uint16, to RGB of the same dtype."""
    peak = float(np.iinfo(samples.dtype).max)
    low, high = np.reshape(coding.black_white, (3, 2)).T.astype(np.float32)
    ranges = np.array([peak, (peak - 1) / 2, (peak - 1) / 2], np.float32)
    y, cb, cr = np.moveaxis((samples.astype(np.float32) - low) * (ranges / (high - low)), -1, 0)
    red_part, green_part, blue_part = coding.luma
    red = y + (2 - 2 * red_part) * cr
    blue = y + (2 - 2 * blue_part) * cb
    green = (y - red_part * red - blue_part * blue) / green_part
    rgb = np.stack([red, green, blue], axis=-1)
    rounded: NDArray[Any] = np.clip(np.rint(rgb), 0, peak).astype(samples.dtype)
    return rounded
