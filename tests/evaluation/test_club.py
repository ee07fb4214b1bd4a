"""CLUB for variables for which it has a closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from savl.evaluation import Interval, club
from savl.evaluation.club import contrast, gaussian_log_likelihood

SHORT: dict[str, Any] = {"width": 64, "rate": 3e-3, "repeats": 2}
"""Settings that suffice for a few dimensions and take a third of the time."""


def gaussians(n: int, d: int, rho: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal, correlated dimension by dimension: I = −½·d·log(1 − ρ²), CLUB = d·ρ²/(1 − ρ²).

    The samples have exactly this mean, variance and correlation, which reduces the random error.
    """
    normal = torch.randn(n, 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = torch.linalg.qr(normal - normal.mean(dim=0))[0] * math.sqrt(n)
    x, noise = exact.split(d, dim=1)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def test_the_contrast_is_that_of_all_pairs_of_different_samples() -> None:
    mean, log_variance, y = torch.randn(3, 7, 3, dtype=torch.float64)
    log_q = Normal(mean[:, None], (log_variance / 2).exp()[:, None]).log_prob(y[None]).sum(dim=2)
    others = log_q[~torch.eye(7, dtype=torch.bool)]
    assert contrast(mean, log_variance, y) == pytest.approx((log_q.diag().mean() - others.mean()).item())


def test_the_likelihood_is_that_of_a_gaussian_up_to_its_constant() -> None:
    mean, log_variance, y = torch.randn(3, 5, 3, dtype=torch.float64)
    expected = Normal(mean, (log_variance / 2).exp()).log_prob(y).sum(dim=1) + 1.5 * math.log(2 * math.pi)
    assert torch.allclose(gaussian_log_likelihood(mean, log_variance, y), expected)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9])
def test_the_right_conditional_gives_the_closed_form(rho: float) -> None:
    x, y = gaussians(500, 3, rho)
    found = contrast(rho * x, torch.full_like(x, math.log(1 - rho**2)), y)
    assert found == pytest.approx(500 / 499 * 3 * rho**2 / (1 - rho**2), abs=1e-9)


@pytest.mark.parametrize(("d", "rho", "settings"), [(1, 0.6, SHORT), (4, 0.6, {}), (2, 0.4, SHORT)])
def test_a_fitted_conditional_comes_near_it_and_stays_above_the_information(
    d: int, rho: float, settings: dict[str, Any]
) -> None:
    x, y = gaussians(2000, d, rho)
    found = club(x, y, **settings)
    assert found.value == pytest.approx(d * rho**2 / (1 - rho**2), rel=0.12)
    assert found.value > -0.5 * d * math.log(1 - rho**2)


def test_the_variance_stays_above_one_in_e() -> None:
    """With ρ = 0.95 the correct variance is 0.0975, below the minimum of 1/e: the contrast is ρ²·e."""
    x, y = gaussians(1500, 1, 0.95)
    assert club(x, y, **SHORT).value == pytest.approx(0.95**2 * math.e, rel=0.1)


def test_a_variance_that_follows_x_is_information() -> None:
    """With noise of variance 0.4 or 1.6 the contrast is ½·(E[σ²]·E[1/σ²] − 1)."""
    x = torch.randint(2, (3000,)).float()
    y = torch.where(x > 0, 1.6, 0.4).sqrt() * torch.randn(3000)
    assert club(x, y, **SHORT).value == pytest.approx(0.5 * (0.5 * (1 / 0.4 + 1 / 1.6) - 1), rel=0.25)


def test_independent_variables_have_none() -> None:
    found = club(torch.randn(800, 5), torch.randn(800, 3), **SHORT)
    assert abs(found.value) < 0.05
    assert found.low < 0 < found.high


def test_memorised_samples_are_not_information() -> None:
    assert club(torch.randn(100, 40), torch.randn(100, 5), **SHORT).value < 0.3


def test_constant_variables_have_none() -> None:
    x = torch.randn(100, 2)
    assert club(x, torch.full((100, 3), 0.1), steps=40).value == pytest.approx(0, abs=1e-6)
    assert club(torch.full((100, 3), 0.1), x, steps=40).value == pytest.approx(0, abs=0.05)


def test_labels_are_accepted_and_bounded_from_above() -> None:
    labels = torch.arange(400) % 4
    x = torch.nn.functional.one_hot(labels, 4) + 0.02 * torch.randn(400, 4)
    assert club(x, labels, steps=100).value > math.log(4)


def test_scaling_the_variables_changes_nothing() -> None:
    x, y = gaussians(100, 2, 0.8)
    assert club(1024 * x, y / 512, steps=40) == club(x, y, steps=40)


def test_results_depend_on_the_seed_only() -> None:
    x, y = gaussians(60, 1, 0.8)
    state = torch.get_rng_state()
    first = club(x, y, seed=3, steps=40)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    with torch.inference_mode():
        assert club(x * 1, y * 1, seed=3, steps=40) == first
    assert club(x, y, seed=4, steps=40) != first
    assert len(set(first.repeats)) == 3
    assert first == Interval.of(first.repeats, held_out=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.zeros(29, 1)}, "x and y must have as many samples as each other, got 30 and 29"),
        ({"x": torch.zeros(19), "y": torch.zeros(19)}, "x and y must have at least 20 samples, got 19"),
        ({"x": torch.full((30,), math.nan)}, "x must be finite, got nan in row 0"),
        ({"y": torch.zeros(30, 1, 1)}, r"y must have the shape \(n, d\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"rate": -1.0}, "rate must be above 0, got -1.0"),
    ],
)
def test_invalid_arguments_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        club(**({"x": torch.zeros(30, 2), "y": torch.zeros(30, 1)} | changes))
