"""Settings of the degradation pipeline: the published ones of Real-ESRGAN (Wang et al., 2021) by default.

Every range is one of a uniform distribution, both ends included. `DegradationConfig` is the whole; its parts are tables
of their own in a TOML file: ``[degradation.first.blur]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from savl.settings import check_types

SHAPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
"""Blur kernels by their shape, in the order of `BlurConfig.shapes`."""
METHODS = ("area", "bilinear", "bicubic")
"""Ways to resize, each as likely as the others."""
OPERATIONS = ("blur", "noise", "jpeg")
"""What can be all that happens to an image, each as likely as the others (`DegradationConfig.alone`)."""


def _chances(table: str, settings: Any, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise ValueError(f"{table}.{name} must lie in [0, 1], got {getattr(settings, name)!r}")


def _ranges(table: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if len(value) != 2 or not all(map(math.isfinite, value)) or value[0] > value[1]:
            raise ValueError(f"{table}.{name} must be (low, high) with low <= high, got {value!r}")


def _distribution(name: str, chances: tuple[float, ...], count: int) -> None:
    if len(chances) != count or min(chances) < 0 or not math.isclose(sum(chances), 1.0, abs_tol=1e-6):
        raise ValueError(f"{name} must be {count} chances that add up to 1, got {chances!r}")


def shares(chances: tuple[float, ...]) -> list[float]:
    """Chances as NumPy takes them, which asks for a sum closer to 1 than `_distribution` does."""
    whole = math.fsum(chances)
    return [chance / whole for chance in chances]


@dataclass(frozen=True)
class BlurConfig:
    """A kernel drawn for every image: Gaussian of one of six shapes, or sinc (ringing)."""

    probability: float = 1.0
    """Chance that an image is blurred at all."""
    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Sides of the kernels in pixels, odd, at most 21, each as likely as the others."""
    shapes: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Chances of the shapes in `SHAPES`; they add up to 1."""
    sigma: tuple[float, float] = (0.2, 3.0)
    """Standard deviation along each axis, pixels."""
    rotation: tuple[float, float] = (-math.pi, math.pi)
    """Angle of the first axis, radians."""
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    """Exponent of generalized Gaussians; as likely below 1 as above."""
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    """Exponent of plateau kernels; as likely below 1 as above, where the range has both sides."""
    sinc_probability: float = 0.1
    """Chance of a sinc kernel instead. Its cut-off lies in [pi/3, pi] for kernels below 13 pixels, else [pi/5, pi]."""

    def __post_init__(self) -> None:
        check_types(self, "blur.")
        _chances("blur", self, "probability", "sinc_probability")
        _ranges("blur", self, "sigma", "rotation", "beta_generalized", "beta_plateau")
        if not self.sizes or any(size % 2 == 0 or not 1 <= size <= 21 for size in self.sizes):
            raise ValueError(f"blur.sizes must be odd numbers from 1 to 21, got {self.sizes!r}")
        _distribution("blur.shapes", self.shapes, len(SHAPES))
        for name in ("sigma", "beta_generalized", "beta_plateau"):
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"blur.{name} must lie above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ResizeConfig:
    """A factor drawn once for a group of images, which share their size."""

    up: float = 0.2
    """Chance of a factor in [1, high]."""
    down: float = 0.7
    """Chance of a factor in [low, 1]."""
    keep: float = 0.1
    """Chance of no change. The three add up to 1."""
    factor: tuple[float, float] = (0.15, 1.5)
    """Lowest and highest factor, around 1."""

    def __post_init__(self) -> None:
        check_types(self, "resize.")
        _distribution("resize.up, resize.down and resize.keep", (self.up, self.down, self.keep), 3)
        _ranges("resize", self, "factor")
        if not 0 < self.factor[0] <= 1 <= self.factor[1]:
            raise ValueError(f"resize.factor must be (low, high) with 0 < low <= 1 <= high, got {self.factor!r}")


@dataclass(frozen=True)
class NoiseConfig:
    """Gaussian or Poisson noise, drawn for every image."""

    probability: float = 1.0
    """Chance of any noise."""
    gaussian_probability: float = 0.5
    """Chance that the noise is Gaussian; Poisson otherwise."""
    sigma: tuple[float, float] = (1.0, 30.0)
    """Standard deviation of Gaussian noise, 8-bit units."""
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    """Factor on the shot noise of an image whose brightest value counts 256 photons."""
    gray_probability: float = 0.4
    """Chance that all channels share one noise."""

    def __post_init__(self) -> None:
        check_types(self, "noise.")
        _chances("noise", self, "probability", "gaussian_probability", "gray_probability")
        _ranges("noise", self, "sigma", "poisson_scale")
        for name in ("sigma", "poisson_scale"):
            if getattr(self, name)[0] < 0:
                raise ValueError(f"noise.{name} must not be negative, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class JpegConfig:
    """JPEG compression, its quality drawn for every image."""

    probability: float = 1.0
    """Chance of compression."""
    quality: tuple[float, float] = (30.0, 95.0)
    """Quality, 1 to 100."""

    def __post_init__(self) -> None:
        check_types(self, "jpeg.")
        _chances("jpeg", self, "probability")
        _ranges("jpeg", self, "quality")
        if not 1 <= self.quality[0] <= self.quality[1] <= 100:
            raise ValueError(f"jpeg.quality must lie in [1, 100], got {self.quality!r}")


@dataclass(frozen=True)
class StageConfig:
    """Blur, resize, noise, JPEG."""

    probability: float = 1.0
    """Chance, drawn for a group of images, that the stage takes place."""
    blur: BlurConfig = BlurConfig()
    resize: ResizeConfig = ResizeConfig()
    noise: NoiseConfig = NoiseConfig()
    jpeg: JpegConfig = JpegConfig()

    def __post_init__(self) -> None:
        check_types(self, "stage.")
        _chances("stage", self, "probability")


@dataclass(frozen=True)
class FinalConfig:
    """The way to the low-resolution size: resize and sinc filter, with JPEG before or after them."""

    sinc_probability: float = 0.8
    """Chance of a sinc filter, its cut-off in [pi/3, pi]."""
    jpeg_last: float = 0.5
    """Chance that JPEG comes last."""
    jpeg: JpegConfig = JpegConfig()

    def __post_init__(self) -> None:
        check_types(self, "final.")
        _chances("final", self, "sinc_probability", "jpeg_last")


@dataclass(frozen=True)
class SpatialConfig:
    """Degradation that varies over the image, through a smooth random mask or a ramp as of depth."""

    probability: float = 0.0
    """Chance that an image is degraded so."""
    ramp_probability: float = 0.3
    """Chance of a ramp instead of a smooth random mask."""
    cells: tuple[int, int] = (2, 6)
    """Smooth masks interpolate a random grid with so many cells along the longer side."""

    def __post_init__(self) -> None:
        check_types(self, "spatial.")
        _chances("spatial", self, "probability", "ramp_probability")
        _ranges("spatial", self, "cells")
        if self.cells[0] < 1:
            raise ValueError(f"spatial.cells must be at least 1, got {self.cells!r}")


SECOND_STAGE = StageConfig(
    blur=BlurConfig(probability=0.8, sigma=(0.2, 1.5)),
    resize=ResizeConfig(up=0.3, down=0.4, keep=0.3, factor=(0.3, 1.2)),
    noise=NoiseConfig(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    jpeg=JpegConfig(probability=0.0),
)
"""Real-ESRGAN's second stage. Its JPEG is that of `FinalConfig`, before or after the way to the low-resolution size."""


