"""Blur kernels of the degradation pipeline: their random parameters and their values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from savl.degradation.config import SHAPES, BlurConfig, normalised

SIDE = 21
"""Width and height of every blur kernel, in pixels; smaller ones are padded with zeros to form batches."""


@dataclass(frozen=True)
class GaussianBlurKernel:
    """exp(-q^beta / 2), or 1 / (1 + q^beta) for a plateau; q is the squared Mahalanobis distance to the centre."""

    shape: str
    """One of `savl.degradation.config.SHAPES`."""
    size: int
    """Width and height in pixels, odd, at most `SIDE`."""
    sigma: tuple[float, float]
    """Standard deviations along both axes, in pixels."""
    rotation: float
    """Angle of the first axis, in radians."""
    beta: float
    """Exponent; 1 for an ordinary Gaussian."""

    def weakened(self, strength: float) -> GaussianBlurKernel:
        """Return a narrower blur kernel, whose standard deviations are multiplied by ``strength``."""
        return replace(self, sigma=(self.sigma[0] * strength, self.sigma[1] * strength))

    def values(self) -> Tensor:
        """Return the values as ``(21, 21)`` float32, which sum to 1."""
        cosine, sine = math.cos(self.rotation), math.sin(self.rotation)
        y, x = _grid(self.size)
        # At a standard deviation of 0 only the centre must remain, even of plateau shapes, whose tails are long.
        first, second = (max(sigma, 1e-12) for sigma in self.sigma)
        along = (cosine * x + sine * y) / first
        across = (cosine * y - sine * x) / second
        distance = along.square() + across.square()
        if self.shape.startswith("plateau"):
            return _normalised_and_padded(1 / (1 + distance.pow(self.beta)))
        return _normalised_and_padded(torch.exp(-0.5 * distance.pow(self.beta)))


@dataclass(frozen=True)
class SincBlurKernel:
    """Circular low-pass filter with a sharp cut-off frequency, which causes ringing."""

    size: int
    """Width and height in pixels, odd, at most `SIDE`."""
    cutoff: float
    """Cut-off frequency, in radians per pixel."""
    amount: float = 1.0
    """Weight of the filtered image in the result, in [0, 1]; the rest is the unfiltered image."""

    def weakened(self, strength: float) -> SincBlurKernel:
        """Return a filter whose result is blended with the unfiltered image.

        A higher cut-off would not do: diagonal frequencies lie above pi, so no cut-off passes everything.
        """
        return replace(self, amount=self.amount * strength)

    def values(self) -> Tensor:
        """Return the values as ``(21, 21)`` float32, which sum to 1."""
        y, x = _grid(self.size)
        radius = torch.hypot(x, y)
        centre = self.size // 2
        radius[centre, centre] = 1.0
        kernel = self.cutoff * torch.special.bessel_j1(self.cutoff * radius) / (2 * math.pi * radius)
        kernel[centre, centre] = self.cutoff**2 / (4 * math.pi)
        kernel *= self.amount / kernel.sum()
        kernel[centre, centre] += 1.0 - self.amount
        return _normalised_and_padded(kernel)


BlurKernel = GaussianBlurKernel | SincBlurKernel


def draw_blur_kernel(config: BlurConfig, random: np.random.Generator) -> BlurKernel:
    """Draw the blur kernel of a stage."""
    size = int(random.choice(config.sizes))
    if random.random() < config.sinc_probability:
        low = math.pi / 3 if size < 13 else math.pi / 5
        return SincBlurKernel(size, random.uniform(low, math.pi))
    shape = str(random.choice(SHAPES, p=normalised(config.shapes)))
    first = random.uniform(*config.sigma)
    if not shape.endswith("aniso"):
        return GaussianBlurKernel(shape, size, (first, first), 0.0, _draw_beta(shape, config, random))
    sigma = (first, random.uniform(*config.sigma))
    rotation = random.uniform(*config.rotation)
    return GaussianBlurKernel(shape, size, sigma, rotation, _draw_beta(shape, config, random))


def draw_sinc_blur_kernel(config: BlurConfig, random: np.random.Generator) -> SincBlurKernel:
    """Draw the sinc filter of the final step."""
    return SincBlurKernel(int(random.choice(config.sizes)), random.uniform(math.pi / 3, math.pi))


def _draw_beta(shape: str, config: BlurConfig, random: np.random.Generator) -> float:
    if shape in ("iso", "aniso"):
        return 1.0
    low, high = config.beta_plateau if shape.startswith("plateau") else config.beta_generalized
    below = random.random() < 0.5
    if low >= 1 or high <= 1:  # The range has one side only: draws for the other side return its nearest end.
        end = min(max(1.0, low), high)
        return end if below == (low >= 1) else random.uniform(low, high)
    return random.uniform(low, 1.0) if below else random.uniform(1.0, high)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return y, x


def _normalised_and_padded(kernel: Tensor) -> Tensor:
    margin = (SIDE - kernel.shape[0]) // 2
    return torch.nn.functional.pad((kernel / kernel.sum()).float(), (margin,) * 4)
