"""What the features of one network say of the factors of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from savl.analysis.collect import TableFeatures
from savl.analysis.factors import SCENE, numbers
from savl.analysis.features import Features
from savl.evaluation.intervals import Correlation, spearman
from savl.evaluation.probe import ProbeResult, linear_probe

FEWEST_OF_A_CLASS = 4
"""Images; classes with fewer are not probed: they would hardly be in both splits."""
FEWEST_SCENES = 4
"""Scenes below which none is held out."""

Values = Sequence[str | None]


@dataclass(frozen=True)
class FactorEvidence:
    """One factor of a table."""

    name: str
    classes: dict[str, int]
    """Those that were probed, with how many images each has."""
    left_out: int
    """Images that were not probed: without a value, or of a class that has too few."""
    held_out: str | None
    """``scene`` where no scene is in both splits."""
    probe: ProbeResult | None
    not_probed: str | None
    """Why there is no probe."""
    severity: Correlation | None
    """Of the severity of images with the factor."""
    not_correlated: str | None
    """Why there is none."""


@dataclass(frozen=True)
class TableEvidence:
    """All factors of a table."""

    name: str
    images: int
    factors: tuple[FactorEvidence, ...]


def table_evidence(data: TableFeatures, model: int, *, repeats: int, seed: int) -> TableEvidence:
    """Probe every factor of a table, and correlate those that are numbers with the severity of the images.

    Args:
        data: The images.
        model: Which network's features.
        repeats: Of the probes.
        seed: Of probes and bootstrap.
    """
    features = data.features[model]
    factors = tuple(
        factor_evidence(
            name, values, None if name == SCENE else data.table.scenes, features, repeats=repeats, seed=seed
        )
        for name, values in data.table.factors.items()
    )
    return TableEvidence(data.table.name, len(data.table.paths), factors)


def factor_evidence(
    name: str, values: Values, scenes: Values | None, features: Features, *, repeats: int, seed: int
) -> FactorEvidence:
    """Probe one factor, and correlate it with the severity if it is a number.

    Args:
        name: What it is called.
        values: One an image, None where it is not known.
        scenes: What the images show, if that is known: whole scenes are then held out of the probe's training.
        features: Of the images.
        repeats: Of the probe.
        seed: Of probe and bootstrap.
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
        except ValueError as error:  # classes and scenes that cannot be split so that all classes are on both sides
            rows, not_probed = [], f"cannot be split: {error}"
    severity, not_correlated = _correlation(name, values, scenes, features, seed)
    return FactorEvidence(
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
    """The images that a probe takes, or why there is none."""
    rows = [
        row for row, value in enumerate(values) if value is not None and (groups is None or groups[row] is not None)
    ]
    places: dict[str | None, list[int]] = {}
    for row in rows:
        places.setdefault(values[row], []).append(row)
    if len(places) < 2:
        return [], f"has one class only: {next(iter(places))}" if places else "is not known of any image"

    def enough(members: list[int]) -> bool:
        scenes = len(members) if groups is None else len({groups[row] for row in members})
        return len(members) >= FEWEST_OF_A_CLASS and scenes >= 2

    fine = {value for value, members in places.items() if enough(members)}
    if len(fine) < 2:
        needed = f"{FEWEST_OF_A_CLASS} images" + ("" if groups is None else " in at least 2 scenes")
        return [], f"{len(fine)} of its {len(places)} classes have {needed}, two are needed"
    return [row for row in rows if values[row] in fine], None


def _correlation(
    name: str, values: Values, scenes: Values | None, features: Features, seed: int
) -> tuple[Correlation | None, str | None]:
    amounts, known = known_numbers(name, values)
    if not len(known):
        return None, "is no number"
    severity = features.severity
    if severity is None:
        return None, "a deterministic code has no severity"
    if len(np.unique(amounts)) < 3:
        return None, "has fewer than three different numbers"
    if severity[known].min() == severity[known].max():
        return None, "the severity is the same for all images"
    # An image of an unknown scene stands for itself.
    groups = None if scenes is None else [scenes[row] or int(row) for row in known]
    return spearman(severity[known], amounts, groups=groups, seed=seed), None


def known_numbers(name: str, values: Values) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """A factor as numbers ``(m,)`` and the rows that have one ``(m,)``; none where it is no number, or the scene."""
    found = None if name == SCENE else numbers(values)
    amounts = np.asarray([] if found is None else found, dtype=np.float64)
    rows = np.flatnonzero(~np.isnan(amounts))
    return amounts[rows], rows
