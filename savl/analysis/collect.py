"""Read images, one at a time, and keep the statistics of their fields: the long part of an analysis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from savl.analysis.content import Content, describe, principal_content
from savl.analysis.factorial import VARIATIONS, Variation, read_scene, spread, vary
from savl.analysis.factors import FactorTable
from savl.analysis.features import Features, measure_fields
from savl.images.folder import read_rgb
from savl.images.read import read_size
from savl.network import SAVL

FEWEST_CROPS = 4
"""So that there are 20 images of five levels, which the estimators of information need."""

OnProgress = Callable[[str, int, int], None]
"""Told what is done, how much of it is finished, and how much there is in all."""


@dataclass(frozen=True, eq=False)
class VariedFeatures:
    """All scenes at all levels of one degradation: n images."""

    variation: Variation
    scene: NDArray[np.int64]
    """``(n,)`` which photograph."""
    crop: NDArray[np.int64]
    """``(n,)`` which of all clean crops; images of one crop differ in nothing but the level."""
    level: NDArray[np.int64]
    """``(n,)``."""
    features: tuple[Features, ...]
    """Of every network."""

    @property
    def amounts(self) -> NDArray[np.float64]:
        """``(n,)`` how strong the degradation is, in the unit of the variation."""
        return np.asarray(self.variation.amounts)[self.level]


@dataclass(frozen=True, eq=False)
class FactorialFeatures:
    """What photographs gave."""

    paths: tuple[Path, ...]
    """Files of the photographs, each a scene."""
    too_small: tuple[Path, ...]
    """Those that were left out."""
    content: Content
    """A row for every clean crop."""
    varied: tuple[VariedFeatures, ...]
    """In the order of `VARIATIONS`, noise first."""
    swept: Tensor
    """``(K, 3, side, side)``: clean crops of the first scene."""


@dataclass(frozen=True, eq=False)
class TableFeatures:
    """What a table of images gave."""

    table: FactorTable
    features: tuple[Features, ...]
    """Of every network."""


def collect_factorial(
    models: Sequence[SAVL],
    paths: Sequence[Path],
    *,
    scenes: int,
    crops: int,
    side: int,
    components: int,
    seed: int,
    on_progress: OnProgress,
    variations: Sequence[Variation] = VARIATIONS,
) -> FactorialFeatures:
    """Make factorial data of photographs and measure its fields.

    Args:
        models: Networks with a field and of one scale.
        paths: High-resolution images.
        scenes: So many of those that are large enough at most, evenly spaced.
        crops: Of every photograph, at most.
        side: Of the crops, low-resolution pixels.
        components: Numbers that describe a crop's content.
        seed: Of places and noise.
        on_progress: Called after every photograph.
        variations: What is done to the photographs, `VARIATIONS` or the first of them.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: Fewer than two photographs are large enough, or they give too few crops.
        DegradationUnavailable: kornia is not installed.
    """
    scale = models[0].config.scale
    files: list[Path] = []
    too_small = [path for path in paths if (sides := read_size(path)) and min(sides) < side * scale]
    small = set(too_small)
    chosen = spread([path for path in paths if path not in small], scenes)
    descriptions: list[Tensor] = []
    varied = [_Growing(variation, models) for variation in variations]
    swept: Tensor | None = None
    on_progress("photographs", 0, len(chosen))
    for place, path in enumerate(chosen):
        z = read_scene(path, crops=crops, side=side, scale=scale, seed=(seed, place))
        if z is None:
            too_small.append(path)
        else:
            for which, growing in enumerate(varied):
                growing.add(len(files), z, (seed, place, which))
            files.append(path)
            descriptions.append(describe(z))
            swept = z if swept is None else swept
        on_progress("photographs", place + 1, len(chosen))
    if len(files) < 2 or varied[0].crops < FEWEST_CROPS or swept is None:
        raise ValueError(
            f"hr: at least 2 photographs, and {FEWEST_CROPS} crops of {side * scale}×{side * scale} pixels in all, are "
            f"needed; got {len(files)} and {varied[0].crops} from {len(paths)} images"
        )
    return FactorialFeatures(
        tuple(files),
        tuple(too_small),
        principal_content(descriptions, components),
        tuple(growing.finished() for growing in varied),
        swept,
    )


class _Growing:
    """The features of one degradation, scene by scene."""

    def __init__(self, variation: Variation, models: Sequence[SAVL]) -> None:
        self.variation = variation
        self.models = models
        self.features: list[list[Features]] = [[] for _ in models]
        self.rows: list[NDArray[np.int64]] = []
        """Scene, crop and level, each ``(3, images)``."""
        self.crops = 0

    def add(self, scene: int, z: Tensor, seed: Sequence[int]) -> None:
        """Vary the clean crops ``(K, 3, h, w)`` of a scene and measure."""
        y = vary(z, self.variation, seed)
        for model, collected in zip(self.models, self.features, strict=True):
            collected.append(measure_fields(model, y)[0])
        count, levels = z.shape[0], len(self.variation.amounts)
        crop = np.tile(np.arange(self.crops, self.crops + count), levels)
        level = np.repeat(np.arange(levels), count)
        self.rows.append(np.stack((np.full(count * levels, scene), crop, level)))
        self.crops += count

    def finished(self) -> VariedFeatures:
        """All of them."""
        scene, crop, level = np.concatenate(self.rows, axis=1)
        return VariedFeatures(self.variation, scene, crop, level, tuple(map(Features.join, self.features)))


def collect_table(models: Sequence[SAVL], table: FactorTable, on_progress: OnProgress) -> TableFeatures:
    """Measure the fields of the images of a table, whole, as they are.

    Args:
        models: Networks with a field.
        table: The images.
        on_progress: Called after every image.

    Raises:
        ImageFileError: An image cannot be read.
    """
    parts: list[list[Features]] = [[] for _ in models]
    on_progress(table.name, 0, len(table.paths))
    for place, path in enumerate(table.paths):
        y = read_rgb(path)[None]
        for model, collected in zip(models, parts, strict=True):
            collected.append(measure_fields(model, y)[0])
        on_progress(table.name, place + 1, len(table.paths))
    return TableFeatures(table, tuple(Features.join(collected) for collected in parts))
