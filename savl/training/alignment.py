"""Alignment of real pairs: the global shift, correlation and brightness of an LR image against its original."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.bicubic import bicubic_downsample

LARGEST_SHIFT = 16
"""Largest shift along each axis that is searched for, in LR pixels; in small images a quarter of their side."""
MEASURED_SIDE = 512
"""Side in LR pixels of the central part that is measured, which bounds the time for large photographs."""
SMALLEST_SIDE = 8
"""Side in LR pixels below which no shift is measured."""
FINE, COARSE = 1.2, 4.0
"""Standard deviations of the two Gaussian filters, in LR pixels, whose difference keeps details: the first reduces
noise, the second removes illumination."""
FLAT = 0.5 / 255.0
"""Standard deviation of the details below which a part of an image is flat and shows no shift."""


@dataclass(frozen=True)
class Alignment:
    """Alignment of an LR image with the bicubic reduction of its original."""

    shift: tuple[float, float]
    """LR pixels by which the content of the LR image lies below and to the right of that of the original; 0 where
    it cannot be measured, in flat and in tiny images."""
    correlation: float
    """Correlation of the details of both images after the shift, in [-1, 1]; NaN where it cannot be
    measured."""
    brightness: float
    """Mean of the LR image minus that of the original, for the channel in which it differs most; in [-1, 1]."""


def measure_alignment(lr: Tensor, hr: Tensor, scale: int) -> Alignment:
    """Measure how well a pair is aligned.

    The shift is where the details of the LR image and those of the reduced original correlate most: among integer
    shifts by the product of their Fourier transforms, then to a fraction of a pixel by a quadratic function through the
    correlations at the neighbouring shifts. A symmetric blur does not move the maximum, and neither do gain and offset.

    Args:
        lr: ``(3, h, w)`` float32 in [0, 1].
        hr: ``(3, scale·h, scale·w)`` float32 in [0, 1].
        scale: Ratio of the sizes.
    """
    lr, hr = _center(lr, MEASURED_SIDE, 1), _center(hr, MEASURED_SIDE, scale)
    reduced = bicubic_downsample(hr[None], scale)[0]
    difference = (lr - reduced).mean(dim=(1, 2))
    brightness = float(difference[difference.abs().argmax()])
    ours, theirs = (_details(image.mean(dim=0)) for image in (lr, reduced))
    if min(lr.shape[1:]) < SMALLEST_SIDE or min(float(image.std(correction=0)) for image in (ours, theirs)) < FLAT:
        return Alignment((0.0, 0.0), math.nan, brightness)
    down, right = _integer_shift(ours, theirs)
    while True:
        near = [[_correlation(ours, theirs, down + i, right + j) for j in (-1, 0, 1)] for i in (-1, 0, 1)]
        values = torch.tensor(near, dtype=torch.float64)
        i, j = divmod(int(values.argmax()), 3)
        if (i, j) == (1, 1) or max(abs(down + i - 1), abs(right + j - 1)) > LARGEST_SHIFT:
            break
        down, right = down + i - 1, right + j - 1
    more = _peak(values)
    return Alignment((down + more[0], right + more[1]), near[1][1], brightness)


def _center(image: Tensor, side: int, scale: int) -> Tensor:
    """Crop the center, at most ``side`` LR pixels per side, of an image that is ``scale`` times as large as LR."""
    for axis in (1, 2):
        length = image.shape[axis] // scale
        kept = min(length, side)
        image = image.narrow(axis, (length - kept) // 2 * scale, kept * scale)
    return image


def _details(image: Tensor) -> Tensor:
    """Return the difference of two Gaussian filters of an ``(h, w)`` image."""
    return _blurred(image, FINE) - _blurred(image, COARSE)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(3 * sigma)
    position = torch.arange(-radius, radius + 1, dtype=image.dtype)
    weights = torch.softmax(-0.5 * (position / sigma).square(), dim=0)
    padded = F.pad(image[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[0, 0]


def _integer_shift(ours: Tensor, theirs: Tensor) -> tuple[int, int]:
    """Return by how many pixels ``ours`` lies below and to the right of ``theirs``; ``(h, w)`` both."""
    h, w = ours.shape
    window = torch.hann_window(h, periodic=False)[:, None] * torch.hann_window(w, periodic=False)
    size = (2 * h, 2 * w)  # padded, so that shifts do not wrap around
    spectra = [torch.fft.rfft2((image - image.mean()) * window, size) for image in (ours, theirs)]
    correlation = torch.fft.irfft2(spectra[0] * spectra[1].conj(), size)
    rows, columns = (torch.arange(-limit, limit + 1) for limit in (_largest_shift(h), _largest_shift(w)))
    best = divmod(int(correlation[rows[:, None], columns].argmax()), len(columns))
    return int(rows[best[0]]), int(columns[best[1]])


def _largest_shift(side: int) -> int:
    return min(LARGEST_SHIFT, side // 4)


def _correlation(ours: Tensor, theirs: Tensor, down: int, right: int) -> float:
    """Return the correlation of ``ours`` with ``theirs`` shifted down and to the right, where they overlap."""
    h, w = ours.shape
    a = ours[max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)]
    b = theirs[max(-down, 0) : h + min(-down, 0), max(-right, 0) : w + min(-right, 0)]
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-12))


def _peak(values: Tensor) -> tuple[float, float]:
    """Return where a quadratic function through ``(3, 3)`` values around (0, 0), the largest, has its maximum."""
    slope = 0.5 * torch.stack((values[2, 1] - values[0, 1], values[1, 2] - values[1, 0]))
    rows, columns = (part[0] - 2 * part[1] + part[2] for part in (values[:, 1], values[1]))
    mixed = 0.25 * (values[2, 2] - values[2, 0] - values[0, 2] + values[0, 0])
    curvature = torch.stack((torch.stack((rows, mixed)), torch.stack((mixed, columns))))
    if curvature[0, 0] >= 0 or torch.linalg.det(curvature) <= 0:
        return 0.0, 0.0
    down, right = (-torch.linalg.solve(curvature, slope)).clamp(-1.0, 1.0).tolist()
    return down, right
