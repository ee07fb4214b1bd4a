"""Spearman's rank correlation of two lists, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from savl.evaluation.intervals import CONFIDENCE
from savl.evaluation.unavailable import AnalysisUnavailable

FEWEST_RESAMPLED = 5
"""Images, or groups, below which a bootstrap would be far too sure of itself."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's coefficient, with the 95 % interval of a percentile bootstrap over images or over their groups."""

    value: float
    low: float
    """-1 of fewer than `FEWEST_RESAMPLED` images, which say nothing about their spread."""
    high: float
    """Likewise 1."""
    images: int


def spearman(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[object] | NDArray[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Rank correlation in [-1, 1]; equal values share their mean rank.

    Args:
        a: ``(n,)`` finite numbers, n at least 3.
        b: Likewise.
        groups: ``(n,)``: of images that belong together, scenes say, it is groups that are resampled, if there are
            `FEWEST_RESAMPLED` of them. Otherwise it is images, and the interval is for these groups alone.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: Fewer than three pairs, other shapes, or one of the lists is constant.
        AnalysisUnavailable: scipy is not installed.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 3:
        raise ValueError(f"a and b must both be (n,), n at least 3, got {first.shape} and {second.shape}")
    value = _coefficient(first, second)
    if value is None:
        raise ValueError("a and b must vary, got one that is constant")
    if len(first) < FEWEST_RESAMPLED:
        return Correlation(value, -1.0, 1.0, len(first))
    units = _members(range(len(first)) if groups is None else groups)
    if len(units) < FEWEST_RESAMPLED:
        units = _members(range(len(first)))
    random = np.random.default_rng(seed)
    drawn = (
        np.concatenate([units[unit] for unit in random.integers(0, len(units), len(units))]) for _ in range(resamples)
    )
    # A resample in which one of the two is constant has no coefficient.
    resampled = [each for rows in drawn if (each := _coefficient(first[rows], second[rows])) is not None]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail)).tolist() if resampled else (-1.0, 1.0)
    return Correlation(value, low, high, len(first))


def _members(groups: Sequence[object] | NDArray[Any]) -> list[NDArray[np.intp]]:
    """The rows of every group."""
    rows: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.asarray(each) for each in rows.values()]


def _coefficient(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise AnalysisUnavailable("a rank correlation", "scipy", error) from error
    if a.min() == a.max() or b.min() == b.max():
        return None
    return float(spearmanr(a, b).statistic)
