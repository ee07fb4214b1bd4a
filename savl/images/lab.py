"""CIE L*a*b* samples, relative to D50 as in TIFF files and ICC profiles, to sRGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of linear sRGB to XYZ relative to D50, with Bradford's adaptation of sRGB's D65: what the ICC's sRGB profiles hold.
_FROM_LINEAR_SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
_TO_LINEAR_SRGB = np.linalg.inv(_FROM_LINEAR_SRGB)
_D50 = _FROM_LINEAR_SRGB.sum(axis=1)


def cielab_to_srgb(samples: NDArray[Any]) -> NDArray[Any]:
    """Return sRGB of TIFF's CIELab: (H, W, 3) uint8 or uint16 in and out.

    L* is 0 to 100 over all codes; a* and b* are signed, and in 16 bits have 8 bits of fraction.
    """
    peak = np.iinfo(samples.dtype).max
    signed = np.ascontiguousarray(samples[..., 1:]).view(np.int8 if peak == 255 else np.int16).astype(np.float32)
    lightness = samples[..., :1].astype(np.float32) * (100 / peak)
    return _srgb(np.concatenate([lightness, signed if peak == 255 else signed / 256], axis=2), samples.dtype)


def icclab_to_srgb(samples: NDArray[Any]) -> NDArray[Any]:
    """Return sRGB of TIFF's ICCLab: (H, W, 3) uint8 or uint16 in and out.

    a* and b* are stored with 128 added; in 16 bits, 0xFF00 stands for L* = 100.
    """
    peak = np.iinfo(samples.dtype).max
    values = samples.astype(np.float32) / (1 if peak == 255 else 256)
    return _srgb(values * np.array([100 / 255, 1, 1], np.float32) - np.array([0, 128, 128], np.float32), samples.dtype)


def _srgb(lab: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return sRGB of the given dtype of (H, W, 3) L*, a*, b*; colours outside sRGB are clipped."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * (3 * (6 / 29) ** 2)) * _D50.astype(np.float32)
    linear = np.clip(xyz @ _TO_LINEAR_SRGB.T.astype(np.float32), 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    samples: NDArray[Any] = np.rint(encoded * np.iinfo(dtype).max).astype(dtype)
    return samples
