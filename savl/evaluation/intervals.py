"""Confidence intervals of repeated measurements and of rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
FEWEST_RESAMPLED = 5
"""Smallest number of images, or of groups, that is resampled. Fewer would make the interval far too narrow."""


class AnalysisUnavailable(RuntimeError):
    """A package that the analysis needs is not installed; the message says how to install it."""

    def __init__(self, task: str, package: str, error: ImportError) -> None:
        super().__init__(
            f"{task} needs {package}, which cannot be imported ({error}); pip install 'savl[analyze]' brings it"
        )


@dataclass(frozen=True)
class Interval:
    """A mean of repeats with its 95 % confidence interval (Student's t)."""

    value: float
    """Mean of the repeats."""
    low: float
    """Lower end; minus infinity for a single repeat, which has no spread."""
    high: float
    """Upper end; infinity for a single repeat."""
    repeats: tuple[float, ...]
    """The values that were averaged."""

    @classmethod
    def of(cls, repeats: Sequence[float], *, held_out: float = 0.0) -> Interval:
        """Average repeats and compute the interval of their mean.

        Repeats that measure random parts of the same samples are correlated, so their spread alone underestimates the
        error: the squared standard error is ``s² · (1/k + held_out/(1 − held_out))`` instead of ``s²/k`` (Nadeau and
        Bengio, 2003, section 3). This is exact for the mean of a fixed quantity over the samples, and the usual
        approximation where a network or a classifier is fitted in every repeat.

        Args:
            repeats: The k measurements, at least one, all finite.
            held_out: Share of the samples that each repeat measured, in [0, 1); 0 for independent repeats.

        Raises:
            ValueError: There are no repeats, one is not finite, or the share is outside [0, 1).
            AnalysisUnavailable: scipy is not installed and there are several repeats.
        """
        values = tuple(float(repeat) for repeat in repeats)
        if not values or not all(math.isfinite(value) for value in values):
            raise ValueError(f"repeats must be one or more finite numbers, got {values}")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {held_out}")
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, -math.inf, math.inf, values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        half = _student_t(count - 1) * math.sqrt(variance * (1 / count + held_out / (1 - held_out)))
        return cls(mean, mean - half, mean + half, values)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, with None for an infinite end."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high, "repeats": list(self.repeats)}


def _student_t(degrees_of_freedom: int) -> float:
    """Return the two-sided quantile of Student's t distribution for `CONFIDENCE`."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise AnalysisUnavailable("a confidence interval", "scipy", error) from error
    return float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))


@dataclass(frozen=True)
class Correlation:
    """Spearman's coefficient with the 95 % interval of a percentile bootstrap over images or over their groups."""

    value: float
    low: float
    """Lower end; -1 for fewer than `FEWEST_RESAMPLED` images."""
    high: float
    """Upper end; 1 for fewer than `FEWEST_RESAMPLED` images."""
    images: int


def spearman(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[object] | NDArray[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Compute Spearman's rank correlation with a bootstrap interval; equal values share their mean rank.

    Args:
        a: ``(n,)`` finite numbers, n at least 3.
        b: ``(n,)`` finite numbers.
        groups: ``(n,)`` labels of images that belong together, such as scenes. Whole groups are resampled if there are
            at least `FEWEST_RESAMPLED` of them. Otherwise single images are, and the interval holds for these groups
            alone.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: There are fewer than three pairs, the shapes differ, or one of the lists is constant.
        AnalysisUnavailable: scipy is not installed.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 3:
        raise ValueError(f"a and b must both be (n,), n at least 3, got {first.shape} and {second.shape}")
    value = rank_correlation(first, second)
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
    resampled = [each for rows in drawn if (each := rank_correlation(first[rows], second[rows])) is not None]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail)).tolist() if resampled else (-1.0, 1.0)
    return Correlation(value, low, high, len(first))


def _members(groups: Sequence[object] | NDArray[Any]) -> list[NDArray[np.intp]]:
    """Return the rows of every group."""
    rows: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.asarray(each) for each in rows.values()]


def rank_correlation(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float | None:
    """Return Spearman's coefficient of two ``(n,)`` arrays, in [-1, 1]; None if one of them is constant.

    Raises:
        AnalysisUnavailable: scipy is not installed.
    """
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise AnalysisUnavailable("a rank correlation", "scipy", error) from error
    if a.min() == a.max() or b.min() == b.max():
        return None
    return float(spearmanr(a, b).statistic)
