"""Statistics of degradation fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from savl.analysis.features import Features, measure_fields, severity_map
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


def test_severity_is_how_far_the_variance_lies_below_that_of_the_prior(network: Make, y: Tensor) -> None:
    features, _ = measure_fields(network(), y)
    assert features.severity is not None
    assert features.variance is not None
    np.testing.assert_allclose(features.severity, 1 - features.variance)


@pytest.mark.parametrize("block", [1, 7, 16, 40])
def test_an_image_in_parts_gives_what_it_gives_whole(network: Make, y: Tensor, block: int) -> None:
    model = network()
    whole, parts = measure_fields(model, y), measure_fields(model, y, block=block)
    for name in ("mean", "variance", "kl"):
        np.testing.assert_allclose(getattr(parts[0], name), getattr(whole[0], name), atol=2e-6)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-5, rtol=1e-5)


def test_no_part_that_is_computed_at_once_grows_with_the_image(network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    estimate = SAVL.estimate

    def spy(self: SAVL, lr: Tensor, seed: int | None = None) -> object:
        seen.append(tuple(lr.shape[2:]))
        return estimate(self, lr, seed)

    monkeypatch.setattr(SAVL, "estimate", spy)
    model = network()
    measure_fields(model, torch.rand(1, 3, 70, 90), block=16)
    assert len(seen) == 5 * 6
    assert max(map(max, seen)) <= 16 + model.config.receptive_field


def test_a_deterministic_code_has_a_mean_alone(network: Make, y: Tensor) -> None:
    features, variance = measure_fields(network(degradation_code="deterministic"), y, block=16)
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
