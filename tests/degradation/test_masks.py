"""Masks: smooth random ones and ramps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from savl.degradation.config import SpatialConfig
from savl.degradation.masks import draw_mask

SMOOTH = SpatialConfig(ramp_probability=0.0)
RAMP = SpatialConfig(ramp_probability=1.0)
BOTH = pytest.mark.parametrize("config", [SMOOTH, RAMP], ids=["smooth", "ramp"])


def masks(config: SpatialConfig, count: int, height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.stack([draw_mask(config, height, width, random) for _ in range(count)])[:, 0]


def unevenness(mask: Tensor) -> float:
    """Mean difference of neighbours, horizontally."""
    return mask.diff(dim=-1).abs().mean().item()


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (37, 64), (64, 37)])
def test_masks_have_the_requested_size_and_lie_between_0_and_1(config: SpatialConfig, size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        mask = draw_mask(config, *size, random)
        assert mask.shape == (1, *size)
        assert mask.dtype == torch.float32
        assert torch.isfinite(mask).all()
        assert mask.min() >= 0
        assert mask.max() <= 1


@BOTH
def test_masks_differ_and_are_determined_by_their_seed(config: SpatialConfig) -> None:
    drawn = masks(config, 3)
    assert torch.equal(drawn, masks(config, 3))
    assert not torch.equal(drawn, masks(config, 3, seed=1))
    assert not torch.equal(drawn[0], drawn[1])


def test_the_values_of_smooth_masks_are_spread_evenly() -> None:
    values = masks(SMOOTH, 100).flatten().sort().values
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert values[int(quantile * len(values))].item() == pytest.approx(quantile, abs=0.05)


def test_each_smooth_mask_has_clean_and_degraded_pixels() -> None:
    for mask in masks(SMOOTH, 100):
        assert mask.min() < 0.25
        assert mask.max() > 0.75


def test_smooth_masks_are_smooth_and_more_cells_make_smaller_spots() -> None:
    few, many = (masks(SpatialConfig(ramp_probability=0.0, cells=(n, n)), 40, 128, 128) for n in (2, 6))
    assert few.diff(dim=-1).abs().max() < 0.1, "of 64 pixels a cell"
    assert many.diff(dim=-1).abs().max() < 0.3, "of 21 pixels a cell"
    assert 2 < unevenness(many) / unevenness(few) < 4


def test_cells_are_square_in_pixels() -> None:
    wide = masks(SMOOTH, 60, 48, 192)
    assert unevenness(wide) == pytest.approx(unevenness(wide.transpose(1, 2)), rel=0.2)


def test_ramps_go_from_0_to_1_and_rise_along_one_direction_only() -> None:
    for mask in masks(RAMP, 50):
        assert mask.min().item() == pytest.approx(0, abs=1e-6)
        assert mask.max().item() == pytest.approx(1, abs=1e-5)
        for axis in (0, 1):
            steps = mask.diff(dim=axis)
            assert (steps >= -1e-6).all() or (steps <= 1e-6).all()
        corners = [mask[0, 0], mask[0, -1], mask[-1, 0], mask[-1, -1]]
        assert min(corners) == mask.min()
        assert max(corners) == mask.max()


def test_ramps_have_all_directions_and_bends() -> None:
    drawn = masks(RAMP, 200, 33, 33)
    rises = {(bool(mask[0, -1] > mask[0, 0]), bool(mask[-1, 0] > mask[0, 0])) for mask in drawn}
    assert len(rises) == 4
    middles = drawn[:, 16, 16]  # half-way: 0.5 without a bend, (1 - b) / (2 - b) with one, b up to 0.8
    assert 1 / 6 - 1e-3 <= middles.min() < 0.2
    assert 0.48 < middles.max() <= 0.5 + 1e-3


def test_ramps_have_the_probability_of_the_setting() -> None:
    drawn = masks(SpatialConfig(ramp_probability=0.3), 600, 16, 16)
    monotone = sum(
        all(bool((mask.diff(dim=axis) >= 0).all() or (mask.diff(dim=axis) <= 0).all()) for axis in (0, 1))
        for mask in drawn
    )
    # A smooth mask hardly ever rises everywhere.
    assert abs(monotone / 600 - 0.3) < 4 * (0.3 * 0.7 / 600) ** 0.5 + 0.01
