"""The amortized estimator, and the degradation field built from its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from savl import ops
from savl.network import CONFIGS, AmortizedEstimator, DegradationField, SAVLConfig
from savl.network.estimator import LOGVAR_LIMIT
from savl.ops.philox import standard_normal

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]

DILATIONS = [pytest.param((1, 2), id="two"), pytest.param((2, 4), id="holes-closed"), pytest.param((), id="none")]


@pytest.fixture(scope="module")
def estimator(small_config: Small, perturb_parameters: PerturbParameters) -> AmortizedEstimator:
    return perturb_parameters(AmortizedEstimator(small_config()))


def both(estimator: AmortizedEstimator, y: Tensor) -> Tensor:
    """Return mu and logvar, concatenated."""
    mu, logvar = estimator(y)
    assert logvar is not None
    return torch.cat((mu, logvar), dim=1)


def test_the_estimator_returns_a_mean_and_a_log_variance_for_every_pixel(estimator: AmortizedEstimator) -> None:
    mu, logvar = estimator(torch.rand(2, 3, 5, 7, dtype=torch.float64))
    assert mu.shape == (2, 6, 5, 7)
    assert logvar is not None
    assert logvar.shape == (2, 6, 5, 7)


def test_the_head_returns_the_means_before_the_log_variances(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    estimator = perturb_parameters(AmortizedEstimator(small_config(estimator_high_pass=False)))
    y = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    mu, logvar = estimator(y)
    features = estimator.head(estimator.body(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    assert torch.equal(mu, features[:, :6])
    assert logvar is not None
    assert torch.equal(logvar, features[:, 6:].clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT))


def test_a_deterministic_code_has_no_log_variance(small_config: Small) -> None:
    estimator = AmortizedEstimator(small_config(degradation_code="deterministic"))
    mu, logvar = estimator(torch.rand(1, 3, 4, 4))
    assert mu.shape == (1, 6, 4, 4)
    assert logvar is None
    assert estimator.head.out_channels == 6, "the head has outputs that nobody reads"


@pytest.mark.parametrize("dilations", DILATIONS)
def test_a_pixel_changes_the_field_only_within_the_receptive_field(
    dilations: tuple[int, ...], small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    config = small_config(estimator_dilations=dilations)
    estimator = perturb_parameters(AmortizedEstimator(config))
    side, centre, reach = 2 * config.receptive_field + 1, config.receptive_field, config.receptive_field // 2
    y = torch.rand(1, 3, side, side, dtype=torch.float64)
    changed = y.clone()
    changed[0, 1, centre, centre] += 0.5

    differs = (both(estimator, y) != both(estimator, changed)).any(dim=1)[0].nonzero()

    assert differs.amin(dim=0).tolist() == [centre - reach] * 2, "the receptive field starts elsewhere than it says"
    assert differs.amax(dim=0).tolist() == [centre + reach] * 2, "the receptive field ends elsewhere than it says"


@pytest.mark.parametrize("name", ["savl-base", "savl-tiny"])
def test_the_named_configurations_see_exactly_their_receptive_field(name: str) -> None:
    config = CONFIGS[name]
    estimator = AmortizedEstimator(config)
    side = config.receptive_field + 4
    y = torch.rand(1, 3, side, side, requires_grad=True)
    mu, _ = estimator(y)
    mu[0, :, side // 2, side // 2].sum().backward()
    seen = y.grad[0].abs().sum(dim=0) != 0
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[2:-2, 2:-2] = True
    assert torch.equal(seen, expected), f"{int(seen.sum())} pixels seen, {config.receptive_field}² expected"


def test_the_field_of_a_crop_with_a_halo_is_the_crop_of_the_field(
    estimator: AmortizedEstimator, small_config: Small
) -> None:
    halo = small_config().receptive_field // 2
    y = torch.rand(1, 3, 24, 30, dtype=torch.float64)
    whole = both(estimator, y)
    crop = both(estimator, y[:, :, 10 - halo : 16 + halo, 12 - halo : 20 + halo])
    torch.testing.assert_close(crop[:, :, halo:-halo, halo:-halo], whole[:, :, 10:16, 12:20], rtol=0, atol=1e-12)


def test_parameters_are_shared_over_pixels(estimator: AmortizedEstimator, small_config: Small) -> None:
    reach = small_config().receptive_field // 2
    y = torch.rand(1, 3, 24, 24, dtype=torch.float64)
    field = both(estimator, y)
    moved = both(estimator, y.roll((3, 5), dims=(2, 3)))
    inside = (..., slice(reach + 3, 24 - reach), slice(reach + 5, 24 - reach))
    torch.testing.assert_close(moved[inside], field.roll((3, 5), dims=(2, 3))[inside], rtol=0, atol=1e-12)


def test_images_of_a_batch_do_not_affect_each_other(estimator: AmortizedEstimator) -> None:
    y = torch.rand(3, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(both(estimator, y)[1:2], both(estimator, y[1:2]), rtol=0, atol=1e-12)


def test_log_variances_stay_where_their_exponential_is_finite(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    estimator = perturb_parameters(AmortizedEstimator(small_config()))
    with torch.no_grad():
        estimator.head.weight *= 1e4
    _, logvar = estimator(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    assert logvar is not None
    assert logvar.min().item() == -LOGVAR_LIMIT
    assert logvar.max().item() == LOGVAR_LIMIT
    assert torch.isfinite(logvar.to(torch.float16).exp()).all()


@pytest.mark.parametrize("name", ["savl-base", "savl-tiny"])
def test_an_untrained_field_has_the_variance_of_the_prior_and_different_means(name: str) -> None:
    torch.manual_seed(0)
    mu, logvar = AmortizedEstimator(CONFIGS[name])(torch.rand(1, 3, 16, 16) - 0.45)
    assert logvar is not None
    assert not logvar.any()
    assert 0.05 < mu.std(dim=(2, 3)).median().item() < 2.0


def test_the_estimator_does_not_depend_on_brightness_and_colour(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    y = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    tinted = y + torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64).view(1, 3, 1, 1)
    for high_pass in (True, False):
        estimator = perturb_parameters(AmortizedEstimator(small_config(estimator_high_pass=high_pass)))
        same = torch.allclose(both(estimator, y), both(estimator, tinted), rtol=0, atol=1e-9)
        assert same == high_pass


SHAPE = (2, 5, 4, 6)


def test_a_field_contains_the_results_of_gaussian_posterior() -> None:
    mu, logvar = torch.randn(SHAPE), torch.randn(SHAPE)
    field = DegradationField.from_posterior(mu, logvar, seed=9)
    posterior = ops.gaussian_posterior(mu, logvar, seed=9)
    assert field.mu is mu
    assert field.logvar is logvar
    for name in ("sample", "kl", "severity", "variance"):
        assert torch.equal(getattr(field, name), getattr(posterior, name)), name


def test_a_field_without_a_seed_has_its_mean_for_a_sample() -> None:
    mu = torch.randn(SHAPE)
    assert torch.equal(DegradationField.from_posterior(mu, torch.zeros(SHAPE)).sample, mu)


def test_a_seed_gives_the_sample_of_that_seed() -> None:
    mu, logvar = torch.randn(SHAPE), torch.randn(SHAPE)
    sample = DegradationField.from_posterior(mu, logvar, seed=3).sample
    torch.testing.assert_close(sample, mu + torch.exp(logvar / 2) * standard_normal(SHAPE, 3))


@pytest.mark.parametrize("seed", [None, 7])
def test_a_deterministic_code_has_only_a_mean(seed: int | None) -> None:
    mu = torch.randn(SHAPE)
    field = DegradationField.from_posterior(mu, None, seed)
    assert field.mu is mu
    assert field.sample is mu
    present = [name for name in ("logvar", "kl", "severity", "variance") if getattr(field, name) is not None]
    assert not present, f"a deterministic code has no {present}"


def test_the_posterior_comes_from_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int | None] = []

    def spy(mu: Any, logvar: Any, eps: Any = None, *, seed: int | None = None, **_: Any) -> ops.GaussianPosterior:
        calls.append(seed)
        return ops.GaussianPosterior(*(torch.full((1,), float(n)) for n in range(6)))

    monkeypatch.setattr(ops, "gaussian_posterior", spy)
    field = DegradationField.from_posterior(torch.zeros(SHAPE), torch.zeros(SHAPE), seed=5)
    assert calls == [5]
    assert [float(getattr(field, name)) for name in ("sample", "kl", "severity", "variance")] == [0, 1, 2, 3]


def test_a_field_is_immutable() -> None:
    field = DegradationField(mu=torch.zeros(SHAPE))
    with pytest.raises(dataclasses.FrozenInstanceError):
        field.mu = torch.ones(SHAPE)  # type: ignore[misc]
