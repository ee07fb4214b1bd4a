"""Results on controlled images, with synthetic features whose information is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from savl.analysis import controlled_results
from savl.analysis.controlled import SINGLE_DEGRADATIONS, ControlledFeatures, DegradedFeatures
from savl.analysis.controlled_results import (
    class_means,
    content_information,
    degradation_geometry,
    degradation_result,
    held_out_unit,
    noise_information,
    probe_kind,
)
from savl.analysis.features import ContentComponents, Features
from savl.evaluation.geometry import STRAIGHT_RAYS

SCENES, CROPS, LEVELS = 12, 4, 5
SCENE = np.repeat(np.arange(SCENES), CROPS * LEVELS)
CROP = (SCENE * CROPS).reshape(SCENES, LEVELS, CROPS) + np.arange(CROPS)
CROP = CROP.reshape(-1)
LEVEL = np.tile(np.repeat(np.arange(LEVELS), CROPS), SCENES)
N = len(SCENE)
CONTENT = np.random.default_rng(1).normal(size=(SCENES * CROPS, 2)).astype(np.float32)
"""Content of every crop."""

Known = NDArray[np.float64]


def one_hot(labels: NDArray[np.int64]) -> Known:
    return np.eye(labels.max() + 1)[labels]


def controlled(*known: Known, severity: Known | None = None) -> ControlledFeatures:
    """Return features that consist of the given columns for noise, blur and JPEG, and a little noise."""
    random = np.random.default_rng(0)
    degraded = []
    for degradation, columns in zip(SINGLE_DEGRADATIONS, known * 3 if len(known) == 1 else known, strict=True):
        mean = np.concatenate((columns + random.normal(0, 0.05, columns.shape), random.normal(size=(N, 2))), axis=1)
        variance = None if severity is None else (1 - severity).astype(np.float32)
        features = Features(mean.astype(np.float32), variance, None if variance is None else 2 * variance)
        degraded.append(DegradedFeatures(degradation, SCENE, CROP, LEVEL, (features,)))
    content = ContentComponents(CONTENT, 1.0)
    return ControlledFeatures((Path("x.png"),) * SCENES, (), content, tuple(degraded), torch.zeros(1))


def test_features_that_encode_the_level_predict_the_level_only() -> None:
    found = degradation_result(controlled(one_hot(LEVEL)).degraded[0], 0, repeats=3, seed=0)
    assert found.level.accuracy.value > 0.95
    assert found.level.chance == 0.2
    assert found.level.groups == SCENES, "scenes are held out"
    assert found.scene.accuracy.value < 0.35
    assert found.scene.classes == SCENES
    assert found.scene.groups is None
    assert (found.severity, found.severity_by_level, found.kl_by_level) == (None, None, None)


def test_features_that_encode_the_scene_predict_the_scene_only() -> None:
    found = degradation_result(controlled(one_hot(SCENE)).degraded[0], 0, repeats=3, seed=0)
    assert found.scene.accuracy.value > 0.95
    assert found.level.accuracy.value < 0.35


def test_severity_is_correlated_with_the_amount_and_averaged_by_level() -> None:
    severity = 0.1 * LEVEL + 0.001 * SCENE
    found = degradation_result(controlled(one_hot(LEVEL), severity=severity).degraded[1], 0, repeats=2, seed=0)
    assert found.severity is not None
    assert found.severity.value > 0.97
    assert found.severity_by_level == pytest.approx([0.1 * level + 0.0055 for level in range(LEVELS)], abs=1e-6)
    assert found.kl_by_level == pytest.approx([2 * (1 - 0.1 * level - 0.0055) for level in range(LEVELS)], abs=1e-6)
    assert (found.name, found.title, found.levels) == ("blur", "Blur-Level", ("0", "0.5", "1", "1.5", "2"))


def test_a_severity_that_never_varies_has_no_correlation() -> None:
    found = degradation_result(controlled(one_hot(LEVEL), severity=np.zeros(N)).degraded[0], 0, repeats=2, seed=0)
    assert found.severity is None
    assert found.severity_by_level == (0, 0, 0, 0, 0)


def test_the_kind_is_probed_on_degraded_images_only() -> None:
    kinds = [np.where(LEVEL[:, None] > 0, np.eye(3)[[kind]], 0.0) for kind in range(3)]
    found = probe_kind(controlled(*kinds).degraded, 0, repeats=2, seed=0)
    assert found.accuracy.value > 0.99, "clean ones are all alike and would be guessed"
    assert found.chance == pytest.approx(1 / 3)
    assert found.fit_samples + found.test_samples == 3 * N * 4 // 5
    assert found.groups == SCENES


def test_class_means_are_those_of_the_levels_of_each_degradation() -> None:
    data = controlled(*(np.stack((kind + 0.1 * LEVEL, SCENE), axis=1) for kind in range(3))).degraded
    means = class_means(data, 0)
    assert means.shape == (3, LEVELS, 4)
    np.testing.assert_allclose(means[..., 0], np.arange(3)[:, None] + 0.1 * np.arange(LEVELS), atol=0.03)
    np.testing.assert_allclose(means[..., 1], (SCENES - 1) / 2, atol=0.03)


def test_degradations_that_move_different_features_have_three_directions() -> None:
    apart = controlled(*(10.0 * LEVEL[:, None] * np.eye(3)[[kind]] for kind in range(3)))
    found = degradation_geometry(apart.degraded, 0)
    assert found.participation_ratio == pytest.approx(STRAIGHT_RAYS, abs=0.01)
    assert list(found.cosines) == ["noise_blur", "noise_jpeg", "blur_jpeg"]
    assert max(map(abs, found.cosines.values())) < 0.02
    together = degradation_geometry(controlled(10.0 * LEVEL[:, None]).degraded, 0)
    assert together.participation_ratio == pytest.approx(1, abs=0.01)
    assert min(together.cosines.values()) > 0.98


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controlled_results, "mine", partial(controlled_results.mine, steps=300, width=32, rate=1e-3))
    monkeypatch.setattr(controlled_results, "club", partial(controlled_results.club, steps=200, width=16))


@pytest.mark.usefixtures("fitted")
@pytest.mark.parametrize("encoded", ["level", "content"])
def test_information_is_measured_only_for_the_factor_that_the_features_encode(encoded: str) -> None:
    data = controlled(one_hot(LEVEL) if encoded == "level" else CONTENT[CROP].astype(np.float64))
    find: list[Callable[..., controlled_results.Information]] = [content_information, noise_information]
    content, noise = (each(data, 0, repeats=2, seed=0) for each in find)
    known, unknown = (noise, content) if encoded == "level" else (content, noise)
    assert known.mine.value > 0.7
    assert unknown.mine.value < 0.15
    assert known.hsic.p_value < 0.01
    assert known.hsic.normalised > 0.3 > abs(unknown.hsic.normalised) + 0.2
    assert content.held_out == noise.held_out == "scene"
    assert noise.club is None
    assert content.club is not None
    assert (content.club.value > 1) == (encoded == "content")


@pytest.mark.usefixtures("fitted")
def test_features_that_identify_every_crop_have_no_information_about_its_content() -> None:
    """A network could memorise crops that are on both sides of the split, but not scenes that it has not seen."""
    names = np.random.default_rng(2).normal(size=(SCENES * CROPS, 8))
    found = content_information(controlled(names[CROP]), 0, repeats=3, seed=0)
    assert found.mine.value < 0.1
    assert found.club is not None
    assert found.club.value < 0.3
    assert found.hsic.p_value > 0.02


def test_crops_are_held_out_if_scenes_are_few_or_uneven() -> None:
    noisy = controlled(one_hot(LEVEL)).degraded[0]
    assert held_out_unit(noisy) == ("scene", noisy.scene)
    few = noisy.scene < 3
    scenes = DegradedFeatures(noisy.degradation, SCENE[few], CROP[few], LEVEL[few], noisy.features)
    assert held_out_unit(scenes) == ("crop", scenes.crop)
