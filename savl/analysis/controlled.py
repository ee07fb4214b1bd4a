"""Controlled images: every crop of every scene at every level of one degradation, and the features of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.analysis.features import ContentComponents, Features, describe_content, measure_fields, principal_components
from savl.analysis.photographs import OnProgress, evenly_spaced, read_crops
from savl.degradation import Degradation, DegradationConfig
from savl.degradation.blur_kernels import BlurKernel, GaussianBlurKernel
from savl.degradation.recipe import Noise, Recipe, Resize, Stage
from savl.images.read import read_size
from savl.network import SAVL

_BLUR_KERNEL_SIDE = 21
"""Side of the blur kernels in pixels. It is the largest of the pipeline, so that a wide Gaussian is not truncated."""
FEWEST_CROPS = 4
"""Smallest number of crops: at five levels they make 20 images, as many as the estimators of information need."""


@dataclass(frozen=True)
class SingleDegradation:
    """One kind of degradation and its levels."""

    name: str
    """``noise``, ``blur`` or ``jpeg``."""
    title: str
    """Name of the probe that predicts the level."""
    unit: str
    """Unit of the labels, for the report."""
    amounts: tuple[float, ...]
    """Strength at every level, ascending; 0 leaves the image unchanged. Standard deviation of the noise in 8-bit units,
    of the blur in low-resolution pixels; for JPEG 100 minus the quality."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The levels as the report shows them; JPEG levels by their quality."""
        if self.name == "jpeg":
            return tuple(f"{100 - amount:g}" if amount else "none" for amount in self.amounts)
        return tuple(f"{amount:g}" for amount in self.amounts)

    def with_amounts(self, amounts: Sequence[float]) -> SingleDegradation:
        """Return the same degradation with other levels."""
        return SingleDegradation(self.name, self.title, self.unit, tuple(amounts))


NOISE = SingleDegradation("noise", "Noise-Level", "σ of Gaussian noise, 8-bit units", (0.0, 5.0, 10.0, 20.0, 30.0))
BLUR = SingleDegradation(
    "blur", "Blur-Level", "σ of Gaussian blur, low-resolution pixels", (0.0, 0.5, 1.0, 1.5, 2.0)
)  # fmt: skip
JPEG = SingleDegradation("jpeg", "JPEG-Level", "JPEG quality", (0.0, 10.0, 30.0, 50.0, 70.0))
SINGLE_DEGRADATIONS = (NOISE, BLUR, JPEG)


def degrade_at_every_level(z: Tensor, degradation: SingleDegradation, seed: Sequence[int]) -> Tensor:
    """Apply one degradation at every level to clean low-resolution crops, with the operations of the pipeline.

    Args:
        z: ``(K, 3, h, w)`` float32 in [0, 1], clean.
        degradation: The degradation and its L levels.
        seed: Numbers ≥ 0 that determine the noise; each crop and level has noise of its own.

    Returns:
        ``(L·K, 3, h, w)`` float32, multiples of 1/255: all crops at the first level, then all at the next, and so on.

    Raises:
        DegradationUnavailable: kornia is not installed.
    """
    amounts = [amount for amount in degradation.amounts for _ in range(z.shape[0])]
    blur: list[BlurKernel | None] = [None] * len(amounts)
    noise: list[Noise | None] = [None] * len(amounts)
    quality: list[float | None] = [None] * len(amounts)
    for index, amount in enumerate(amounts):
        if amount == 0:
            continue
        if degradation.name == "noise":
            noise[index] = Noise("gaussian", amount, gray=False)
        elif degradation.name == "blur":
            blur[index] = GaussianBlurKernel("iso", _BLUR_KERNEL_SIDE, (amount, amount), 0.0, 1.0)
        else:
            quality[index] = 100.0 - amount
    stage = Stage(tuple(blur), Resize(1.0, "area"), tuple(noise), tuple(quality))
    nothing = (None,) * len(amounts)
    recipe = Recipe(
        stage, None, "area", nothing, nothing, (False,) * len(amounts), (1.0,) * len(amounts), (False,) * len(amounts)
    )
    drawn = int(np.random.default_rng(list(seed)).integers(2**63))
    generator = torch.Generator(z.device).manual_seed(drawn)
    copies = z.repeat(len(degradation.amounts), 1, 1, 1)
    return Degradation(DegradationConfig(), scale=1).apply(copies, recipe, None, generator)


