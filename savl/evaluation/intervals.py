"""The mean of repeated measurements, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from savl.evaluation.unavailable import AnalysisUnavailable

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of repeats with its 95 % confidence interval (Student's t)."""

    value: float
    """The mean."""
    low: float
    """Lower end; minus infinity for one repeat, which says nothing about its spread."""
    high: float
    """Upper end; infinity for one repeat."""
    repeats: tuple[float, ...]
    """What was averaged."""

    @classmethod
    def of(cls, repeats: Sequence[float], *, held_out: float = 0.0) -> Interval:
        """Average repeats.

        Repeats that measure random parts of the same samples are alike, so their spread alone says too little: the
        squared standard error is ``s² · (1/k + held_out/(1 − held_out))`` instead of ``s²/k`` (Nadeau and Bengio, 2003,
        section 3). For the mean of a fixed quantity over the samples that is exact; for one that a network or a
        classifier is fitted for, it is the usual approximation.

        Args:
            repeats: The k measurements, at least one, all finite.
            held_out: Share of the samples that each repeat measured, in [0, 1); 0 for independent repeats.

        Raises:
            ValueError: No repeats, one that is not finite, or a share outside [0, 1).
            AnalysisUnavailable: scipy is not installed, and there are several repeats.
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
        """Numbers, a list and None for an end that is infinite: what JSON can hold."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high, "repeats": list(self.repeats)}


def _student_t(freedom: int) -> float:
    """The t that a Student variable stays within, either side of 0, with probability `CONFIDENCE`."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise AnalysisUnavailable("a confidence interval", "scipy", error) from error
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
