"""Photographs at every level of one degradation, and the statistics of their fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from savl.analysis.controlled import (
    BLUR,
    JPEG,
    NOISE,
    SINGLE_DEGRADATIONS,
    ControlledFeatures,
    SingleDegradation,
    collect_controlled,
    degrade_at_every_level,
)
from savl.analysis.features import measure_fields
from savl.analysis.photographs import read_crops
from savl.degradation import Degradation
from savl.degradation.recipe import Recipe
from savl.network import SAVL

Make = Callable[..., SAVL]
Write = Callable[..., list[Path]]


def crops() -> Tensor:
    """Return two crops with a fine pattern of 8-bit values around middle gray, far from black and white."""
    values = torch.randint(100, 156, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return values / 255


@pytest.mark.parametrize("degradation", SINGLE_DEGRADATIONS, ids=lambda each: each.name)
def test_the_first_level_is_the_clean_crop_and_errors_increase_with_the_level(
    degradation: SingleDegradation,
) -> None:
    z = crops()
    y = degrade_at_every_level(z, degradation, (0,)).view(5, 2, 3, 32, 32)
    torch.testing.assert_close(y[0], z, atol=1e-6, rtol=0)
    errors = [float((level - z).square().mean()) for level in y]
    assert errors == sorted(errors)
    assert len(set(errors)) == 5
    torch.testing.assert_close(y * 255, (y * 255).round(), atol=1e-3, rtol=0)


def test_noise_has_its_nominal_deviation_and_is_independent_for_every_image() -> None:
    z = torch.full((2, 3, 64, 64), 0.5)
    noise = degrade_at_every_level(z, NOISE, (0,)).view(5, 2, 3, 64, 64) - 0.5
    for amount, level in zip(NOISE.amounts[1:], noise[1:], strict=True):
        assert float(level.std()) * 255 == pytest.approx(amount, rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack((noise[3, 0].flatten(), noise[3, 1].flatten())))[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(torch.stack((noise[3, 0].flatten(), noise[4, 0].flatten())))[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(noise[3, 0].flatten(1))[0, 1])) < 0.05, "channels have noise of their own"


def test_blur_spreads_a_line_by_its_deviation() -> None:
    z = torch.zeros(1, 3, 31, 31)
    z[..., 15] = 1
    wide = degrade_at_every_level(z, BLUR.with_amounts((2.0,)), (0,))[0, 0]
    x = torch.arange(31) - 15
    variance = float((wide.sum(dim=0) * x.square()).sum() / wide.sum())
    assert variance == pytest.approx(4.0, rel=0.1), "rounding to 8 bits cuts the tails"


def test_jpeg_levels_are_labelled_by_their_quality() -> None:
    assert NOISE.labels == ("0", "5", "10", "20", "30")
    assert JPEG.labels == ("none", "90", "70", "50", "30")


def test_jpeg_is_applied_with_its_nominal_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def spy(self: Degradation, x: Tensor, recipe: Recipe, *others: object) -> Tensor:
        asked.append(recipe)
        return x

    monkeypatch.setattr(Degradation, "apply", spy)
    degrade_at_every_level(crops(), JPEG, (0,))
    assert asked[0].first is not None
    assert asked[0].first.quality == (None, None, 90, 90, 70, 70, 50, 50, 30, 30)


def test_noise_depends_on_the_seed() -> None:
    z = crops()
    assert torch.equal(degrade_at_every_level(z, NOISE, (1, 2)), degrade_at_every_level(z, NOISE, (1, 2)))
    assert not torch.equal(degrade_at_every_level(z, NOISE, (1, 2)), degrade_at_every_level(z, NOISE, (1, 3)))


def collect(
    models: list[SAVL], paths: list[Path], crops: int = 2, seed: int = 0, scenes: int = 9
) -> ControlledFeatures:
    return collect_controlled(
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
    for degraded, degradation in zip(found.degraded, SINGLE_DEGRADATIONS, strict=True):
        assert degraded.degradation == degradation
        combinations = set(zip(degraded.scene.tolist(), degraded.crop.tolist(), degraded.level.tolist(), strict=True))
        assert combinations == {(crop // 2, crop, level) for crop in range(6) for level in range(5)}
        assert len(degraded.level) == 30
        assert degraded.amounts.tolist() == [degradation.amounts[level] for level in degraded.level]
        first, second = degraded.features
        assert first.mean.shape == second.mean.shape == (30, 5)
        assert second.variance is None


def test_collecting_noise_only_gives_the_same_features(network: Make, photographs: Write) -> None:
    paths, model = photographs(2, height=64, width=128), network()
    everything = collect([model], paths)
    alone = collect_controlled(
        [model], paths, scenes=9, crops=2, side=16, components=3, seed=0, degradations=SINGLE_DEGRADATIONS[:1],
        on_progress=lambda what, done, total: None,
    )  # fmt: skip
    assert len(everything.degraded) > len(alone.degraded) == 1
    assert np.array_equal(alone.degraded[0].features[0].mean, everything.degraded[0].features[0].mean)
    assert np.array_equal(alone.content.values, everything.content.values)


def test_rows_belong_to_their_crop_and_level(network: Make, photographs: Write) -> None:
    paths = photographs(2, height=64, width=128)
    model = network()
    found = collect([model], paths)
    z = read_crops(paths[1], crops=2, side=16, scale=4, seed=(0, 1))
    assert z is not None
    for which, degraded in enumerate(found.degraded):
        expected, _ = measure_fields(model, degrade_at_every_level(z, degraded.degradation, (0, 1, which)))
        np.testing.assert_allclose(degraded.features[0].mean[degraded.scene == 1], expected.mean, atol=1e-6)
        rows = (degraded.crop == 3) & (degraded.level == 0)
        alone, _ = measure_fields(model, degrade_at_every_level(z[1:], degraded.degradation.with_amounts((0.0,)), (9,)))
        np.testing.assert_allclose(degraded.features[0].mean[rows], alone.mean, atol=1e-6)
    first = read_crops(paths[0], crops=2, side=16, scale=4, seed=(0, 0))
    assert first is not None
    assert torch.equal(found.first_scene, first)


def test_small_images_do_not_reduce_the_number_of_photographs(network: Make, photographs: Write) -> None:
    paths = photographs(3, height=64, width=96)
    thumbs = [path.with_name(f"{path.stem}_thumb.png") for path in paths]
    for thumb in thumbs:
        Image.new("RGB", (30, 20)).save(thumb)
    found = collect([network()], sorted(paths + thumbs), scenes=2)
    assert found.paths == (paths[0], paths[2])
    assert found.too_small == tuple(thumbs)


def test_photographs_that_are_too_small_are_left_out_and_listed(network: Make, photographs: Write) -> None:
    paths = photographs(3, height=64, width=96)
    Image.new("RGB", (63, 100)).save(paths[1])
    found = collect([network()], paths)
    assert found.too_small == (paths[1],)
    assert found.paths == (paths[0], paths[2])
    assert set(found.degraded[0].scene.tolist()) == {0, 1}
    Image.new("RGB", (63, 100)).save(paths[0])
    with pytest.raises(ValueError, match="hr: at least 2 photographs, .* of 64×64 .* got 1 and 2 from 3 images"):
        collect([network()], paths)


def test_too_few_crops_for_the_estimators_are_refused(network: Make, photographs: Write) -> None:
    with pytest.raises(ValueError, match="and 4 crops .* got 3 and 3 from 3 images"):
        collect([network()], photographs(3), crops=1)


def test_positions_and_noise_depend_on_the_seed(network: Make, photographs: Write) -> None:
    paths = photographs(2, height=200, width=200)
    model = network()
    means = [collect([model], paths, seed=seed).degraded[0].features[0].mean for seed in (0, 0, 1)]
    np.testing.assert_array_equal(means[0], means[1])
    assert not np.array_equal(means[0], means[2])
