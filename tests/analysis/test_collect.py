"""From images to the statistics of their fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from savl.analysis.collect import FactorialFeatures, collect_factorial, collect_table
from savl.analysis.factorial import VARIATIONS, read_scene, vary
from savl.analysis.factors import FactorTable
from savl.analysis.features import measure_fields
from savl.images.errors import ImageFileError
from savl.images.folder import read_rgb
from savl.network import SAVL

Make = Callable[..., SAVL]
Write = Callable[..., list[Path]]


def collect(models: list[SAVL], paths: list[Path], crops: int = 2, seed: int = 0, scenes: int = 9) -> FactorialFeatures:
    return collect_factorial(
        models,
        paths,
        scenes=scenes,
        crops=crops,
        side=16,
        components=3,
        seed=seed,
        on_progress=lambda what, done, total: None,
    )


def test_every_crop_comes_at_every_level_of_every_degradation(network: Make, photographs: Write) -> None:
    paths = photographs(3, height=64, width=128)
    model = network()
    found = collect([model, network(degradation_code="deterministic")], paths)
    assert found.paths == tuple(paths)
    assert found.content.values.shape == (6, 3)
    for varied, variation in zip(found.varied, VARIATIONS, strict=True):
        assert varied.variation == variation
        combinations = set(zip(varied.scene.tolist(), varied.crop.tolist(), varied.level.tolist(), strict=True))
        assert combinations == {(crop // 2, crop, level) for crop in range(6) for level in range(5)}
        assert len(varied.level) == 30
        assert varied.amounts.tolist() == [variation.amounts[level] for level in varied.level]
        first, second = varied.features
        assert first.mean.shape == second.mean.shape == (30, 5)
        assert second.variance is None


def test_noise_alone_gives_the_features_that_all_variations_give(network: Make, photographs: Write) -> None:
    paths, model = photographs(2, height=64, width=128), network()
    everything = collect([model], paths)
    alone = collect_factorial(
        [model], paths, scenes=9, crops=2, side=16, components=3, seed=0, variations=VARIATIONS[:1],
        on_progress=lambda what, done, total: None,
    )  # fmt: skip
    assert len(everything.varied) > len(alone.varied) == 1
    assert np.array_equal(alone.varied[0].features[0].mean, everything.varied[0].features[0].mean)
    assert np.array_equal(alone.content.values, everything.content.values)


def test_rows_are_of_the_crop_and_level_they_say(network: Make, photographs: Write) -> None:
    paths = photographs(2, height=64, width=128)
    model = network()
    found = collect([model], paths)
    z = read_scene(paths[1], crops=2, side=16, scale=4, seed=(0, 1))
    assert z is not None
    for which, varied in enumerate(found.varied):
        expected, _ = measure_fields(model, vary(z, varied.variation, (0, 1, which)))
        np.testing.assert_allclose(varied.features[0].mean[varied.scene == 1], expected.mean, atol=1e-6)
        rows = (varied.crop == 3) & (varied.level == 0)
        alone, _ = measure_fields(model, vary(z[1:], varied.variation.with_amounts((0.0,)), (9,)))
        np.testing.assert_allclose(varied.features[0].mean[rows], alone.mean, atol=1e-6)
    first = read_scene(paths[0], crops=2, side=16, scale=4, seed=(0, 0))
    assert first is not None
    assert torch.equal(found.swept, first)


def test_small_images_do_not_take_the_places_of_photographs(network: Make, photographs: Write) -> None:
    paths = photographs(3, height=64, width=96)
    thumbs = [path.with_name(f"{path.stem}_thumb.png") for path in paths]
    for thumb in thumbs:
        Image.new("RGB", (30, 20)).save(thumb)
    found = collect([network()], sorted(paths + thumbs), scenes=2)
    assert found.paths == (paths[0], paths[2])
    assert found.too_small == tuple(thumbs)


def test_photographs_that_are_too_small_are_left_out_by_name(network: Make, photographs: Write) -> None:
    paths = photographs(3, height=64, width=96)
    Image.new("RGB", (63, 100)).save(paths[1])
    found = collect([network()], paths)
    assert found.too_small == (paths[1],)
    assert found.paths == (paths[0], paths[2])
    assert set(found.varied[0].scene.tolist()) == {0, 1}
    Image.new("RGB", (63, 100)).save(paths[0])
    with pytest.raises(ValueError, match="hr: at least 2 photographs, .* of 64×64 .* got 1 and 2 from 3 images"):
        collect([network()], paths)


def test_too_few_crops_for_the_estimators_are_refused(network: Make, photographs: Write) -> None:
    with pytest.raises(ValueError, match="and 4 crops .* got 3 and 3 from 3 images"):
        collect([network()], photographs(3), crops=1)


def test_the_seed_decides_places_and_noise(network: Make, photographs: Write) -> None:
    paths = photographs(2, height=200, width=200)
    model = network()
    means = [collect([model], paths, seed=seed).varied[0].features[0].mean for seed in (0, 0, 1)]
    np.testing.assert_array_equal(means[0], means[1])
    assert not np.array_equal(means[0], means[2])


def test_images_of_a_table_are_measured_whole_and_one_that_is_unreadable_is_named(
    network: Make, photographs: Write
) -> None:
    paths = photographs(2, height=30, width=41)
    table = FactorTable("shots", tuple(paths), {})
    told: list[tuple[str, int, int]] = []
    models = [network(), network(degradation_code="deterministic")]
    found = collect_table(models, table, lambda *progress: told.append(progress))
    assert told == [("shots", 0, 2), ("shots", 1, 2), ("shots", 2, 2)]
    for model, features in zip(models, found.features, strict=True):
        expected, _ = measure_fields(model, read_rgb(paths[1])[None])
        np.testing.assert_allclose(features.mean[1], expected.mean[0], atol=1e-6)
    paths[1].write_bytes(b"no image")
    with pytest.raises(ImageFileError, match=r"scene1.png"):
        collect_table(models, table, lambda *progress: None)
