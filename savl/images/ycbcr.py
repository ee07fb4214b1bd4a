"""YCbCr samples to RGB (TIFF 6.0, section 21)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class YCbCrCoding:
    """How YCbCr samples are coded.

    Attributes:
        luma: what red, green and blue contribute to Y; ITU-R BT.601 unless a file says otherwise.
        black_white: the codes of black and white for Y, and of 0 and the greatest value for Cb and Cr.
    """

    luma: tuple[float, float, float]
    black_white: tuple[float, float, float, float, float, float]

    @staticmethod
    def of_tiff(bits: int, coefficients: Sequence[float], black_white: Sequence[float]) -> YCbCrCoding:
        """Return the coding of a TIFF page; fields that are missing or senseless have their defaults."""
        peak, middle = float(2**bits - 1), float(2 ** (bits - 1))
        luma = (0.299, 0.587, 0.114)
        if len(coefficients) == 3 and all(0 < part < 1 for part in coefficients):
            luma = (coefficients[0], coefficients[1], coefficients[2])
        ends = (0.0, peak, middle, peak, middle, peak)
        if len(black_white) == 6 and all(black_white[index + 1] > black_white[index] for index in (0, 2, 4)):
            ends = tuple(black_white)  # type: ignore[assignment]
        return YCbCrCoding(luma, ends)


def ycbcr_to_rgb(samples: NDArray[Any], coding: YCbCrCoding) -> NDArray[Any]:
    """Return RGB of (H, W, 3) YCbCr samples, uint8 or uint16, in the same dtype."""
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
