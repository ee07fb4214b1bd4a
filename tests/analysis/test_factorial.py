"""Factorial data: crops of photographs at every level of one degradation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from savl.analysis.factorial import BLUR, JPEG, NOISE, VARIATIONS, Variation, read_scene, spread, vary
from savl.degradation import Degradation
from savl.degradation.recipe import Recipe


def crops() -> Tensor:
    """Two crops of a fine pattern around middle gray, whole 8-bit levels, and far from black and white."""
    values = torch.randint(100, 156, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return values / 255


@pytest.mark.parametrize("variation", VARIATIONS, ids=lambda each: each.name)
def test_the_first_level_is_the_clean_crop_and_the_others_are_further_and_further_from_it(
    variation: Variation,
) -> None:
    z = crops()
    y = vary(z, variation, (0,)).view(5, 2, 3, 32, 32)
    torch.testing.assert_close(y[0], z, atol=1e-6, rtol=0)
    errors = [float((level - z).square().mean()) for level in y]
    assert errors == sorted(errors)
    assert len(set(errors)) == 5
    torch.testing.assert_close(y * 255, (y * 255).round(), atol=1e-3, rtol=0)


def test_noise_has_the_deviation_it_is_called_by_and_is_drawn_anew_for_every_image() -> None:
    z = torch.full((2, 3, 64, 64), 0.5)
    noise = vary(z, NOISE, (0,)).view(5, 2, 3, 64, 64) - 0.5
    for amount, level in zip(NOISE.amounts[1:], noise[1:], strict=True):
        assert float(level.std()) * 255 == pytest.approx(amount, rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack((noise[3, 0].flatten(), noise[3, 1].flatten())))[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(torch.stack((noise[3, 0].flatten(), noise[4, 0].flatten())))[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(noise[3, 0].flatten(1))[0, 1])) < 0.05, "channels have noise of their own"


def test_blur_spreads_a_line_by_its_deviation() -> None:
    z = torch.zeros(1, 3, 31, 31)
    z[..., 15] = 1
    wide = vary(z, BLUR.with_amounts((2.0,)), (0,))[0, 0]
    x = torch.arange(31) - 15
    variance = float((wide.sum(dim=0) * x.square()).sum() / wide.sum())
    assert variance == pytest.approx(4.0, rel=0.1), "rounding to 8 bits cuts the tails"


def test_levels_are_named_as_people_call_them() -> None:
    assert NOISE.labels == ("0", "5", "10", "20", "30")
    assert JPEG.labels == ("none", "90", "70", "50", "30")


def test_jpeg_is_asked_for_the_quality_it_is_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def spy(self: Degradation, x: Tensor, recipe: Recipe, *others: object) -> Tensor:
        asked.append(recipe)
        return x

    monkeypatch.setattr(Degradation, "apply", spy)
    vary(crops(), JPEG, (0,))
    assert asked[0].first is not None
    assert asked[0].first.quality == (None, None, 90, 90, 70, 70, 50, 50, 30, 30)


def test_noise_follows_from_the_seed() -> None:
    z = crops()
    assert torch.equal(vary(z, NOISE, (1, 2)), vary(z, NOISE, (1, 2)))
    assert not torch.equal(vary(z, NOISE, (1, 2)), vary(z, NOISE, (1, 3)))


@pytest.fixture
def quarters(tmp_path: Path) -> Path:
    """128×128 pixels: four quarters of one gray each."""
    pixels = np.kron(np.asarray([[40, 80], [120, 160]], np.uint8), np.ones((64, 64), np.uint8))
    Image.fromarray(pixels).save(tmp_path / "quarters.png")
    return tmp_path / "quarters.png"


def test_crops_lie_side_by_side_where_there_is_room(quarters: Path) -> None:
    z = read_scene(quarters, crops=4, side=16, scale=4, seed=(0,))
    assert z is not None
    assert z.shape == (4, 3, 16, 16)
    assert z.std(dim=(1, 2, 3)).max() < 0.01
    assert sorted((255 * z.mean(dim=(1, 2, 3))).round().int().tolist()) == [40, 80, 120, 160]


def test_crops_overlap_by_half_where_there_is_little_room_and_never_coincide(quarters: Path) -> None:
    z = read_scene(quarters, crops=50, side=16, scale=4, seed=(0,))
    assert z is not None
    assert len(z) == 9
    assert len({tuple(crop.flatten().tolist()) for crop in z}) == 9


def test_which_places_are_taken_follows_from_the_seed(quarters: Path) -> None:
    drawn = {
        tuple((255 * z.mean(dim=(1, 2, 3))).round().int().tolist())
        for seed in range(8)
        if (z := read_scene(quarters, crops=2, side=16, scale=4, seed=(seed,))) is not None
    }
    assert len(drawn) > 2
    again = [read_scene(quarters, crops=2, side=16, scale=4, seed=(3,)) for _ in range(2)]
    assert again[0] is not None
    assert again[1] is not None
    assert torch.equal(again[0], again[1])


def test_a_photograph_smaller_than_a_crop_gives_none(photographs: Callable[..., list[Path]]) -> None:
    (path,) = photographs(1, height=63, width=200)
    assert read_scene(path, crops=2, side=16, scale=4, seed=(0,)) is None


def test_paths_are_taken_evenly() -> None:
    paths = [Path(str(number)) for number in range(10)]
    assert spread(paths, 3) == [paths[0], paths[4], paths[9]]
    assert spread(paths, 10) == spread(paths, 99) == paths
    assert spread(paths, 1) == paths[:1]
