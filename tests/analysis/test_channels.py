"""Response of channels to a single degradation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from savl.analysis.channels import (
    SWEEP_LEVELS,
    ChannelResponse,
    channel_response,
    deviations,
    direction_cosine,
    regress,
)
from savl.analysis.controlled import NOISE, DegradedFeatures, degrade_at_every_level
from savl.analysis.features import Features, measure_fields
from savl.network import SAVL


def test_regression_is_that_of_least_squares_column_by_column() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=50)
    y = np.stack((3 * x + 1, random.normal(size=50), np.full(50, 0.1), -x + random.normal(size=50)), axis=1)
    slope, r_squared = regress(y, x)
    for column in (0, 1, 3):
        assert slope[column] == pytest.approx(np.polyfit(x, y[:, column], 1)[0])
        assert r_squared[column] == pytest.approx(np.corrcoef(x, y[:, column])[0, 1] ** 2)
    assert r_squared[0] == pytest.approx(1)
    assert slope[2] == r_squared[2] == 0


def test_a_constant_channel_has_a_deviation_of_one() -> None:
    parts = [Features(np.asarray(rows, np.float32), None, None) for rows in ([[1, 5]], [[3, 5], [5, 5]])]
    assert deviations(parts).tolist() == [pytest.approx(np.std([1, 3, 5])), 1.0]


def test_a_sweep_starts_at_zero_and_ends_at_the_effect_of_the_strongest_level(network: Callable[..., SAVL]) -> None:
    model = network()
    z = 0.5 + 0.02 * torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    noisy = degrade_at_every_level(z, NOISE, (5,))
    features, _ = measure_fields(model, noisy)
    amounts = np.repeat(NOISE.amounts, 3)
    unit = np.asarray([1.0, 2.0, 1.0, 1.0, 1.0])
    crop, level = np.tile(np.arange(3), 5), np.repeat(np.arange(5), 3)
    data = DegradedFeatures(NOISE, np.zeros_like(crop), crop, level, (features,))
    found = channel_response(model, z, data, 0, unit, (7,))
    assert found.amounts == tuple(np.linspace(0, 30, SWEEP_LEVELS))
    sweep = np.asarray(found.sweep)
    assert sweep.shape == (5, SWEEP_LEVELS)
    assert not sweep[:, 0].any()
    by_hand = features.mean.reshape(5, 3, 5).mean(axis=1)
    moved = (by_hand[-1] - by_hand[0]) / unit
    np.testing.assert_allclose(sweep[:, -1], moved, atol=0.1 * np.abs(moved).max())  # another draw of noise
    assert np.abs(moved).max() > 0.01
    slope, r_squared = regress(features.mean.astype(float) / unit, amounts / 30)
    assert found.slope == pytest.approx(slope.tolist())
    assert found.r_squared == pytest.approx(r_squared.tolist())


def test_directions_are_compared_by_their_cosine() -> None:
    one = ChannelResponse("noise", (0, 0), (1.0, 0.0), (0, 1), ((0, 1), (0, 0)))
    assert direction_cosine(one, replace(one, slope=(-3.0, 0.0))) == pytest.approx(-1)
    assert direction_cosine(one, replace(one, slope=(1.0, 1.0))) == pytest.approx(0.5**0.5)
    assert direction_cosine(one, replace(one, slope=(0.0, 0.0))) == 0
