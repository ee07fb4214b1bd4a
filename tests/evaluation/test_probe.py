"""Linear probes with known results: separable classes, random labels, features that only identify the group."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from savl.evaluation import AnalysisUnavailable, linear_probe
from savl.evaluation.probe import _grouped, _stratified


def scenes_and_levels(scenes: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scenes and levels of a factorial design: every scene at every level."""
    return torch.arange(scenes).repeat_interleave(levels), torch.arange(levels).repeat(scenes)


def test_separable_classes_are_all_predicted() -> None:
    labels = torch.arange(120) % 3
    result = linear_probe(torch.nn.functional.one_hot(labels, 3) + 0.05 * torch.randn(120, 3), labels)
    assert result.accuracy.value == 1
    assert result.accuracy.repeats == (1.0,) * 5
    assert result.chance == result.majority == pytest.approx(1 / 3)
    assert (result.classes, result.fit_samples, result.test_samples, result.groups) == (3, 84, 36, None)


@pytest.mark.parametrize("grouped", [False, True])
def test_random_labels_are_predicted_at_chance(grouped: bool) -> None:
    """There are more features than fitted samples, so that the classifier memorises them; 150 samples are held out."""
    labels = torch.arange(500)[torch.randperm(500)] % 5
    result = linear_probe(torch.randn(500, 400), labels, groups=torch.arange(500) // 10 if grouped else None)
    assert abs(result.accuracy.value - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 500)
    assert result.accuracy.low < 0.2 < result.accuracy.high


def test_features_that_identify_the_group_do_not_help_if_groups_are_held_out() -> None:
    groups = torch.arange(60).repeat_interleave(5)
    labels = (torch.arange(60) % 3).repeat_interleave(5)
    features = torch.nn.functional.one_hot(groups, 60)
    assert linear_probe(features, labels).accuracy.value == 1
    held_out = linear_probe(features, labels, groups=groups)
    assert held_out.accuracy.value < 0.45
    assert (held_out.groups, held_out.fit_samples, held_out.test_samples) == (60, 210, 90)


def test_a_level_that_all_scenes_share_is_predicted_for_unseen_scenes() -> None:
    scenes, levels = scenes_and_levels(20, 5)
    features = torch.cat((3.0 * levels[:, None] + 0.1 * torch.randn(100, 1), torch.randn(20, 8)[scenes]), dim=1)
    assert linear_probe(features, levels, groups=scenes).accuracy.value > 0.9


def test_features_are_standardised_by_the_samples_that_are_fitted_on() -> None:
    labels = torch.arange(100) % 2
    features = 1e-6 * (labels[:, None] + 0.1 * torch.randn(100, 1)) + 5
    assert linear_probe(features.double(), labels).accuracy.value == 1


def test_majority_is_the_share_of_the_most_common_class() -> None:
    labels = torch.zeros(200, dtype=torch.int64)
    labels[:20] = 1
    result = linear_probe(torch.randn(200, 2), labels)
    assert (result.chance, result.majority) == (0.5, 0.9)
    assert result.accuracy.value == pytest.approx(0.9, abs=0.02)


def test_without_groups_every_class_is_on_both_sides_in_proportion() -> None:
    classes = np.array([0] * 100 + [1] * 10 + [2] * 2 + [3] * 3)
    for fit, test in _stratified(classes, 4, 0.3, 0):
        assert np.bincount(classes[fit]).tolist() == [70, 7, 1, 2]
        assert np.bincount(classes[test]).tolist() == [30, 3, 1, 1]
        assert sorted([*fit, *test]) == list(range(115))


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_without_groups_every_share_keeps_all_classes(share: float) -> None:
    classes = np.array([0] * 40 + [1] * 2)
    ((fit, test),) = _stratified(classes, 1, share, 0)
    assert set(classes[fit]) == set(classes[test]) == {0, 1}


def test_with_groups_no_group_is_on_both_sides_and_every_class_is() -> None:
    """Only two of ten groups contain the third class, so most draws are rejected."""
    members = np.arange(10).repeat(4)
    classes = np.array([0, 1, 0, 1] * 10)
    classes[[0, 4]] = 2
    splits = list(_grouped(classes, [0, 1, 2], members, list(range(10)), 6, 0.3, 0))
    assert len(splits) == 6
    for fit, test in splits:
        assert sorted([*fit, *test]) == list(range(40))
        assert not set(members[fit]) & set(members[test])
        assert set(classes[fit]) == set(classes[test]) == {0, 1, 2}
        assert len(set(members[test])) == 3
    assert len({tuple(test) for _, test in splits}) > 1


def test_labels_and_groups_may_be_strings() -> None:
    scenes, levels = scenes_and_levels(10, 2)
    names = [f"ISO {100 * 2**level}" for level in levels.tolist()]
    result = linear_probe(levels[:, None].float(), names, groups=[f"scene {scene}" for scene in scenes.tolist()])
    assert (result.accuracy.value, result.classes, result.groups) == (1, 2, 10)


def test_results_depend_on_the_seed_only() -> None:
    labels = torch.arange(60) % 3
    features = labels[:, None] + torch.randn(60, 2)
    groups = torch.arange(60) // 6
    for of in (None, groups):
        first = linear_probe(features, labels, groups=of, seed=1)
        assert linear_probe(features.numpy(), labels.tolist(), groups=of, seed=1) == first
        assert linear_probe(features, labels, groups=of, seed=2) != first


def test_json_holds_every_number() -> None:
    result = linear_probe(torch.randn(30, 2), torch.arange(30) % 2, repeats=1)
    read = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert read["accuracy"] == {
        "value": result.accuracy.value,
        "low": None,
        "high": None,
        "repeats": [result.accuracy.value],
    }
    assert read["chance"] == 0.5
    assert read["groups"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.full((8, 2), math.nan)}, "features must be finite, got nan in row 0"),
        ({"labels": [0, 1]}, "features and labels must have as many samples as each other, got 8 and 2"),
        ({"labels": ["a"] * 8}, "labels must have at least two classes, got only 'a'"),
        ({"labels": ["a"] * 7 + ["b"]}, "labels must have two samples of a class or more, got one of 'b'"),
        ({"groups": [0, 1]}, "features and groups must have as many samples as each other, got 8 and 2"),
        ({"groups": ["s"] * 8}, "groups must have at least two groups, got only 's'"),
        (
            {"groups": ["p", "q"] * 4},
            "groups must be two or more for every class, so that it is on both sides; 0 is in 'p' only",
        ),
        (
            {"labels": [0, 1, 0, 1, 2, 3, 2, 3], "groups": [0, 0, 1, 1, 2, 2, 3, 3], "test_share": 0.25},
            r"of 500 draws of 1 out of 4 groups, 0 did; change test_share, or leave out classes",
        ),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"test_share": 1.0}, "test_share must be between 0 and 1, got 1.0"),
    ],
)
def test_invalid_arguments_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe(**({"features": torch.randn(8, 2), "labels": torch.arange(8) % 2} | changes))


@pytest.mark.parametrize("module", ["sklearn", "sklearn.linear_model", "sklearn.preprocessing"])
def test_without_scikit_learn_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        AnalysisUnavailable, match=r"probing needs scikit-learn.*pip install 'savl\[analyze\]' brings it"
    ):
        linear_probe(torch.randn(8, 2), torch.arange(8) % 2)
