"""MINE for variables whose information is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from savl.evaluation import Interval, mine
from savl.evaluation.mine import _expectations, _Objective

SHORT: dict[str, Any] = {"width": 64, "rate": 2e-3, "steps": 200}
"""Settings that suffice for a few dimensions and take a tenth of the time."""


def gaussians(n: int, d: int, rho: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return standard normal samples that are correlated dimension by dimension: I = −½·d·log(1 − ρ²).

    The samples have exactly this mean, variance and correlation, which reduces the random error.
    """
    normal = torch.randn(n, 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = torch.linalg.qr(normal - normal.mean(dim=0))[0] * math.sqrt(n)
    x, noise = exact.split(d, dim=1)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize(("d", "rho"), [(1, 0.8), (2, 0.6)])
def test_correlated_gaussians_have_the_information_of_the_formula(d: int, rho: float) -> None:
    """The lower bound is nearly tight; 450 of 1,500 samples are held out in each of three repeats."""
    x, y = gaussians(1500, d, rho)
    truth = -0.5 * d * math.log(1 - rho**2)
    found = mine(x, y, **SHORT)
    assert truth - 0.09 < found.value < truth + 0.04
    assert found.low < truth


def test_the_default_settings_are_as_accurate() -> None:
    x, y = gaussians(600, 1, 0.8)
    assert 0.511 - 0.09 < mine(x, y, repeats=1, steps=300).value < 0.511 + 0.06


def test_independent_variables_have_none() -> None:
    x, _ = gaussians(600, 4, 0.0)
    y, _ = gaussians(600, 4, 0.0, seed=1)
    found = mine(x, y, **SHORT)
    assert -0.05 < found.value < 0.02
    assert found.low < 0.02


def test_memorised_samples_are_not_information() -> None:
    x, y = torch.randn(2, 100, 40)
    assert mine(x, y, repeats=2, **SHORT).value < 0.05


def test_dependence_without_correlation_is_found() -> None:
    x = math.pi * (2 * torch.rand(800, 1) - 1)
    y = x.cos() + 0.3 * torch.randn(800, 1)
    assert abs(torch.corrcoef(torch.cat((x, y), 1).T)[0, 1]) < 0.15
    assert mine(x, y, repeats=2, **SHORT).value > 0.5


def test_labels_that_can_be_read_off_have_the_information_of_their_entropy() -> None:
    labels = torch.arange(600) % 4
    x = torch.nn.functional.one_hot(labels, 4) + 0.02 * torch.randn(600, 4)
    found = mine(x, [f"level {label}" for label in labels.tolist()], repeats=2, **SHORT)
    assert found.value == pytest.approx(math.log(4), abs=0.05)


def test_scaling_the_variables_changes_nothing() -> None:
    x, y = gaussians(100, 2, 0.8)
    settings = SHORT | {"steps": 40, "repeats": 1}
    assert mine(1024 * x, y / 512, **settings) == mine(x, y, **settings)


def test_a_constant_variable_has_no_information() -> None:
    x, _ = gaussians(100, 2, 0.0)
    assert abs(mine(torch.full((100, 3), 0.1), x, repeats=2, **SHORT).value) < 0.02


def test_results_depend_on_the_seed_only() -> None:
    x, y = gaussians(60, 1, 0.8)
    settings = SHORT | {"steps": 40}
    state = torch.get_rng_state()
    first = mine(x, y, seed=3, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    with torch.inference_mode():
        assert mine(x * 1, y * 1, seed=3, **settings) == first
    assert mine(x, y, seed=4, **settings) != first
    assert len(set(first.repeats)) == 3
    assert first == Interval.of(first.repeats, held_out=0.3)


def test_every_pair_of_the_product_is_of_different_samples_and_there_once() -> None:
    """With T(i, j) = log 10^(3·i + j), the digits of the sum of exp T list the pairs."""
    index = torch.arange(3.0)[:, None].double()

    class Count(nn.Module):
        def forward(self, pairs: Tensor) -> Tensor:
            return (3 * pairs[:, :1] + pairs[:, 1:]) * math.log(10)

    joint, log_mean = _expectations(Count(), index, index, shifts=2)
    assert joint.item() / math.log(10) == pytest.approx((0 + 4 + 8) / 3)
    assert 6 * log_mean.exp().item() == pytest.approx(11_101_110)


def test_the_gradient_divides_by_the_moving_average() -> None:
    """T = w·x·y on two samples, so that E_P[T], E[exp T] and their gradients can be written down."""
    x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[0.5], [1.0]]).double()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    class Product(nn.Module):
        def forward(self, pairs: Tensor) -> Tensor:
            return weight * pairs[:, :1] * pairs[:, 1:]

    objective, average = _Objective(x, y), None
    for value in (0.7, 0.2):
        weight.data.fill_(value)
        weight.grad = None
        objective(Product(), torch.tensor([0, 1])).backward()
        mean = math.exp(value)  # both other pairs have x·y = 1
        average = mean if average is None else 0.99 * average + 0.01 * mean
        assert weight.grad is not None
        assert weight.grad.item() == pytest.approx(mean / average - (0.5 + 2.0) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.zeros(29, 1)}, "x and y must have as many samples as each other, got 30 and 29"),
        ({"x": torch.zeros(19), "y": torch.zeros(19)}, "x and y must have at least 20 samples, got 19"),
        ({"x": torch.full((30,), math.nan)}, "x must be finite, got nan in row 0"),
        ({"y": torch.zeros(30, 1, 1)}, r"y must have the shape \(n, d\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 1}, "batch must be at least 2, got 1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
    ],
)
def test_invalid_arguments_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mine(**({"x": torch.zeros(30, 2), "y": torch.zeros(30, 1)} | changes))
