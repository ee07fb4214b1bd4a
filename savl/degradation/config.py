"""Settings of the degradation pipeline: the published ones of Real-ESRGAN (Wang et al., 2021) by default.

Every range is the range of a uniform distribution, both ends included. `DegradationConfig` holds all settings; its
parts are nested tables of a TOML file, such as ``[degradation.first.blur]``.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from savl.settings import check_types, from_table

SHAPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
"""Shapes of Gaussian blur kernels, in the order of `BlurConfig.shapes`."""
METHODS = ("area", "bilinear", "bicubic")
"""Interpolation methods for resizing, all equally likely."""
OPERATIONS = ("blur", "noise", "jpeg")
"""Operations that `SingleConfig` can apply alone."""
CONFIGURATION_TABLES = (
    "model",
    "data",
    "pairs",
    "degradation",
    "objective",
    "gan",
    "optimizer",
    "validation",
    "run",
)
"""Tables of a training configuration (`savl.training.config`); `load_degradation_config` reads only one of them."""


def _probabilities(table: str, settings: Any, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise ValueError(f"{table}.{name} must lie in [0, 1], got {getattr(settings, name)!r}")


def _ranges(table: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if len(value) != 2 or not all(map(math.isfinite, value)) or value[0] > value[1]:
            raise ValueError(f"{table}.{name} must be (low, high) with low <= high, got {value!r}")


def _distribution(name: str, probabilities: tuple[float, ...], count: int) -> None:
    if len(probabilities) != count or min(probabilities) < 0 or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
        raise ValueError(f"{name} must be {count} probabilities that add up to 1, got {probabilities!r}")


def normalised(probabilities: tuple[float, ...]) -> list[float]:
    """Normalise probabilities for NumPy, which requires a sum closer to 1 than `_distribution` does."""
    total = math.fsum(probabilities)
    return [probability / total for probability in probabilities]


@dataclass(frozen=True)
class BlurConfig:
    """A blur kernel, drawn for every image: Gaussian with one of six shapes, or sinc, which causes ringing."""

    probability: float = 1.0
    """Probability that an image is blurred."""
    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Widths of the blur kernels in pixels, odd, at most 21, all equally likely."""
    shapes: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Probabilities of the shapes in `SHAPES`; they add up to 1."""
    sigma: tuple[float, float] = (0.2, 3.0)
    """Standard deviation along each axis, in pixels."""
    rotation: tuple[float, float] = (-math.pi, math.pi)
    """Angle of the first axis, in radians."""
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    """Exponent of generalized Gaussians; below and above 1 are equally likely."""
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    """Exponent of plateau shapes; below and above 1 are equally likely if the range has both sides."""
    sinc_probability: float = 0.1
    """Probability of a sinc filter instead. Its cut-off lies in [pi/3, pi] for sizes below 13, else in [pi/5, pi]."""

    def __post_init__(self) -> None:
        check_types(self, "blur.")
        _probabilities("blur", self, "probability", "sinc_probability")
        _ranges("blur", self, "sigma", "rotation", "beta_generalized", "beta_plateau")
        if not self.sizes or any(size % 2 == 0 or not 1 <= size <= 21 for size in self.sizes):
            raise ValueError(f"blur.sizes must be odd numbers from 1 to 21, got {self.sizes!r}")
        _distribution("blur.shapes", self.shapes, len(SHAPES))
        for name in ("sigma", "beta_generalized", "beta_plateau"):
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"blur.{name} must lie above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ResizeConfig:
    """A change of size; the factor is drawn once for a group of images, which must have one size."""

    up: float = 0.2
    """Probability of a factor in [1, high]."""
    down: float = 0.7
    """Probability of a factor in [low, 1]."""
    keep: float = 0.1
    """Probability of no change. The three probabilities add up to 1."""
    factor: tuple[float, float] = (0.15, 1.5)
    """Lowest and highest factor: low <= 1 <= high."""

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
    """Probability of noise."""
    gaussian_probability: float = 0.5
    """Probability that the noise is Gaussian; it is Poisson noise otherwise."""
    sigma: tuple[float, float] = (1.0, 30.0)
    """Standard deviation of Gaussian noise, in 8-bit units."""
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    """Factor on the shot noise; an image counts at most 256 photons at full brightness."""
    gray_probability: float = 0.4
    """Probability that all channels have the same noise."""

    def __post_init__(self) -> None:
        check_types(self, "noise.")
        _probabilities("noise", self, "probability", "gaussian_probability", "gray_probability")
        _ranges("noise", self, "sigma", "poisson_scale")
        for name in ("sigma", "poisson_scale"):
            if getattr(self, name)[0] < 0:
                raise ValueError(f"noise.{name} must not be negative, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class JpegConfig:
    """JPEG compression; its quality is drawn for every image."""

    probability: float = 1.0
    """Probability of compression."""
    quality: tuple[float, float] = (30.0, 95.0)
    """Quality, 1 to 100."""

    def __post_init__(self) -> None:
        check_types(self, "jpeg.")
        _probabilities("jpeg", self, "probability")
        _ranges("jpeg", self, "quality")
        if not 1 <= self.quality[0] <= self.quality[1] <= 100:
            raise ValueError(f"jpeg.quality must lie in [1, 100], got {self.quality!r}")


@dataclass(frozen=True)
class StageConfig:
    """One stage of the pipeline: blur, resize, noise, JPEG."""

    probability: float = 1.0
    """Probability that the stage takes place, drawn for a group of images."""
    blur: BlurConfig = BlurConfig()
    resize: ResizeConfig = ResizeConfig()
    noise: NoiseConfig = NoiseConfig()
    jpeg: JpegConfig = JpegConfig()

    def __post_init__(self) -> None:
        check_types(self, "stage.")
        _probabilities("stage", self, "probability")


@dataclass(frozen=True)
class FinalConfig:
    """The final step: resize to the low-resolution size and sinc filter, with JPEG before or after them."""

    sinc_probability: float = 0.8
    """Probability of a sinc filter; its cut-off is drawn from [pi/3, pi]."""
    jpeg_last: float = 0.5
    """Probability that JPEG comes last."""
    jpeg: JpegConfig = JpegConfig()

    def __post_init__(self) -> None:
        check_types(self, "final.")
        _probabilities("final", self, "sinc_probability", "jpeg_last")


@dataclass(frozen=True)
class SpatialConfig:
    """Degradation that varies over the image, by a smooth random mask or a ramp that imitates depth."""

    probability: float = 0.0
    """Probability that an image is degraded through a mask."""
    ramp_probability: float = 0.3
    """Probability of a ramp instead of a smooth random mask."""
    cells: tuple[int, int] = (2, 6)
    """Number of cells along the longer side of the random grid that a smooth mask interpolates."""

    def __post_init__(self) -> None:
        check_types(self, "spatial.")
        _probabilities("spatial", self, "probability", "ramp_probability")
        _ranges("spatial", self, "cells")
        if self.cells[0] < 1:
            raise ValueError(f"spatial.cells must be at least 1, got {self.cells!r}")


@dataclass(frozen=True)
class SingleConfig:
    """One operation at the low-resolution size, after the antialiased bicubic reduction of the image.

    The blur of the first stage acts on the high-resolution image, where a standard deviation of 3 pixels is less than
    one low-resolution pixel. The ranges of this class refer to the low-resolution image.
    """

    operations: tuple[str, ...] = OPERATIONS
    """The operations of which one is applied, all equally likely."""
    blur: BlurConfig = BlurConfig(shapes=(0.7, 0.3, 0.0, 0.0, 0.0, 0.0), sigma=(0.2, 2.0), sinc_probability=0.0)
    """Gaussian blur; its pixels are low-resolution pixels."""
    noise: NoiseConfig = NoiseConfig(sigma=(2.0, 30.0))
    jpeg: JpegConfig = JpegConfig(quality=(20.0, 90.0))

    def __post_init__(self) -> None:
        check_types(self, "single.")
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            raise ValueError(
                f"single.operations must be at least one of {', '.join(OPERATIONS)}, got {self.operations!r}"
            )


@dataclass(frozen=True)
class CameraConfig:
    """Two photographs of one scene by one camera, with focal lengths that differ by the scale.

    Both are blurred by the same point spread function and sharpened by the same unsharp mask, each in its own pixels.
    The default ranges of blur and sharpening were measured with `benchmarks.studies.camera_blur`. They extend from a
    Gaussian blur without sharpening to the blur and sharpening of an iPhone X, and include those of a Nikon D5500.
    """

    probability: float = 0.0
    """Probability that a group of images is degraded in this way instead of by the whole pipeline or one operation."""
    sigma: tuple[float, float] = (0.57, 0.78)
    """Standard deviation of the Gaussian point spread function, in pixels of each image; the geometric mean of both
    axes."""
    sharpening: tuple[float, float] = (0.0, 2.4)
    """Amount of the unsharp mask 1 + amount · (1 − Gaussian of 0.8 own pixels). It is drawn together with ``sigma``:
    the image with the lowest standard deviation has the lowest amount, because cameras that blur more sharpen more."""
    axis_ratio: tuple[float, float] = (0.9, 1.0)
    """Standard deviation along the minor axis divided by that along the major axis, whose direction is random."""
    noise: tuple[float, float] = (0.5, 2.0)
    """Standard deviation of white Gaussian noise of the low-resolution image, in 8-bit units."""
    jpeg: JpegConfig = JpegConfig(probability=0.0, quality=(80.0, 98.0))
    """Compression of the low-resolution image."""
    soft_target: bool = True
    """Whether the camera also blurs and sharpens the high-resolution target. If False, the target is the input."""

    def __post_init__(self) -> None:
        check_types(self, "camera.")
        _probabilities("camera", self, "probability")
        _ranges("camera", self, "sigma", "sharpening", "axis_ratio", "noise")
        for name in ("sigma", "sharpening", "noise"):
            if getattr(self, name)[0] < 0:
                raise ValueError(f"camera.{name} must not be negative, got {getattr(self, name)!r}")
        if not 0 < self.axis_ratio[0] <= self.axis_ratio[1] <= 1:
            raise ValueError(f"camera.axis_ratio must lie in (0, 1], got {self.axis_ratio!r}")


SECOND_STAGE = StageConfig(
    blur=BlurConfig(probability=0.8, sigma=(0.2, 1.5)),
    resize=ResizeConfig(up=0.3, down=0.4, keep=0.3, factor=(0.3, 1.2)),
    noise=NoiseConfig(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    jpeg=JpegConfig(probability=0.0),
)
"""Real-ESRGAN's second stage. Its JPEG is that of `FinalConfig`."""


