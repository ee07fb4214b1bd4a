"""The degradation field: one posterior per pixel, and its severity over the whole image."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from savl import ops
from savl.network import DegradationField
from savl.ops.philox import standard_normal

SHAPE = (2, 5, 4, 6)


def test_a_field_holds_what_gaussian_posterior_says() -> None:
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
def test_a_deterministic_code_is_a_mean_and_nothing_else(seed: int | None) -> None:
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


def test_a_field_cannot_change() -> None:
    field = DegradationField(mu=torch.zeros(SHAPE))
    with pytest.raises(dataclasses.FrozenInstanceError):
        field.mu = torch.ones(SHAPE)  # type: ignore[misc]
