"""From float planes to samples, a strip of rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_STRIP_ROWS = 256


def sample_peak(dtype: np.dtype[Any]) -> float:
    """The sample value that stands for 1.0: 255, 65535, or 1.0 for floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def quantise_plane(plane: torch.Tensor, out: NDArray[Any]) -> None:
    """Writes a plane into an array: clamped to [0, 1], scaled to the array's dtype, rounded to nearest.

    Rounding, not truncation, keeps white at 255. Strips keep the temporaries at a few megabytes beside a
    plane of hundreds.

    Args:
        plane: (H, W) float.
        out: (H, W) uint8, uint16 or float; may be a strided view.

    Raises:
        RuntimeError: the plane holds NaN or infinity.
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
