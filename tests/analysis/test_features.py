"""Statistics of degradation fields, and descriptors of content."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from savl.analysis.features import (
    Features,
    describe_content,
    measure_fields,
    principal_components,
    severity_map,
)
from savl.network import SAVL

Make = Callable[..., SAVL]


@pytest.fixture
def y() -> Tensor:
    return torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))


def test_the_statistics_are_means_of_the_field_over_its_pixels(network: Make, y: Tensor) -> None:
    model = network()
    features, variance = measure_fields(model, y)
    with torch.no_grad():
        field = model.estimate(y)
    assert field is not None
    assert field.variance is not None
    assert field.kl is not None
    assert variance is not None
    np.testing.assert_allclose(features.mean, field.mu.mean(dim=(2, 3)), atol=1e-6)
    np.testing.assert_allclose(features.variance, field.variance.mean(dim=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(features.kl, field.kl.mean(dim=(1, 2)), rtol=1e-5)
    torch.testing.assert_close(variance, field.variance)
    torch.testing.assert_close(severity_map(variance), field.severity)
    assert features.mean.std() > 0.01, "a constant would prove nothing"


def test_severity_is_the_variance_of_the_prior_minus_the_mean_variance(network: Make, y: Tensor) -> None:
    features, _ = measure_fields(network(), y)
    assert features.severity is not None
    assert features.variance is not None
    np.testing.assert_allclose(features.severity, 1 - features.variance)


@pytest.mark.parametrize("tile", [1, 7, 16, 40])
def test_the_statistics_do_not_depend_on_the_tile_size(network: Make, y: Tensor, tile: int) -> None:
    model = network()
    whole, tiled = measure_fields(model, y), measure_fields(model, y, tile=tile)
    for name in ("mean", "variance", "kl"):
        np.testing.assert_allclose(getattr(tiled[0], name), getattr(whole[0], name), atol=2e-6)
    torch.testing.assert_close(tiled[1], whole[1], atol=1e-5, rtol=1e-5)


def test_the_size_of_the_tiles_does_not_grow_with_the_image(network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    estimate = SAVL.estimate

    def spy(self: SAVL, lr: Tensor, seed: int | None = None) -> object:
        seen.append(tuple(lr.shape[2:]))
        return estimate(self, lr, seed)

    monkeypatch.setattr(SAVL, "estimate", spy)
    model = network()
    measure_fields(model, torch.rand(1, 3, 70, 90), tile=16)
    assert len(seen) == 5 * 6
    assert max(map(max, seen)) <= 16 + model.config.receptive_field


def test_a_deterministic_code_has_only_a_mean(network: Make, y: Tensor) -> None:
    features, variance = measure_fields(network(degradation_code="deterministic"), y, tile=16)
    assert features.mean.shape == (2, 5)
    assert features.variance is features.kl is features.severity is variance is None


def test_a_network_without_a_field_is_refused(network: Make, y: Tensor) -> None:
    with pytest.raises(ValueError, match="model has no degradation field to analyze"):
        measure_fields(network(degradation_code="none"), y)


def test_groups_of_images_are_joined_in_their_order(network: Make, y: Tensor) -> None:
    model = network()
    both, _ = measure_fields(model, y)
    joined = Features.join([measure_fields(model, image[None])[0] for image in y])
    assert len(joined) == 2
    for name in ("mean", "variance", "kl"):
        np.testing.assert_allclose(getattr(joined, name), getattr(both, name), atol=1e-6)
    assert Features.join([Features(both.mean, None, None)] * 2).variance is None


def crops(count: int) -> Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(count))


def test_descriptors_are_the_colours_and_the_texture_of_sixteen_cells() -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    left_red, striped = flat.clone(), flat.clone()
    left_red[:, 0, :, :4] = 1.0
    striped[:, :, :8:2] = 0.6  # horizontal stripes above
    base, red, stripes = (describe_content(each)[0] for each in (flat, left_red, striped))
    assert base.shape == (48 + 32,)
    changed = (red[:48] - base[:48]).view(3, 4, 4)
    assert bool((changed[0, :, 0] == 0.5).all())
    assert changed.count_nonzero() == 4, "four cells are redder, and nothing else has another colour"
    sideways, downwards = (stripes[48:] - base[48:]).view(2, 4, 4)
    assert sideways.count_nonzero() == 0
    assert bool((downwards[:2] > 5).all())
    assert bool((downwards[3] == 0).all())


def test_principal_components_report_the_share_of_variance_they_explain() -> None:
    described = describe_content(crops(6))
    content = principal_components([described[:2], described[2:]], 99)
    assert content.values.shape == (6, 5), "six crops differ in five directions"
    assert content.explained == pytest.approx(1.0)
    few = principal_components([described], 2)
    assert few.values.shape == (6, 2)
    np.testing.assert_allclose(few.values, content.values[:, :2], rtol=1e-4)
    energy = np.square(content.values).sum(axis=0)
    assert few.explained == pytest.approx(energy[:2].sum() / energy.sum())
    assert list(energy) == sorted(energy, reverse=True)


def test_colours_and_texture_have_the_same_weight() -> None:
    described = describe_content(crops(8))
    louder = described.clone()
    louder[:, :48] *= 100
    np.testing.assert_allclose(
        principal_components([louder], 3).values, principal_components([described], 3).values, rtol=1e-3, atol=1e-5
    )


def test_identical_crops_have_content_zero() -> None:
    content = principal_components([describe_content(crops(1).expand(4, -1, -1, -1))], 2)
    assert np.abs(content.values).max() < 1e-6
    assert np.isfinite(content.explained)
