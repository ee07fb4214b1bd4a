"""Blur kernels: what is drawn of one, and its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from savl.degradation.config import SHAPES, BlurConfig, shares

SIDE = 21
"""All kernels are padded to this many pixels, so that those of a batch can be applied together."""


@dataclass(frozen=True)
class GaussianKernel:
    """exp(-q^beta / 2), or 1 / (1 + q^beta) for a plateau, q being the Mahalanobis distance squared."""

    shape: str
    """One of `savl.degradation.config.SHAPES`."""
    size: int
    sigma: tuple[float, float]
    """Standard deviations along both axes, pixels."""
    rotation: float
    """Angle of the first axis, radians."""
    beta: float
    """1 for plain Gaussians."""

    def weakened(self, strength: float) -> GaussianKernel:
        """Narrower: the standard deviations multiplied by ``strength``."""
        return replace(self, sigma=(self.sigma[0] * strength, self.sigma[1] * strength))

    def values(self) -> Tensor:
        """``(21, 21)`` float32 that add up to 1."""
        cosine, sine = math.cos(self.rotation), math.sin(self.rotation)
        y, x = _grid(self.size)
        # So narrow that only the centre is left, even of plateaus, whose tails are long.
        first, second = (max(sigma, 1e-12) for sigma in self.sigma)
        along = (cosine * x + sine * y) / first
        across = (cosine * y - sine * x) / second
        distance = along.square() + across.square()
        if self.shape.startswith("plateau"):
            return _finished(1 / (1 + distance.pow(self.beta)))
        return _finished(torch.exp(-0.5 * distance.pow(self.beta)))


@dataclass(frozen=True)
class SincKernel:
    """Circular low-pass filter: all frequencies up to the cut-off, and the ringing of a sharp edge there."""

    size: int
    cutoff: float
    """Radians per pixel."""
    amount: float = 1.0
    """Share of the filtered image in the result, 0 to 1; the rest is the image as it was."""

    def weakened(self, strength: float) -> SincKernel:
        """Blended with the image as it was; no cut-off lets all through, diagonal frequencies lie above pi."""
        return replace(self, amount=self.amount * strength)

    def values(self) -> Tensor:
        """``(21, 21)`` float32 that add up to 1."""
        y, x = _grid(self.size)
        radius = torch.hypot(x, y)
        centre = self.size // 2
        radius[centre, centre] = 1.0
        kernel = self.cutoff * torch.special.bessel_j1(self.cutoff * radius) / (2 * math.pi * radius)
        kernel[centre, centre] = self.cutoff**2 / (4 * math.pi)
        kernel *= self.amount / kernel.sum()
        kernel[centre, centre] += 1.0 - self.amount
        return _finished(kernel)


Kernel = GaussianKernel | SincKernel


def draw_kernel(config: BlurConfig, random: np.random.Generator) -> Kernel:
    """Draw one kernel."""
    size = int(random.choice(config.sizes))
    if random.random() < config.sinc_probability:
        low = math.pi / 3 if size < 13 else math.pi / 5
        return SincKernel(size, random.uniform(low, math.pi))
    shape = str(random.choice(SHAPES, p=shares(config.shapes)))
    first = random.uniform(*config.sigma)
    if not shape.endswith("aniso"):
        return GaussianKernel(shape, size, (first, first), 0.0, _draw_beta(shape, config, random))
    sigma = (first, random.uniform(*config.sigma))
    rotation = random.uniform(*config.rotation)
    return GaussianKernel(shape, size, sigma, rotation, _draw_beta(shape, config, random))


def draw_sinc(config: BlurConfig, random: np.random.Generator) -> SincKernel:
    """Draw the sinc kernel of the pipeline's end."""
    return SincKernel(int(random.choice(config.sizes)), random.uniform(math.pi / 3, math.pi))


def _draw_beta(shape: str, config: BlurConfig, random: np.random.Generator) -> float:
    if shape in ("iso", "aniso"):
        return 1.0
    low, high = config.beta_plateau if shape.startswith("plateau") else config.beta_generalized
    below = random.random() < 0.5
    if low >= 1 or high <= 1:  # one side only; what the range leaves of the other is its end
        end = min(max(1.0, low), high)
        return end if below == (low >= 1) else random.uniform(low, high)
    return random.uniform(low, 1.0) if below else random.uniform(1.0, high)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return y, x


def _finished(kernel: Tensor) -> Tensor:
    margin = (SIDE - kernel.shape[0]) // 2
    return torch.nn.functional.pad((kernel / kernel.sum()).float(), (margin,) * 4)
