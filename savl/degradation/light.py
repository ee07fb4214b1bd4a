"""Bicubic downsampling with light noise and JPEG: what careful photographs suffer, not what the web does to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.settings import check_types


def bicubic_downsample(x: Tensor, scale: int) -> Tensor:
    """The content code z = D(x): antialiased bicubic, as MATLAB's imresize.

    Args:
        x: ``(B, 3, H, W)`` in [0, 1], H and W multiples of ``scale``.
        scale: Factor, at least 1.

    Returns:
        ``(B, 3, H/scale, W/scale)``, clamped to [0, 1].
    """
    size = (x.shape[-2] // scale, x.shape[-1] // scale)
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)


@dataclass(frozen=True)
class LightDegradation:
    """Additive Gaussian noise with probability, then JPEG with probability, then 8-bit rounding.

    Both strengths are drawn afresh for every image of a batch. An image that gets neither is a plain bicubic one.
    """

    noise_probability: float = 0.4
    """Chance of noise, in [0, 1]."""
    noise_sigma: tuple[float, float] = (0.5, 6.0)
    """Range of the noise's standard deviation, in 8-bit units."""
    jpeg_probability: float = 0.4
    """Chance of JPEG, in [0, 1]."""
    jpeg_quality: tuple[int, int] = (70, 98)
    """Range of the JPEG quality, both ends included, 1 to 100."""

    def __post_init__(self) -> None:
        check_types(self, "degradation.")
        for name in ("noise_sigma", "jpeg_quality"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"degradation.{name} must be (low, high), got {getattr(self, name)!r}")
        for name in ("noise_probability", "jpeg_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"degradation.{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if not 0.0 <= self.noise_sigma[0] <= self.noise_sigma[1]:
            raise ValueError(
                f"degradation.noise_sigma must be (low, high) with 0 <= low <= high, got {self.noise_sigma!r}"
            )
        if not 1 <= self.jpeg_quality[0] <= self.jpeg_quality[1] <= 100:
            raise ValueError(
                f"degradation.jpeg_quality must be (low, high) with 1 <= low <= high <= 100, got {self.jpeg_quality!r}"
            )

    def __call__(self, z: Tensor, random: np.random.Generator) -> Tensor:
        """Degrade clean low-resolution images.

        Args:
            z: ``(B, 3, h, w)`` float32 in [0, 1], on the CPU.
            random: Source of every draw; the same state gives the same result.

        Returns:
            ``(B, 3, h, w)`` float32 in [0, 1], multiples of 1/255.
        """
        out = np.empty(z.shape, dtype=np.uint8)
        for index, clean in enumerate(z.numpy() * np.float32(255.0)):
            if random.random() < self.noise_probability:
                sigma = random.uniform(*self.noise_sigma)
                clean = clean + random.normal(0.0, sigma, clean.shape)
            image = np.clip(np.rint(clean), 0, 255).astype(np.uint8)
            if random.random() < self.jpeg_probability:
                low, high = self.jpeg_quality
                image = _jpeg(image, int(random.integers(low, high + 1)))
            out[index] = image
        return torch.from_numpy(out).float() / 255.0


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Through a real JPEG encoder and back: ``(3, h, w)`` uint8 to the same."""
    import pyvips

    pixels = pyvips.Image.new_from_array(np.ascontiguousarray(image.transpose(1, 2, 0)), interpretation="srgb")
    decoded = pyvips.Image.new_from_buffer(pixels.jpegsave_buffer(Q=quality), "")
    return np.asarray(decoded.numpy()).transpose(2, 0, 1)