@dataclass(frozen=True, eq=False)
class DegradedFeatures:
    """Features of all crops at all levels of one degradation, n images."""

    degradation: SingleDegradation
    scene: NDArray[np.int64]
    """``(n,)`` number of the photograph."""
    crop: NDArray[np.int64]
    """``(n,)`` number of the clean crop; images of one crop differ only in their level."""
    level: NDArray[np.int64]
    """``(n,)`` number of the level."""
    features: tuple[Features, ...]
    """Features of the n images, one entry per network."""

    @property
    def amounts(self) -> NDArray[np.float64]:
        """``(n,)`` strength of the degradation of each image, in the unit of `SingleDegradation.amounts`."""
        return np.asarray(self.degradation.amounts)[self.level]


@dataclass(frozen=True, eq=False)
class ControlledFeatures:
    """Features of photographs that were degraded at known levels."""

    paths: tuple[Path, ...]
    """Files of the photographs; each is a scene."""
    too_small: tuple[Path, ...]
    """Files that were left out because they are smaller than a crop."""
    content: ContentComponents
    """One row per clean crop."""
    degraded: tuple[DegradedFeatures, ...]
    """In the order of `SINGLE_DEGRADATIONS`, noise first."""
    first_scene: Tensor
    """``(K, 3, side, side)``: clean crops of the first scene."""


def collect_controlled(
    models: Sequence[SAVL],
    paths: Sequence[Path],
    *,
    scenes: int,
    crops: int,
    side: int,
    components: int,
    seed: int,
    on_progress: OnProgress,
    degradations: Sequence[SingleDegradation] = SINGLE_DEGRADATIONS,
) -> ControlledFeatures:
    """Degrade crops of photographs at every level and measure the fields of networks.

    Args:
        models: Networks with a field, all of one scale.
        paths: High-resolution images.
        scenes: Largest number of photographs that are used, evenly spaced among those that are large enough.
        crops: Largest number of crops per photograph.
        side: Side of a crop in low-resolution pixels.
        components: Number of principal components that describe the content of a crop.
        seed: Seed of positions and noise.
        on_progress: Called after every photograph.
        degradations: Degradations to apply: `SINGLE_DEGRADATIONS` or the first of them.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: Fewer than two photographs are large enough, or there are too few crops.
        DegradationUnavailable: kornia is not installed.
    """
    scale = models[0].config.scale
    too_small = [path for path in paths if (sides := read_size(path)) and min(sides) < side * scale]
    small = set(too_small)
    chosen = evenly_spaced([path for path in paths if path not in small], scenes)
    files: list[Path] = []
    counts: list[int] = []
    descriptors: list[Tensor] = []
    parts: list[list[list[Features]]] = [[[] for _ in models] for _ in degradations]
    first_scene: Tensor | None = None
    on_progress("photographs", 0, len(chosen))
    for place, path in enumerate(chosen):
        z = read_crops(path, crops=crops, side=side, scale=scale, seed=(seed, place))
        if z is None:
            too_small.append(path)
        else:
            for which, degradation in enumerate(degradations):
                y = degrade_at_every_level(z, degradation, (seed, place, which))
                for model, collected in zip(models, parts[which], strict=True):
                    collected.append(measure_fields(model, y)[0])
            files.append(path)
            counts.append(len(z))
            descriptors.append(describe_content(z))
            first_scene = z if first_scene is None else first_scene
        on_progress("photographs", place + 1, len(chosen))
    if len(files) < 2 or sum(counts) < FEWEST_CROPS or first_scene is None:
        raise ValueError(
            f"hr: at least 2 photographs, and {FEWEST_CROPS} crops of {side * scale}×{side * scale} pixels in all, are "
            f"needed; got {len(files)} and {sum(counts)} from {len(paths)} images"
        )
    degraded = tuple(
        DegradedFeatures(
            degradation, *_rows(counts, len(degradation.amounts)), tuple(Features.join(each) for each in by_model)
        )
        for degradation, by_model in zip(degradations, parts, strict=True)
    )
    content = principal_components(descriptors, components)
    return ControlledFeatures(tuple(files), tuple(too_small), content, degraded, first_scene)


def _rows(crops: Sequence[int], levels: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return scene, crop and level of every image, ``(n,)`` each, for the number of crops of every scene."""
    rows, first = [], 0
    for scene, count in enumerate(crops):
        crop = np.tile(np.arange(first, first + count), levels)
        rows.append(np.stack((np.full(count * levels, scene), crop, np.repeat(np.arange(levels), count))))
        first += count
    scenes, all_crops, level = np.concatenate(rows, axis=1)
    return scenes, all_crops, level
