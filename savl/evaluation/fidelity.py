"""PSNR and SSIM by the two protocols the super-resolution literature uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_SSIM_BAND = 512
"""Rows that are compared at a time, which bounds the memory."""


@dataclass(frozen=True)
class Fidelity:
    """Scores of one image, or their means over a set. Images are compared as 8-bit values."""

    psnr_y: float
    """PSNR of luma in dB; a border as wide as the scale is cut off."""
    ssim_y: float
    """SSIM of luma with the same border cut off; Gaussian window of 11 pixels, σ = 1.5."""
    psnr_rgb: float
    """PSNR of all channels in dB, whole image."""
    ssim_rgb: float
    """SSIM, mean over the channels, whole image."""
    lpips: float | None = None
    """LPIPS, whole image, lower is better; None if it was not measured."""
    dists: float | None = None
    """DISTS, whole image, lower is better; None if it was not measured."""
    niqe: float | None = None
    """NIQE of the upscaled image alone, lower is better; None if it was not measured."""
    brisque: float | None = None
    """BRISQUE of the upscaled image alone, lower is better; None if it was not measured."""

    @staticmethod
    def mean(scores: Sequence[Fidelity]) -> Fidelity:
        """Return the mean of every score over a non-empty list; an optional score is None unless every image has it."""

        def average(name: str) -> Any:
            values = [getattr(score, name) for score in scores]
            return None if None in values else math.fsum(values) / len(values)

        return Fidelity(*(average(field.name) for field in fields(Fidelity)))


def fidelity(sr: Tensor, hr: Tensor, *, crop: int = 4) -> Fidelity:
    """Compare an upscaled image with its original.

    Args:
        sr: ``(3, H, W)`` floating in [0, 1]; rounded to 8 bits first, as in a file.
        hr: ``(3, H, W)`` floating in [0, 1].
        crop: Border in pixels that is cut off for the luma scores; by convention the scale factor.

    Returns:
        PSNR and SSIM; the other scores are None. Identical images have infinite PSNR.

    Raises:
        ValueError: The shapes differ, or the image is smaller than the SSIM window plus the border.
    """
    sr, hr = as_8_bit(sr, hr)
    smallest = smallest_side(crop)
    if min(sr.shape[1:]) < smallest:
        raise ValueError(f"images must be at least {smallest} pixels on both sides, got {sr.shape[2]}x{sr.shape[1]}")
    sr_y, hr_y = (luma(image)[:, crop : image.shape[1] - crop, crop : image.shape[2] - crop] for image in (sr, hr))
    return Fidelity(_psnr(sr_y, hr_y), _ssim(sr_y, hr_y), _psnr(sr, hr), _ssim(sr, hr))


def smallest_side(crop: int) -> int:
    """Return the smallest side in pixels of an image that can be scored: the SSIM window plus the border."""
    return _SSIM_WINDOW + 2 * crop


def as_8_bit(sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Round both images to 8 bits: ``(3, H, W)`` in [0, 1] → float64 integers in [0, 255].

    Raises:
        ValueError: The shapes differ or are not ``(3, H, W)``.
    """
    if sr.shape != hr.shape or sr.dim() != 3 or sr.shape[0] != 3:
        raise ValueError(f"sr and hr must have the same shape (3, H, W), got {tuple(sr.shape)} and {tuple(hr.shape)}")
    return torch.round(sr.double().clamp(0, 1) * 255), torch.round(hr.double() * 255)


def luma(image: Tensor) -> Tensor:
    """Return BT.601 studio-range luma as MATLAB's rgb2ycbcr: ``(3, H, W)`` in [0, 255] → ``(1, H, W)`` in [16, 235]."""
    weights = image.new_tensor([65.481, 128.553, 24.966]) / 255
    return 16 + torch.einsum("c,chw->hw", weights, image)[None]


def _psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _ssim(a: Tensor, b: Tensor) -> float:
    """Return the structural similarity of two images (Wang et al., 2004), the mean over pixels and channels.

    The window is Gaussian and images are mirrored at the border. The computation is in float64, because rounding to
    float32 would destroy the variance of a flat bright area.

    Args:
        a: ``(C, H, W)`` float64 in [0, 255].
        b: The same shape.
    """
    window = torch.arange(_SSIM_WINDOW, dtype=a.dtype) - _SSIM_WINDOW // 2
    window = (-((window / _SSIM_SIGMA) ** 2) / 2).exp()
    weights: list[float] = (window / window.sum()).tolist()
    channels, height, width = a.shape
    border = (_SSIM_WINDOW // 2,) * 4
    a, b = (torch.nn.functional.pad(image[None], border, mode="reflect")[0] for image in (a, b))
    total = 0.0
    for channel in range(channels):
        for top in range(0, height, _SSIM_BAND):
            rows = slice(top, top + _SSIM_BAND + _SSIM_WINDOW - 1)
            total += _similarities(a[channel, rows], b[channel, rows], weights).sum().item()
    return total / (channels * height * width)


def _similarities(a: Tensor, b: Tensor, weights: list[float]) -> Tensor:
    """Return the similarity at every position of the window in ``(h, w)`` images: ``(h - 10, w - 10)``."""
    mean_a, mean_b = _windowed(a, weights), _windowed(b, weights)
    variances = (_windowed(a * a, weights) - mean_a**2).clamp_min(0) + (
        _windowed(b * b, weights) - mean_b**2
    ).clamp_min(0)
    covariance = _windowed(a * b, weights) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return numerator / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))


def _windowed(image: Tensor, weights: list[float]) -> Tensor:
    """Return the weighted mean over a square window at every position where it fits: rows first, then columns."""
    for dim in (0, 1):
        length = image.shape[dim] - len(weights) + 1
        shifted = [image.narrow(dim, start, length) for start in range(len(weights))]
        image = shifted[0] * weights[0]
        for part, weight in zip(shifted[1:], weights[1:], strict=True):
            image.add_(part, alpha=weight)
    return image
