"""Results on tables with known factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from savl.analysis.factor_table import FactorTable
from savl.analysis.features import Features, measure_fields
from savl.analysis.table_results import FactorResult, TableFeatures, collect_table, factor_result, table_result
from savl.images.errors import ImageFileError
from savl.images.folder import read_rgb
from savl.network import SAVL

N = 60
RANDOM = np.random.default_rng(0)
CAMERA = [("Nikon", "Canon")[row % 2] for row in range(N)]
ISO = [str(100 * 2 ** (row % 4)) for row in range(N)]
SCENE = [f"s{row // 4}" for row in range(N)]


def features(*columns: Sequence[float], severity: Sequence[float] | None = None) -> Features:
    """Return features with the given columns and a random one."""
    mean = np.stack((*columns, RANDOM.normal(size=len(columns[0]))), axis=1).astype(np.float32)
    variance = None if severity is None else (1 - np.asarray(severity)).astype(np.float32)
    return Features(mean, variance, variance)


def examine(name: str, values: Sequence[str | None], scenes: Sequence[str] | None, found: Features) -> FactorResult:
    return factor_result(name, values, scenes, found, repeats=3, seed=0)


def codes(values: Sequence[str]) -> list[float]:
    return [float(sorted(set(values)).index(value)) for value in values]


def test_an_encoded_factor_is_predicted_and_its_classes_are_counted() -> None:
    found = examine("camera", CAMERA, None, features(codes(CAMERA)))
    assert found.probe is not None
    assert found.probe.accuracy.value > 0.95
    assert found.probe.chance == 0.5
    assert found.classes == {"Canon": 30, "Nikon": 30}
    assert (found.left_out, found.held_out, found.not_probed) == (0, None, None)
    assert (found.severity, found.not_correlated) == (None, "is not numeric")


def test_features_that_encode_the_scene_do_not_predict_the_camera_of_held_out_scenes() -> None:
    of_scene = [("Nikon", "Canon")[int(scene[1:]) % 2] for scene in SCENE]  # a camera for every scene
    one_hot = [[float(scene == f"s{number}") for scene in SCENE] for number in range(15)]
    known = examine("camera", of_scene, None, features(*one_hot))
    held_out = examine("camera", of_scene, SCENE, features(*one_hot))
    assert known.probe is not None
    assert held_out.probe is not None
    assert known.probe.accuracy.value > 0.95
    assert held_out.probe.accuracy.value < 0.7
    assert held_out.held_out == "scene"
    assert held_out.probe.groups == 15


def test_scenes_are_not_held_out_if_there_are_too_few() -> None:
    found = examine(
        "camera", CAMERA, [scene if scene in ("s0", "s1") else "s2" for scene in SCENE], features(codes(CAMERA))
    )
    assert found.held_out is None
    assert found.probe is not None


def test_classes_that_are_rare_or_in_one_scene_only_are_left_out_and_counted() -> None:
    camera: list[str | None] = list(CAMERA)
    camera[0], camera[1:4] = None, ["rare"] * 3
    assert examine("camera", camera, None, features(codes(CAMERA))).left_out == 4
    camera[4:8] = ["rare"] * 4  # seven by now, in the scenes s0 and s1
    assert examine("camera", camera, SCENE, features(codes(CAMERA))).left_out == 1
    camera[1:4] = ["Nikon"] * 3  # four, in s1 alone
    found = examine("camera", camera, SCENE, features(codes(CAMERA)))
    assert found.left_out == 5
    assert set(found.classes) == {"Canon", "Nikon"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["Nikon"] * N, "has one class only: Nikon"),
        ([None] * N, "is not known for any image"),
        ([str(row) for row in range(N)], "0 of its 60 classes have at least 4 images; 2 are needed"),
        (["a", *["b"] * (N - 1)], "1 of its 2 classes have at least 4 images; 2 are needed"),
    ],
)
def test_the_reason_why_a_factor_is_not_probed_is_given(values: list[str | None], reason: str) -> None:
    found = examine("camera", values, None, features(codes(CAMERA)))
    assert (found.probe, found.not_probed, found.classes, found.left_out) == (None, reason, {}, N)


def test_a_factor_that_cannot_be_split_by_scenes_is_not_probed() -> None:
    # Eight classes in two scenes each, none shared: a split has them all on both sides by a rare chance only.
    values = [f"c{row // 8}" for row in range(64)]
    found = examine("camera", values, [f"s{row // 4}" for row in range(64)], features([0.0] * 64))
    assert found.probe is None
    assert found.not_probed is not None
    assert found.not_probed.startswith("cannot be split: groups")
    assert found.left_out == 64


def test_a_number_is_correlated_with_the_severity_of_the_images_that_have_one() -> None:
    severity = [float(iso) + 0.01 * row for row, iso in enumerate(ISO)]
    iso: list[str | None] = list(ISO)
    iso[5] = None
    found = examine("iso", iso, SCENE, features(codes(ISO), severity=severity))
    assert found.severity is not None
    assert found.severity.value > 0.9
    assert found.severity.images == N - 1
    assert found.not_correlated is None
    assert found.probe is not None
    assert found.probe.classes == 4
    falling = examine("iso", ISO, None, features(codes(ISO), severity=[-each for each in severity]))
    assert falling.severity is not None
    assert falling.severity.value < -0.9


@pytest.mark.parametrize(
    ("name", "values", "severity", "reason"),
    [
        ("scene", ISO, list(range(N)), "is not numeric"),
        ("camera", CAMERA, list(range(N)), "is not numeric"),
        ("iso", ISO, None, "a deterministic code has no severity"),
        ("iso", [str(row % 2) for row in range(N)], list(range(N)), "has fewer than three different numbers"),
        ("iso", ISO, [0.0] * N, "the severity is the same for all images"),
    ],
)
def test_the_reason_why_a_factor_is_not_correlated_is_given(
    name: str, values: list[str], severity: list[float] | None, reason: str
) -> None:
    found = examine(name, values, None, features(codes(CAMERA), severity=severity))
    assert (found.severity, found.not_correlated) == (None, reason)


def test_all_factors_are_probed_and_scenes_are_not_held_out_for_the_factor_scene() -> None:
    table = FactorTable("shots.csv", (Path("x.png"),) * N, {"scene": tuple(SCENE), "camera": tuple(CAMERA)})
    knows = features(codes(CAMERA), *[[float(scene == f"s{number}") for scene in SCENE] for number in range(15)])
    found = table_result(TableFeatures(table, (knows, features([0.0] * N))), 0, repeats=2, seed=0)
    assert (found.name, found.images) == ("shots.csv", N)
    scene, camera = found.factors
    assert (scene.name, scene.held_out, camera.name, camera.held_out) == ("scene", None, "camera", "scene")
    assert scene.probe is not None
    assert scene.probe.accuracy.value > 0.9
    ignorant = table_result(TableFeatures(table, (knows, features([0.0] * N))), 1, repeats=2, seed=0)
    assert ignorant.factors[0].probe is not None
    assert ignorant.factors[0].probe.accuracy.value < 0.3


def test_images_of_a_table_are_measured_whole_and_unreadable_ones_are_reported(
    network: Callable[..., SAVL], photographs: Callable[..., list[Path]]
) -> None:
    paths = photographs(2, height=30, width=41)
    table = FactorTable("shots", tuple(paths), {})
    reported: list[tuple[str, int, int]] = []
    models = [network(), network(degradation_code="deterministic")]
    found = collect_table(models, table, lambda *progress: reported.append(progress))
    assert reported == [("shots", 0, 2), ("shots", 1, 2), ("shots", 2, 2)]
    for model, features in zip(models, found.features, strict=True):
        expected, _ = measure_fields(model, read_rgb(paths[1])[None])
        np.testing.assert_allclose(features.mean[1], expected.mean[0], atol=1e-6)
    paths[1].write_bytes(b"no image")
    with pytest.raises(ImageFileError, match=r"scene1.png"):
        collect_table(models, table, lambda *progress: None)