@dataclass(frozen=True)
class DegradationConfig:
    """The second-order pipeline; the defaults are Real-ESRGAN's."""

    first: StageConfig = StageConfig()
    second: StageConfig = SECOND_STAGE
    """Its factors count from the low-resolution size."""
    final: FinalConfig = FinalConfig()
    spatial: SpatialConfig = SpatialConfig()
    strength: tuple[float, float] = (1.0, 1.0)
    """Range of a factor drawn for every image that all of its degradation is weakened by: standard deviations, distance
    of the quality from 100, logarithm of the resize factors, share of a sinc filter. 1 is the published pipeline, 0
    resizes only."""
    full_strength: float = 0.0
    """Chance that an image's strength is the upper end of that range instead: a network that learns from every strength
    sees the published pipeline itself too rarely otherwise."""
    single_operation: float = 0.0
    """Chance, drawn for a group of images, that one of `OPERATIONS` is all that happens to them (see `alone`). In the
    whole pipeline nearly everything smooths: a network that sees nothing else rarely meets noise on a sharp picture."""

    def __post_init__(self) -> None:
        check_types(self, "degradation.")
        _ranges("degradation", self, "strength")
        _chances("degradation", self, "full_strength", "single_operation")
        if not 0 <= self.strength[0] <= self.strength[1] <= 1:
            raise ValueError(f"degradation.strength must lie in [0, 1], got {self.strength!r}")

    def alone(self, operation: str) -> DegradationConfig:
        """One operation, with its ranges here, beside the way to the low-resolution size and nothing else.

        Args:
            operation: ``"blur"`` of the first stage, at the high-resolution size; ``"noise"`` of the second stage or
                the final ``"jpeg"``, at the low-resolution size.

        Raises:
            ValueError: There is no such operation.
        """
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
        never = JpegConfig(probability=0.0)
        nothing = StageConfig(
            blur=BlurConfig(probability=0.0),
            resize=ResizeConfig(up=0.0, down=0.0, keep=1.0),
            noise=NoiseConfig(probability=0.0),
            jpeg=never,
        )
        return replace(
            self,
            first=replace(nothing, blur=self.first.blur) if operation == "blur" else nothing,
            second=replace(nothing, noise=self.second.noise) if operation == "noise" else nothing,
            final=replace(self.final, sinc_probability=0.0, jpeg=self.final.jpeg if operation == "jpeg" else never),
            single_operation=0.0,
        )
