"""Spearman's coefficient and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from savl.analysis.correlation import spearman


def test_the_coefficient_is_that_of_ranks_and_equal_values_share_theirs() -> None:
    # Ranks 4 1 4 2 4 and 1 2 3 4 5: deviations (1, -2, 1, -1, 1) and (-2, -1, 0, 1, 2), product 1, lengths² 8 and 10.
    assert spearman([3.0, 1.0, 3.0, 2.0, 3.0], [1, 2, 3, 4, 5]).value == pytest.approx(1 / 80**0.5)


def test_only_the_order_counts_and_the_interval_narrows_with_more_images() -> None:
    random = np.random.default_rng(1)
    few, many = (random.normal(size=(2, n)) @ np.eye(n) for n in (20, 500))
    found = [spearman(a, np.exp(a + b), seed=3) for a, b in (few, many)]
    for each, (a, b) in zip(found, (few, many), strict=True):
        assert each == spearman(a, a + b, seed=3)
        assert each.low < each.value < each.high
        assert each.images == len(a)
    assert found[1].high - found[1].low < 0.4 * (found[0].high - found[0].low)
    assert found[1].low < 0.69 < found[1].high, "6/π·asin(√½/2) = 0.690 for equal parts of signal and noise"


def test_the_interval_follows_from_the_seed() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 15))
    assert spearman(a, b, seed=1) == spearman(a, b, seed=1)
    assert spearman(a, b, seed=1).low != spearman(a, b, seed=2).low


def test_images_of_one_scene_are_resampled_together() -> None:
    """A slope of its own for each of 8 scenes: of how other scenes would do, hundreds of images say as little as 8."""
    random = np.random.default_rng(3)
    scenes = np.repeat(np.arange(8), 60)
    a = random.normal(size=len(scenes))
    b = random.normal(0.3, 1.0, 8)[scenes] * a + 0.3 * random.normal(size=len(scenes))
    alone, together = spearman(a, b), spearman(a, b, groups=scenes)
    assert alone.value == together.value
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert spearman(a, b, groups=np.minimum(scenes, 3)) == alone, "too few scenes to resample"


def test_a_handful_of_images_has_no_interval() -> None:
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
def test_what_has_no_coefficient_is_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spearman(a, b)
