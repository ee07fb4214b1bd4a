"""Confidence intervals against tables, a formula and simulated coverage; Spearman's coefficient and its interval."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

from savl.evaluation import AnalysisUnavailable, Interval
from savl.evaluation.intervals import spearman


@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (121, 1.9799)])
def test_quantiles_are_those_of_the_tables(count: int, t: float) -> None:
    repeats = torch.randn(count, dtype=torch.float64)
    half = (repeats.std() / math.sqrt(count)).item()
    interval = Interval.of(repeats.tolist())
    assert (interval.high - interval.value) / half == pytest.approx(t, abs=5e-5)


def test_without_scipy_an_interval_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(AnalysisUnavailable, match=r"needs scipy, .*pip install 'savl\[analyze\]'"):
        Interval.of([1.0, 2.0])
    assert Interval.of([1.0]).value == 1.0


def test_an_interval_is_the_mean_and_t_standard_errors_either_side() -> None:
    interval = Interval.of([1.0, 2.0, 4.0])
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    assert interval.value == pytest.approx(7 / 3)
    assert interval.low == pytest.approx(7 / 3 - half, rel=1e-6)
    assert interval.high == pytest.approx(7 / 3 + half, rel=1e-6)
    assert interval.repeats == (1.0, 2.0, 4.0)


def test_shared_samples_widen_the_interval() -> None:
    interval = Interval.of([1.0, 2.0, 4.0], held_out=0.2)
    half = 4.302653 * math.sqrt(7 / 3) * math.sqrt(1 / 3 + 0.2 / 0.8)
    assert interval.high - interval.value == pytest.approx(half, rel=1e-6)
    assert interval.value - interval.low == pytest.approx(half, rel=1e-6)


def test_intervals_of_independent_repeats_cover_the_truth_95_times_in_100() -> None:
    covered = [Interval.of(torch.randn(4).tolist()) for _ in range(2000)]
    share = sum(interval.low <= 0 <= interval.high for interval in covered) / 2000
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_intervals_of_repeats_that_share_samples_cover_the_truth_only_if_they_are_widened() -> None:
    covered_wide = covered_narrow = 0
    for _ in range(500):
        samples = torch.randn(50)
        repeats = [samples[torch.randperm(50)[:15]].mean().item() for _ in range(5)]
        wide, narrow = Interval.of(repeats, held_out=0.3), Interval.of(repeats)
        covered_wide += wide.low <= 0 <= wide.high
        covered_narrow += narrow.low <= 0 <= narrow.high
    assert abs(covered_wide / 500 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 500)
    assert covered_narrow / 500 < 0.85


def test_one_repeat_says_nothing_about_its_spread() -> None:
    interval = Interval.of([0.25])
    assert (interval.value, interval.low, interval.high) == (0.25, -math.inf, math.inf)
    assert interval.to_json() == {"value": 0.25, "low": None, "high": None, "repeats": [0.25]}


def test_an_interval_survives_json() -> None:
    interval = Interval.of([0.1, 0.2])
    read = json.loads(json.dumps(interval.to_json(), allow_nan=False))
    assert Interval(read["value"], read["low"], read["high"], tuple(read["repeats"])) == interval


@pytest.mark.parametrize("repeats", [[], [math.nan], [1.0, math.inf]])
def test_repeats_that_have_no_mean_are_refused(repeats: list[float]) -> None:
    with pytest.raises(ValueError, match="repeats must be one or more finite numbers, got"):
        Interval.of(repeats)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"held_out must be in \[0, 1\), got {share}"):
        Interval.of([1.0], held_out=share)


def test_the_coefficient_is_that_of_ranks_and_equal_values_share_theirs() -> None:
    # Ranks 4 1 4 2 4 and 1 2 3 4 5: deviations (1, -2, 1, -1, 1) and (-2, -1, 0, 1, 2), product 1, lengths² 8 and 10.
    assert spearman([3.0, 1.0, 3.0, 2.0, 3.0], [1, 2, 3, 4, 5]).value == pytest.approx(1 / 80**0.5)


def test_only_the_order_counts_and_the_interval_narrows_with_more_images() -> None:
    random = np.random.default_rng(1)
    few, many = (random.normal(size=(2, n)) @ np.eye(n) for n in (20, 500))
    found = [spearman(a, np.exp(a + b), seed=3, resamples=300) for a, b in (few, many)]
    for each, (a, b) in zip(found, (few, many), strict=True):
        assert each == spearman(a, a + b, seed=3, resamples=300)
        assert each.low < each.value < each.high
        assert each.images == len(a)
    assert found[1].high - found[1].low < 0.4 * (found[0].high - found[0].low)
    assert found[1].low < 0.69 < found[1].high, "6/π·asin(√½/2) = 0.690 for equal parts of signal and noise"


def test_the_interval_follows_from_the_seed() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 15))
    assert spearman(a, b, seed=1, resamples=100) == spearman(a, b, seed=1, resamples=100)
    assert spearman(a, b, seed=1, resamples=100).low != spearman(a, b, seed=2, resamples=100).low


def test_images_of_one_scene_are_resampled_together() -> None:
    """If each of 8 scenes has its own slope, hundreds of images say no more about other scenes than 8 do."""
    random = np.random.default_rng(3)
    scenes = np.repeat(np.arange(8), 60)
    a = random.normal(size=len(scenes))
    b = random.normal(0.3, 1.0, 8)[scenes] * a + 0.3 * random.normal(size=len(scenes))
    alone, together = spearman(a, b, resamples=300), spearman(a, b, groups=scenes, resamples=300)
    assert alone.value == together.value
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert spearman(a, b, groups=np.minimum(scenes, 3), resamples=300) == alone, "too few scenes to resample"


def test_fewer_than_five_images_have_no_interval() -> None:
    found = spearman([1, 2, 3, 4], [1, 2, 3, 4])
    assert (found.value, found.low, found.high) == (pytest.approx(1.0), -1.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1, 2], r"n at least 3, got \(2,\) and \(2,\)"),
        ([1, 2, 3], [1, 2, 3, 4], r"got \(3,\) and \(4,\)"),
        ([1, 1, 1], [1, 2, 3], "must vary"),
    ],
)
def test_lists_without_a_coefficient_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spearman(a, b)
