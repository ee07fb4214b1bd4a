"""Linear probes: how well a linear classifier predicts a factor from a representation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from savl.evaluation.intervals import AnalysisUnavailable, Interval
from savl.evaluation.samples import Samples, as_features, as_labels, check_lengths

_TRIES = 100
"""Largest number of draws per split with groups."""

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a linear classifier on held-out samples."""

    accuracy: Interval
    """Share of held-out samples that are classified correctly, in [0, 1]."""
    chance: float
    """1 / classes: the accuracy of guessing if classes are equally common."""
    majority: float
    """Accuracy of always predicting the most common class of the test samples, mean over repeats; at least `chance`.
    Compare with this value if classes are not equally common."""
    classes: int
    """Number of classes."""
    fit_samples: int
    """Number of samples that are fitted on, mean over repeats, rounded (groups differ in size)."""
    test_samples: int
    """Number of held-out samples, mean over repeats, rounded."""
    groups: int | None
    """Number of groups; None if samples were split individually."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "accuracy": self.accuracy.to_json()}


def linear_probe(
    features: Samples,
    labels: Samples,
    *,
    groups: Samples | None = None,
    repeats: int = 5,
    test_share: float = 0.3,
    seed: int = 0,
) -> ProbeResult:
    """Fit a multinomial logistic regression on standardised features and test it on held-out samples.

    Each repeat draws a new random split in which every class is on both sides. Without groups the split is stratified:
    classes have the same proportions on both sides as far as possible. With groups, whole groups are held out, so
    features that identify the group do not help to predict the class. Features are standardised by the samples that
    are fitted on; the penalty is scikit-learn's default (C = 1).

    Args:
        features: ``(n, d)`` finite numbers, one row per sample.
        labels: ``(n,)`` strings or numbers; equal labels form a class.
        groups: ``(n,)`` strings or numbers, such as scenes; None to split samples individually.
        repeats: Number of splits.
        test_share: Share of the samples, or of the groups, that is held out; in (0, 1).
        seed: Seed of the splits.

    Returns:
        Accuracy with an interval over repeats (widened because they share samples), and the accuracy of chance.

    Raises:
        ValueError: The features are not finite, lengths differ, there are fewer than two classes, a class has a single
            sample or a single group, there are too few groups or samples to have every class on both sides, or a
            setting is out of range.
        AnalysisUnavailable: scikit-learn is not installed.
    """
    rows = as_features(features, "features").numpy()
    numbers, names = as_labels(labels, "labels")
    check_lengths(("features", len(rows)), ("labels", len(numbers)))
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}")
    if len(names) < 2:
        raise ValueError(f"labels must have at least two classes, got only {names[0]!r}")
    classes = numbers.numpy()
    for number, count in enumerate(np.bincount(classes)):
        if count < 2:
            raise ValueError(f"labels must have two samples of a class or more, got one of {names[number]!r}")
    if groups is None:
        count = None
        splits = _stratified(classes, repeats, test_share, seed)
    else:
        members, group_names = as_labels(groups, "groups")
        check_lengths(("features", len(rows)), ("groups", len(members)))
        count = len(group_names)
        splits = _grouped(classes, names, members.numpy(), group_names, repeats, test_share, seed)
    accuracies, majorities, sizes = [], [], []
    for fit, test in splits:
        accuracies.append(_accuracy(rows, classes, fit, test))
        majorities.append(np.bincount(classes[test]).max() / len(test))
        sizes.append(len(test))
    size = math.fsum(sizes) / repeats
    return ProbeResult(
        accuracy=Interval.of(accuracies, held_out=size / len(rows)),
        chance=1 / len(names),
        majority=math.fsum(majorities) / repeats,
        classes=len(names),
        fit_samples=round(len(rows) - size),
        test_samples=round(size),
        groups=count,
    )


def _accuracy(features: np.ndarray[Any, Any], classes: Rows, fit: Rows, test: Rows) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise AnalysisUnavailable("probing", "scikit-learn", error) from error
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(classifier.fit(features[fit], classes[fit]).score(features[test], classes[test]))


def _stratified(classes: Rows, repeats: int, test_share: float, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Hold out the given share of every class, rounded; at least one sample stays on either side.

    scikit-learn's StratifiedShuffleSplit does not guarantee that rare classes are on both sides.
    """
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(classes == number) for number in range(classes.max() + 1)]
    for _ in range(repeats):
        sides: tuple[list[Rows], list[Rows]] = [], []
        for each in members:
            drawn = generator.permutation(each)
            left_out = min(max(round(test_share * len(each)), 1), len(each) - 1)
            sides[0].append(drawn[left_out:])
            sides[1].append(drawn[:left_out])
        yield np.concatenate(sides[0]), np.concatenate(sides[1])


def _grouped(
    classes: Rows,
    names: list[Any],
    members: Rows,
    group_names: list[Any],
    repeats: int,
    test_share: float,
    seed: int,
) -> Iterator[tuple[Rows, Rows]]:
    """Draw groups until every class is on both sides."""
    count = len(group_names)
    if count < 2:
        raise ValueError(f"groups must have at least two groups, got only {group_names[0]!r}")
    present = np.zeros((count, len(names)), dtype=bool)
    present[members, classes] = True
    for number in np.flatnonzero(present.sum(axis=0) < 2):
        only = group_names[int(present[:, number].argmax())]
        raise ValueError(
            f"groups must be two or more for every class, so that it is on both sides; {names[number]!r} is in "
            f"{only!r} only"
        )
    left_out = min(max(round(test_share * count), 1), count - 1)
    generator = np.random.default_rng(seed)
    found = 0
    for _ in range(_TRIES * repeats):
        drawn = generator.permutation(count)
        test, fit = drawn[:left_out], drawn[left_out:]
        if present[test].any(axis=0).all() and present[fit].any(axis=0).all():
            yield np.flatnonzero(np.isin(members, fit)), np.flatnonzero(np.isin(members, test))
            found += 1
            if found == repeats:
                return
    raise ValueError(
        f"groups must leave every class on both sides of {repeats} splits; of {_TRIES * repeats} draws of {left_out} "
        f"out of {count} groups, {found} did; change test_share, or leave out classes that are in few groups"
    )
