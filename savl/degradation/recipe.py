"""Recipes: the random parameters of a degradation, drawn for a group of images before it is applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from savl.degradation.blur_kernels import (
    BlurKernel,
    GaussianBlurKernel,
    SincBlurKernel,
    draw_blur_kernel,
    draw_sinc_blur_kernel,
)
from savl.degradation.config import (
    METHODS,
    BlurConfig,
    CameraConfig,
    DegradationConfig,
    JpegConfig,
    NoiseConfig,
    ResizeConfig,
    StageConfig,
    normalised,
)

T = TypeVar("T")

POISSON_DEVIATION = 255.0 * math.sqrt(0.5 / 256.0)
"""Standard deviation in 8-bit units of Poisson noise of amount 1 at medium gray, for images with 256 photons."""


@dataclass(frozen=True)
class Resize:
    """A change of size."""

    factor: float
    """New size divided by the high-resolution size in the first stage, by the low-resolution size in the second."""
    method: str
    """One of `savl.degradation.config.METHODS`."""


@dataclass(frozen=True)
class Noise:
    """Noise of one image."""

    kind: Literal["gaussian", "poisson"]
    amount: float
    """Standard deviation in 8-bit units for Gaussian noise; factor on the shot noise for Poisson noise."""
    gray: bool
    """Whether all channels have the same noise."""

    @property
    def deviation(self) -> float:
        """Standard deviation in 8-bit units, that of Poisson noise at medium gray."""
        return self.amount if self.kind == "gaussian" else POISSON_DEVIATION * self.amount


@dataclass(frozen=True)
class Camera:
    """Blur and sharpening by one camera, in pixels of the image."""

    sigma: tuple[float, float]
    """Standard deviations of the Gaussian point spread function along its axes."""
    rotation: float
    """Angle of the first axis, in radians."""
    sharpening: float
    """Amount of the unsharp mask that follows."""


@dataclass(frozen=True)
class Stage:
    """Blur, resize, noise and JPEG. The tuples have one entry per image, and None for images without the operation."""

    blur: tuple[BlurKernel | None, ...]
    resize: Resize
    noise: tuple[Noise | None, ...]
    quality: tuple[float | None, ...]
    """JPEG quality, 1 to 100."""

    def repeated(self, times: int) -> Stage:
        """Return the stage for a group in which each image is repeated ``times`` times in a row."""
        return replace(
            self, blur=_each(self.blur, times), noise=_each(self.noise, times), quality=_each(self.quality, times)
        )


@dataclass(frozen=True)
class Recipe:
    """All random parameters of the degradation of a group of images, except the noise values themselves."""

    first: Stage | None
    second: Stage | None
    method: str
    """Method that resizes the group to the low-resolution size, one of `savl.degradation.config.METHODS`."""
    sinc: tuple[SincBlurKernel | None, ...]
    """The final sinc filter of each image, or None."""
    quality: tuple[float | None, ...]
    """The final JPEG quality of each image, or None."""
    jpeg_last: tuple[bool, ...]
    """Whether the final JPEG comes after the sinc filter."""
    strength: tuple[float, ...]
    """Strength of each image; the parameters above are already weakened by it."""
    spatial: tuple[bool, ...]
    """Whether each image is degraded through a mask."""
    single: bool = False
    """Whether only one operation is applied (`savl.degradation.config.SingleConfig`): the images are first reduced to
    the low-resolution size. The second stage and the final JPEG then apply this operation and no other."""
    camera: tuple[Camera, ...] | None = None
    """The camera of each image, which blurs, samples and sharpens it before the noise of the second stage and the final
    JPEG; None for groups that are degraded in another way (`savl.degradation.config.CameraConfig`)."""

    def amounts(self) -> NDArray[np.float32]:
        """Return how much blur, noise and JPEG each image has, which is known for a single operation.

        Returns:
            ``(B, 3)``: the geometric mean of the blur's two standard deviations in low-resolution pixels, the standard
            deviation of the noise in 8-bit units, and 100 minus the JPEG quality; 0 where an operation is not
            applied. NaN for images that are degraded by the whole pipeline. For a camera, the standard deviation of
            its point spread function, that of the noise, and NaN.
        """
        if self.camera is not None and self.second is not None:
            noises = [0.0 if noise is None else noise.deviation for noise in self.second.noise]
            sigmas = [math.sqrt(camera.sigma[0] * camera.sigma[1]) for camera in self.camera]
            return np.array([(*known, math.nan) for known in zip(sigmas, noises, strict=True)], np.float32)
        if not self.single or self.second is None:
            return np.full((len(self.strength), 3), np.nan, np.float32)
        rows = [
            (
                math.sqrt(blur.sigma[0] * blur.sigma[1]) if isinstance(blur, GaussianBlurKernel) else 0.0,
                0.0 if noise is None else noise.deviation,
                0.0 if quality is None else 100.0 - quality,
            )
            for blur, noise, quality in zip(self.second.blur, self.second.noise, self.quality, strict=True)
        ]
        return np.array(rows, np.float32)

    def repeated(self, times: int) -> Recipe:
        """Return the recipe for a group in which each image is repeated ``times`` times in a row."""
        return replace(
            self,
            first=None if self.first is None else self.first.repeated(times),
            second=None if self.second is None else self.second.repeated(times),
            sinc=_each(self.sinc, times),
            quality=_each(self.quality, times),
            jpeg_last=_each(self.jpeg_last, times),
            strength=_each(self.strength, times),
            spatial=_each(self.spatial, times),
            camera=None if self.camera is None else _each(self.camera, times),
        )


def draw_recipe(config: DegradationConfig, count: int, random: np.random.Generator) -> Recipe:
    """Draw a recipe for a group of ``count`` images.

    All images of a group are resized in the same way, because they must have one size to be processed together. They
    also share which stages take place, and whether only a single operation does. Everything else is drawn for each
    image.
    """
    # At a probability of 0 no number is drawn, so that a seed gives the same recipe as without the setting.
    if config.camera.probability > 0 and random.random() < config.camera.probability:
        return _camera_recipe(config.camera, count, random)
    if config.single_operation > 0 and random.random() < config.single_operation:
        return _single(config, count, random)
    strength = [_strength(config, random) for _ in range(count)]
    first = _stage(config.first, strength, random)
    second = _stage(config.second, strength, random)
    final = config.final
    method = str(random.choice(METHODS))
    sinc = tuple(
        draw_sinc_blur_kernel(config.second.blur, random).weakened(each)
        if random.random() < final.sinc_probability
        else None
        for each in strength
    )
    quality = tuple(_quality(final.jpeg, each, random) for each in strength)
    jpeg_last = tuple(bool(random.random() < final.jpeg_last) for _ in strength)
    spatial = tuple(bool(random.random() < config.spatial.probability) for _ in strength)
    return Recipe(first, second, method, sinc, quality, jpeg_last, tuple(strength), spatial)


def _single(config: DegradationConfig, count: int, random: np.random.Generator) -> Recipe:
    """Draw a recipe of one operation, the same for all images of the group."""
    single = config.single
    operation = str(random.choice(single.operations))
    strength = [_strength(config, random) for _ in range(count)]
    nothing = (None,) * count
    blur = tuple(_blur(single.blur, each, random) for each in strength) if operation == "blur" else nothing
    noise = tuple(_noise(single.noise, each, random) for each in strength) if operation == "noise" else nothing
    quality = tuple(_quality(single.jpeg, each, random) for each in strength) if operation == "jpeg" else nothing
    spatial = tuple(bool(random.random() < config.spatial.probability) for _ in strength)
    stage = Stage(blur, Resize(1.0, METHODS[0]), noise, nothing)
    return Recipe(None, stage, METHODS[0], nothing, quality, (True,) * count, tuple(strength), spatial, single=True)


def _camera_recipe(config: CameraConfig, count: int, random: np.random.Generator) -> Recipe:
    """Draw a camera for each image. Strength and masks do not apply to cameras."""
    cameras, noise, quality = [], [], []
    for _ in range(count):
        quantile, root = random.random(), math.sqrt(random.uniform(*config.axis_ratio))
        sigma, sharpening = (low + quantile * (high - low) for low, high in (config.sigma, config.sharpening))
        cameras.append(Camera((sigma / root, sigma * root), float(random.uniform(0.0, math.pi)), sharpening))
        noise.append(Noise("gaussian", float(random.uniform(*config.noise)), False))
        quality.append(_quality(config.jpeg, 1.0, random))
    nothing = (None,) * count
    stage = Stage(nothing, Resize(1.0, METHODS[0]), tuple(noise), nothing)
    return Recipe(
        first=None,
        second=stage,
        method=METHODS[0],
        sinc=nothing,
        quality=tuple(quality),
        jpeg_last=(True,) * count,
        strength=(1.0,) * count,
        spatial=(False,) * count,
        camera=tuple(cameras),
    )


def _each(values: tuple[T, ...], times: int) -> tuple[T, ...]:
    return tuple(value for value in values for _ in range(times))


def _strength(config: DegradationConfig, random: np.random.Generator) -> float:
    if config.full_strength > 0 and random.random() < config.full_strength:
        return config.strength[1]
    return float(random.uniform(*config.strength))


def _stage(config: StageConfig, strength: Sequence[float], random: np.random.Generator) -> Stage | None:
    if random.random() >= config.probability:
        return None
    blur = tuple(_blur(config.blur, each, random) for each in strength)
    resize = _resize(config.resize, sum(strength) / len(strength), random)
    noise = tuple(_noise(config.noise, each, random) for each in strength)
    quality = tuple(_quality(config.jpeg, each, random) for each in strength)
    return Stage(blur, resize, noise, quality)


def _blur(config: BlurConfig, strength: float, random: np.random.Generator) -> BlurKernel | None:
    if random.random() >= config.probability:
        return None
    return draw_blur_kernel(config, random).weakened(strength)


def _resize(config: ResizeConfig, strength: float, random: np.random.Generator) -> Resize:
    low, high = config.factor
    which = random.choice(3, p=normalised((config.up, config.down, config.keep)))
    factor = (random.uniform(1.0, high), random.uniform(low, 1.0), 1.0)[which]
    return Resize(float(factor) ** strength, str(random.choice(METHODS)))


def _noise(config: NoiseConfig, strength: float, random: np.random.Generator) -> Noise | None:
    if random.random() >= config.probability:
        return None
    gray = bool(random.random() < config.gray_probability)
    if random.random() < config.gaussian_probability:
        return Noise("gaussian", strength * random.uniform(*config.sigma), gray)
    return Noise("poisson", strength * random.uniform(*config.poisson_scale), gray)


def _quality(config: JpegConfig, strength: float, random: np.random.Generator) -> float | None:
    if random.random() >= config.probability:
        return None
    quality = 100.0 - strength * (100.0 - float(random.uniform(*config.quality)))
    # Even the best quality halves the resolution of the colour channels. A strength of 0 must not compress at all.
    return quality if strength > 0 else None
