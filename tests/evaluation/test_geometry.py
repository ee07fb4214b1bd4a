"""Participation ratio and directions of class means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.evaluation.geometry import STRAIGHT_RAYS, class_mean_geometry, participation_ratio

NAMES = ("noise", "blur", "jpeg")
GENERATOR = torch.Generator().manual_seed(0)


def rays(directions: Tensor, levels: int = 5) -> Tensor:
    """Return means ``(K, levels, R)`` that start at one point and move along the directions ``(K, R)``."""
    amounts = torch.arange(levels, dtype=torch.float64)[:, None]
    return 0.7 + amounts * directions.double()[:, None]


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=GENERATOR, dtype=torch.float64))[0]


def test_three_straight_orthogonal_rays_have_a_ratio_of_2_58() -> None:
    means = rays(3.0 * rotation(64)[:3])
    found = class_mean_geometry(means, NAMES)
    # Along each ray the coordinates are 0 to 4 in one class of three: variance 14/9, covariance of two rays -4/9.
    covariance = torch.full((3, 3), -4 / 9) + 2 * torch.eye(3)
    assert covariance.trace() ** 2 / covariance.square().sum() == pytest.approx(STRAIGHT_RAYS)
    assert found.participation_ratio == pytest.approx(STRAIGHT_RAYS) == pytest.approx(2.58, abs=0.005)
    assert list(found.cosines) == ["noise_blur", "noise_jpeg", "blur_jpeg"]
    assert list(found.cosines.values()) == pytest.approx([0, 0, 0], abs=1e-12)
    assert found.lengths == pytest.approx(dict.fromkeys(NAMES, 12.0))
    assert found.explained == pytest.approx((18 / 42, 18 / 42, 6 / 42))


def test_rays_on_one_line_have_a_ratio_of_1_and_opposite_directions() -> None:
    direction = torch.randn(64, generator=GENERATOR)
    found = class_mean_geometry(rays(torch.stack((direction, -2 * direction, -direction))), NAMES)
    assert found.participation_ratio == pytest.approx(1)
    assert list(found.cosines.values()) == pytest.approx([-1, -1, 1])
    assert found.explained == pytest.approx((1, 0, 0), abs=1e-12)


def test_the_direction_ends_at_the_strongest_level() -> None:
    means = rays(torch.eye(3))
    means[1, -1] = means[2, -1]
    found = class_mean_geometry(means, NAMES)
    assert found.cosines == pytest.approx({"noise_blur": 0, "noise_jpeg": 0, "blur_jpeg": 1})


def test_the_ratio_counts_equal_orthogonal_directions_whatever_their_scale() -> None:
    for count in (1, 2, 5):
        rows = torch.cat((torch.eye(count), -torch.eye(count))) @ rotation(8)[:count].float()
        assert participation_ratio(rows) == pytest.approx(count)
        assert participation_ratio((1e-3 * rows + 4).double().numpy()) == pytest.approx(count, rel=1e-3)


def test_positions_are_coordinates_along_principal_components() -> None:
    means = rays(torch.randn(3, 64, generator=GENERATOR))
    found = class_mean_geometry(means, NAMES)
    places = torch.tensor(found.positions, dtype=torch.float64).flatten(0, 1)
    rows = means.flatten(0, 1)
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(rows, rows))  # the means span three dimensions
    energy = places.square().sum(dim=0)
    assert (energy / energy.sum()).tolist() == pytest.approx(found.explained)
    assert (places.T @ places - energy.diag()).abs().max() < 1e-9
    mirrored = class_mean_geometry(-means, NAMES).positions
    torch.testing.assert_close(torch.tensor(mirrored).flatten(0, 1).abs().double(), places.abs())
    assert places.gather(0, places.abs().argmax(dim=0, keepdim=True)).min() > 0


@pytest.mark.parametrize("channels", [1, 2, 64])
def test_a_constant_field_has_no_directions(channels: int) -> None:
    found = class_mean_geometry(torch.full((3, 5, channels), 0.1), NAMES)
    assert found.participation_ratio == 0
    assert found.explained == (0, 0, 0)
    assert set(found.cosines.values()) == set(found.lengths.values()) == {0}


def test_means_with_a_gradient_are_accepted() -> None:
    means = rays(torch.eye(3)).float().requires_grad_()
    assert class_mean_geometry(means, NAMES).participation_ratio == pytest.approx(STRAIGHT_RAYS)


@pytest.mark.parametrize(
    ("means", "names", "message"),
    [
        (torch.zeros(15, 4), NAMES, r"means must have the shape \(K, L, R\), none of them 0, got \(15, 4\)"),
        (torch.zeros(3, 1, 4), NAMES, r"means must have at least two levels, got the shape \(3, 1, 4\)"),
        (torch.zeros(3, 5, 4), NAMES[:2], "names must have one name per degradation, 3, got 2"),
        (torch.full((3, 5, 4), math.nan), NAMES, "means must be finite"),
    ],
)
def test_invalid_means_are_refused(means: Any, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_mean_geometry(means, names)
