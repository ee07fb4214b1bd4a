"""HSIC against its definition by enumeration and its value for Gaussians; properties of the permutation test."""

from __future__ import annotations

import itertools
import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.evaluation import HSICResult, hsic


def gaussians(n: int, rho: float) -> tuple[Tensor, Tensor]:
    """Return standard normal samples with a correlation, ``(n, 1)`` each."""
    x, noise = torch.randn(2, n, 1, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def gram(values: Tensor, bandwidth: float) -> Tensor:
    squared = (values[:, None] - values[None]).square().sum(dim=2)
    return (-squared / (2 * bandwidth**2)).exp()


def by_enumeration(K: Tensor, L: Tensor) -> float:
    """Return the U-statistic: the mean over all ordered choices of four different samples."""
    terms = [
        K[i, j] * L[i, j] + K[i, j] * L[q, r] - 2 * K[i, j] * L[i, q]
        for i, j, q, r in itertools.permutations(range(len(K)), 4)
    ]
    return torch.stack(terms).mean().item()


def by_formula(K: Tensor, L: Tensor) -> float:
    """Return equation 5 of Song et al. with explicit matrices."""
    n, one = len(K), torch.ones(len(K), dtype=torch.float64)
    K, L = (matrix - torch.diag(matrix.diag()) for matrix in (K, L))
    terms = (
        (K @ L).trace() + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return (terms / (n * (n - 3))).item()


def population(rho: float, bandwidth: float) -> float:
    """Return HSIC of two correlated standard normals with one bandwidth, by Gaussian integrals."""
    s = bandwidth**2
    together = ((1 + 2 / s) ** 2 - (2 * rho / s) ** 2) ** -0.5
    apart = 1 / (1 + 2 / s)
    between = ((1 + 1 / (s + 1)) ** 2 - (rho / (s + 1)) ** 2) ** -0.5 / (1 + 1 / s)
    return together + apart - 2 * between


@pytest.mark.parametrize("n", [4, 6, 7])
def test_hsic_is_the_u_statistic(n: int) -> None:
    x, y = torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    K, L = gram(x, 0.8), gram(y, 1.7)
    found = hsic(x, y, permutations=0, bandwidths=(0.8, 1.7)).value
    assert found == pytest.approx(by_enumeration(K, L), rel=1e-10)
    assert found == pytest.approx(by_formula(K, L), rel=1e-10)


@pytest.mark.parametrize(("rho", "bandwidth"), [(0.0, 1.0), (0.5, 1.0), (0.8, 0.5), (-0.8, 2.0)])
def test_the_mean_of_hsic_is_the_population_value_at_every_size(rho: float, bandwidth: float) -> None:
    for n, repeats in ((6, 1500), (100, 150)):
        values = torch.tensor(
            [hsic(*gaussians(n, rho), permutations=0, bandwidths=(bandwidth,) * 2).value for _ in range(repeats)]
        )
        assert abs(values.mean() - population(rho, bandwidth)) < 4 * values.std() / math.sqrt(repeats)


def test_the_population_value_of_independent_variables_is_0_and_grows_with_the_correlation() -> None:
    values = [population(rho, 1.0) for rho in (0.0, 0.3, 0.6, 0.9)]
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert values == sorted(values)


def test_p_values_of_independent_variables_are_uniform() -> None:
    results = [hsic(*gaussians(20, 0.0), permutations=19, seed=seed) for seed in range(400)]
    ranks = torch.tensor([result.p_value for result in results]).mul(20).round().sort().values
    assert ranks.min() >= 1
    assert ranks.max() <= 20
    share = torch.tensor([(ranks <= rank).double().mean() for rank in range(1, 21)])
    assert (share - torch.arange(1, 21) / 20).abs().max() < 1.63 / math.sqrt(400)  # Kolmogorov, one in a hundred


def test_p_values_of_dependent_variables_are_as_small_as_they_can_be() -> None:
    x, y = gaussians(150, 0.7)
    assert hsic(x, y, permutations=99).p_value == 1 / 100
    assert hsic(x, x.square(), permutations=99).p_value == 1 / 100


def test_equal_permuted_values_raise_the_p_value() -> None:
    """With two pairs of equal samples, a third of all permutations keeps the pairs together."""
    x = torch.tensor([0.1, 0.1, 0.7, 0.7])
    assert hsic(x, ["a", "a", "b", "b"], permutations=999).p_value == pytest.approx(1 / 3, abs=0.06)


def grouped(groups: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return independent x and y ``(groups·size, 1)``, each nearly constant within a group, and the groups."""
    members = torch.arange(groups).repeat_interleave(size)
    x, y = torch.randn(2, groups, 1, dtype=torch.float64)
    return x[members] + 0.1 * torch.randn(len(members), 1), y[members] + 0.1 * torch.randn(len(members), 1), members


def test_similarity_within_groups_does_not_count_as_dependence() -> None:
    drawn = [grouped(10, 5) for _ in range(200)]
    results = [hsic(x, y, groups=groups, permutations=19) for x, y, groups in drawn]
    rejected = sum(result.p_value <= 1 / 20 for result in results)
    assert rejected < 10 + 4 * math.sqrt(200 * 0.05 * 0.95), "5 % of 200 are 10"
    values = torch.tensor([result.value for result in results])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    without = [hsic(x, y, permutations=19) for x, y, _ in drawn[:20]]
    assert sum(result.p_value <= 1 / 20 for result in without) > 15, "there is nothing to be misled by"


def test_dependence_between_groups_is_found() -> None:
    x, _, groups = grouped(60, 4)
    found = hsic(x, x.square(), groups=groups, permutations=99)
    assert found.p_value == 1 / 100
    assert found.normalised > 0.2


def test_groups_are_permuted_with_groups_of_the_same_size_row_for_row() -> None:
    """Four groups of sizes 3, 3, 2 and 1 have two permutations: the identity, and the exchange of the first two."""
    groups = ["a"] * 3 + ["b"] * 3 + ["c"] * 2 + ["d"]
    x = torch.tensor([1.0, 2, 3, 7, 8, 9, 20, 21, 30])
    order = torch.tensor([3, 4, 5, 0, 1, 2, 6, 7, 8])
    alone = [hsic(x, values, permutations=0).value for values in (x, x[order])]
    found = hsic(x, x, groups=groups, permutations=400)
    assert found.value == pytest.approx((alone[0] - alone[1]) / 2, rel=0.2)
    assert found.p_value == pytest.approx(0.5, abs=0.1)


def test_whole_groups_are_drawn_if_there_are_too_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["savl.evaluation.hsic"], "MOST", 50)
    x, y, groups = grouped(30, 4)
    assert hsic(x, y, groups=groups).samples == 48


def test_equally_distant_samples_show_no_dependence() -> None:
    flat = [hsic(list("abcde"), list("abcde")), hsic(torch.randn(5), torch.randn(5), bandwidths=(1e9, 1e9))]
    for result in flat:
        assert result.value == pytest.approx(0.0, abs=1e-14)
        assert (result.p_value, result.normalised) == (1.0, 0.0)


def test_without_permutations_the_p_value_is_1() -> None:
    assert hsic(*gaussians(50, 0.9), permutations=0).p_value == 1


def test_the_normalised_value_is_1_for_a_variable_with_itself_in_any_units() -> None:
    x = torch.randn(60, 3)
    assert hsic(x, 8 * x, permutations=0).normalised == pytest.approx(1)
    assert hsic(x, -x, permutations=0).normalised == pytest.approx(1)


def test_the_normalised_value_is_that_of_the_formula_and_symmetric() -> None:
    x, y = gaussians(40, 0.6)
    K, L = gram(x, 1.0), gram(y, 2.0)
    expected = by_formula(K, L) / math.sqrt(by_formula(K, K) * by_formula(L, L))
    assert hsic(x, y, permutations=0, bandwidths=(1.0, 2.0)).normalised == pytest.approx(expected)
    assert hsic(y, x, permutations=0, bandwidths=(2.0, 1.0)).normalised == pytest.approx(expected)


def test_the_bandwidth_is_the_median_distance() -> None:
    x, y = gaussians(41, 0.6)
    medians = [(values - values.T)[*torch.triu_indices(41, 41, 1)].abs().median().item() for values in (x, y)]
    assert hsic(x, y, permutations=0) == hsic(x, y, permutations=0, bandwidths=(medians[0], medians[1]))


def test_the_bandwidth_is_that_of_different_samples_if_most_are_equal() -> None:
    y = torch.zeros(50, dtype=torch.int64)
    y[:5] = 1
    x = 3 * y[:, None] + torch.randn(50, 2)
    result = hsic(x, y, permutations=99)
    assert result == hsic(x, y, permutations=99, bandwidths=(None, math.sqrt(2)))
    assert result.p_value == 1 / 100


def test_a_constant_variable_depends_on_nothing() -> None:
    nothing = HSICResult(value=0.0, p_value=1.0, normalised=0.0, samples=30)
    x = torch.randn(30, 2)
    assert hsic(torch.full((30, 3), 0.1), x) == nothing
    assert hsic(x, ["a"] * 30) == nothing


def test_some_samples_are_drawn_if_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["savl.evaluation.hsic"], "MOST", 50)
    x, y = gaussians(120, 0.8)
    first = hsic(x, y, seed=1, permutations=19)
    assert first.samples == 50
    assert first.p_value == 1 / 20
    assert first == hsic(x, y, seed=1, permutations=19)
    assert first.value != hsic(x, y, seed=2, permutations=19).value
    assert hsic(x[:50], y[:50], permutations=0).samples == 50


def test_results_depend_on_the_seed_only() -> None:
    x, y = gaussians(40, 0.2)
    state = torch.get_rng_state()
    first = hsic(x, y, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert hsic(x, y, seed=3) == first
    other = hsic(x, y, seed=4)
    assert other.p_value != first.p_value
    assert other.value == first.value


def test_json_holds_every_number() -> None:
    result = hsic(*gaussians(20, 0.5), permutations=9)
    assert HSICResult(**json.loads(json.dumps(result.to_json(), allow_nan=False))) == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.zeros(9, 1)}, "x and y must have as many samples as each other, got 10 and 9"),
        ({"x": torch.zeros(3), "y": torch.zeros(3)}, "x and y must have at least 4 samples, got 3"),
        ({"x": torch.full((10,), math.inf)}, "x must be finite, got inf in row 0"),
        ({"permutations": -1}, "permutations must be at least 0, got -1"),
        (
            {"bandwidths": (0.0, None)},
            r"bandwidths must be above 0 and finite, or None for the median, got \(0.0, None\)",
        ),
        ({"bandwidths": (None, math.nan)}, "bandwidths must be above 0"),
        ({"x": torch.tensor([1e200, -1e200] * 5, dtype=torch.float64)}, r"that distances overflow, got up to 1e\+200"),
        ({"groups": [0] * 5 + [1] * 5, "permutations": 0}, "permutations must be at least 1 with groups, got 0"),
        ({"groups": [0] * 4 + [1] * 6}, r"groups must be two or more of one size, .* got sizes \[4, 6\]"),
        ({"groups": [0] * 9}, "x and groups must have as many samples as each other, got 10 and 9"),
    ],
)
def test_invalid_arguments_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hsic(**({"x": torch.zeros(10, 2), "y": torch.zeros(10, 1)} | changes))