@dataclass(frozen=True)
class DegradationConfig:
    """The second-order pipeline; the defaults are Real-ESRGAN's."""

    first: StageConfig = StageConfig()
    second: StageConfig = SECOND_STAGE
    """Its resize factors are relative to the low-resolution size."""
    final: FinalConfig = FinalConfig()
    spatial: SpatialConfig = SpatialConfig()
    strength: tuple[float, float] = (1.0, 1.0)
    """Range of the strength, a factor drawn for every image. It multiplies the standard deviations, the distance of the
    JPEG quality from 100, the logarithm of the resize factors, and the weight of a sinc filter. 1 is the published
    pipeline, 0 only resizes."""
    full_strength: float = 0.0
    """Probability that an image's strength is the upper end of that range instead, so that a network that is trained
    with all strengths sees the published pipeline often enough."""
    single_operation: float = 0.0
    """Probability that only one operation is applied, that of `single`, drawn for a group of images. Nearly every
    operation of the whole pipeline smooths, so a network would otherwise rarely see noise on a sharp image."""
    single: SingleConfig = SingleConfig()
    camera: CameraConfig = CameraConfig()
    """Degradation by a camera. It is drawn before the choice of a single operation."""

    def __post_init__(self) -> None:
        check_types(self, "degradation.")
        _ranges("degradation", self, "strength")
        _probabilities("degradation", self, "full_strength", "single_operation")
        if not 0 <= self.strength[0] <= self.strength[1] <= 1:
            raise ValueError(f"degradation.strength must lie in [0, 1], got {self.strength!r}")


def load_degradation_config(path: str | Path) -> DegradationConfig:
    """Read the table ``[degradation]`` of a TOML file, which may be a training configuration.

    Args:
        path: The file. Without the table the defaults are returned.

    Raises:
        OSError: The file cannot be read.
        TypeError: A value has the wrong type.
        ValueError: The file is not TOML, it has a table that no training configuration has, or a value is not accepted.
    """
    with open(path, "rb") as file:
        tables = tomllib.load(file)
    others = sorted({*CONFIGURATION_TABLES} - {"degradation"})
    if unknown := sorted(set(tables) - set(CONFIGURATION_TABLES)):
        raise ValueError(f"unknown tables {unknown}; [degradation] is read, and {others} are ignored")
    return from_table(DegradationConfig, "degradation", tables.get("degradation", {}))
