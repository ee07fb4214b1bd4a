"""Results of one network on a table of images with known factors: probes and correlations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from savl.analysis.factor_table import SCENE, FactorTable, numbers
from savl.analysis.features import Features, measure_fields
from savl.analysis.photographs import OnProgress
from savl.evaluation.intervals import Correlation, spearman
from savl.evaluation.probe import ProbeResult, linear_probe
from savl.images.folder import read_rgb
from savl.network import SAVL

FEWEST_OF_A_CLASS = 4
"""Smallest number of images of a class that is probed; a smaller class would hardly be in both splits."""
FEWEST_SCENES = 4
"""Smallest number of scenes for which whole scenes are held out."""

Values = Sequence[str | None]


@dataclass(frozen=True, eq=False)
class TableFeatures:
    """Features of the images of a table."""

    table: FactorTable
    features: tuple[Features, ...]
    """Features of all images, one entry per network."""


def collect_table(models: Sequence[SAVL], table: FactorTable, on_progress: OnProgress) -> TableFeatures:
    """Measure the fields of the whole, unmodified images of a table.

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


@dataclass(frozen=True)
class FactorResult:
    """Results for one factor of a table."""

    name: str
    classes: dict[str, int]
    """Classes that were probed, with their numbers of images."""
    left_out: int
    """Number of images that were not probed, because they have no value or their class is too small."""
    held_out: str | None
    """``scene`` if no scene is in both splits, otherwise None."""
    probe: ProbeResult | None
    not_probed: str | None
    """Reason why there is no probe."""
    severity: Correlation | None
    """Correlation of the images' severity with the factor."""
    not_correlated: str | None
    """Reason why there is no correlation."""


@dataclass(frozen=True)
class TableResult:
    """Results for all factors of a table."""

    name: str
    images: int
    factors: tuple[FactorResult, ...]


def table_result(data: TableFeatures, model: int, *, repeats: int, seed: int) -> TableResult:
    """Probe every factor of a table, and correlate numeric factors with the severity of the images.

    Args:
        data: Features of the images.
        model: Position of the network in the features.
        repeats: Number of repeats of the probes.
        seed: Seed of probes and bootstrap.
    """
    features = data.features[model]
    factors = tuple(
        factor_result(name, values, None if name == SCENE else data.table.scenes, features, repeats=repeats, seed=seed)
        for name, values in data.table.factors.items()
    )
    return TableResult(data.table.name, len(data.table.paths), factors)


def factor_result(
    name: str, values: Values, scenes: Values | None, features: Features, *, repeats: int, seed: int
) -> FactorResult:
    """Probe one factor, and correlate it with the severity if it is numeric.

    Args:
        name: Name of the factor.
        values: One value per image, None if it is unknown.
        scenes: Scenes of the images, if they are known: whole scenes are then held out.
        features: Features of the images.
        repeats: Number of repeats of the probe.
        seed: Seed of probe and bootstrap.
    """
    groups = None if scenes is None or len(set(scenes) - {None}) < FEWEST_SCENES else scenes
    rows, not_probed = _probed_rows(values, groups)
    probe = None
    if not_probed is None:
        try:
            probe = linear_probe(
                features.mean[rows],
                [str(values[row]) for row in rows],
                groups=None if groups is None else [str(groups[row]) for row in rows],
                repeats=repeats,
                seed=seed,
            )
        except ValueError as error:  # no split of the scenes has every class on both sides
            rows, not_probed = [], f"cannot be split: {error}"
    severity, not_correlated = _correlation(name, values, scenes, features, seed)
    return FactorResult(
        name,
        dict(sorted(Counter(str(values[row]) for row in rows).items())),
        len(values) - len(rows),
        None if groups is None or probe is None else SCENE,
        probe,
        not_probed,
        severity,
        not_correlated,
    )


def _probed_rows(values: Values, groups: Values | None) -> tuple[list[int], str | None]:
    """Return the rows of the images that are probed, or the reason why there are none."""
    rows = [
        row for row, value in enumerate(values) if value is not None and (groups is None or groups[row] is not None)
    ]
    places: dict[str | None, list[int]] = {}
    for row in rows:
        places.setdefault(values[row], []).append(row)
    if len(places) < 2:
        return [], f"has one class only: {next(iter(places))}" if places else "is not known for any image"

    def enough(members: list[int]) -> bool:
        scenes = len(members) if groups is None else len({groups[row] for row in members})
        return len(members) >= FEWEST_OF_A_CLASS and scenes >= 2

    large = {value for value, members in places.items() if enough(members)}
    if len(large) < 2:
        needed = f"{FEWEST_OF_A_CLASS} images" + ("" if groups is None else " in 2 scenes")
        return [], f"{len(large)} of its {len(places)} classes have at least {needed}; 2 are needed"
    return [row for row in rows if values[row] in large], None


def _correlation(
    name: str, values: Values, scenes: Values | None, features: Features, seed: int
) -> tuple[Correlation | None, str | None]:
    """Return the correlation of a factor with the severity, or the reason why there is none."""
    amounts, known = known_numbers(name, values)
    if not len(known):
        return None, "is not numeric"
    severity = features.severity
    if severity is None:
        return None, "a deterministic code has no severity"
    if len(np.unique(amounts)) < 3:
        return None, "has fewer than three different numbers"
    if severity[known].min() == severity[known].max():
        return None, "the severity is the same for all images"
    # An image of an unknown scene is a group of its own.
    groups = None if scenes is None else [scenes[row] or int(row) for row in known]
    return spearman(severity[known], amounts, groups=groups, seed=seed), None


def known_numbers(name: str, values: Values) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return the numbers ``(m,)`` of a factor and their rows ``(m,)``; empty for the scene and for other names."""
    found = None if name == SCENE else numbers(values)
    amounts = np.asarray([] if found is None else found, dtype=np.float64)
    rows = np.flatnonzero(~np.isnan(amounts))
    return amounts[rows], rows
