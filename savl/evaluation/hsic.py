"""HSIC: a kernel statistic of the dependence of two variables, with a permutation test."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from savl.evaluation.samples import Samples, as_labels, as_variable, check_lengths

MOST = 2000
"""Largest number of samples that are compared. A kernel matrix then takes 32 MB; about seven exist at a time."""
_FEWEST = 4
_ROUNDING = 1e-12
"""Relative rounding error of two values that should be equal."""
_NOTHING = 1e-14
"""Rounding error of a value that should be 0; entries of the kernel matrices are at most 1."""


@dataclass(frozen=True)
class HSICResult:
    """Strength and significance of the dependence of two variables."""

    value: float
    """HSIC; distributed around 0 for independent variables, so it may be negative."""
    p_value: float
    """Share of pairings (random and true) whose HSIC is at least as large; small for dependent variables."""
    normalised: float
    """HSIC in [-1, 1], 1 for a variable with itself; comparable between codes of different sizes and scales."""
    samples: int
    """Number of samples that were compared."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def hsic(
    x: Samples,
    y: Samples,
    *,
    groups: Samples | None = None,
    permutations: int = 200,
    seed: int = 0,
    bandwidths: tuple[float | None, float | None] = (None, None),
) -> HSICResult:
    """Compute the unbiased Hilbert–Schmidt independence criterion (Song et al., JMLR 2012, eq. 5) by Gaussian kernels.

    With K and L the kernel matrices of x and y, their diagonals set to 0,
    ``HSIC = [tr(KL) + 1ᵀK1·1ᵀL1/((n−1)(n−2)) − 2/(n−2)·1ᵀKL1] / (n(n−3))``,
    ``k(a, b) = exp(−‖a − b‖²/(2σ²))``, σ the median distance between different samples. Computed in float64.

    The p-value is ``(1 + #{permuted ≥ observed}) / (1 + permutations)`` over random permutations of y against x, so it
    is never 0. It requires exchangeable samples. The normalised value is ``HSIC(x, y) / √(HSIC(x, x)·HSIC(y, y))``, as
    in CKA (Kornblith et al., ICML 2019, who use the biased HSIC).

    Samples of one group resemble each other in x and in y merely because they belong together, and the formula counts
    this as dependence. With `groups`, whole groups are permuted, each with another of the same size, row for row. The
    mean over these permutations is the value that such groups have by chance; it is subtracted from the result.

    A constant variable has value 0 and p-value 1.

    Args:
        x: ``(n, d)`` numbers, ``(n,)`` floating numbers, or ``(n,)`` labels (whole numbers, booleans, strings), which
            become one-hot codes; n at least 4. If there are more than 2000 samples, 2000 are drawn.
        y: Samples paired with those of x.
        groups: ``(n,)`` labels of samples that belong together, such as crops of one photograph; at least two groups
            must have the same size. None if the samples are independent.
        permutations: Number of permutations; 0 omits the test, gives a p-value of 1 and excludes groups.
        seed: Seed of all random draws; torch's global generators are not used.
        bandwidths: σ of x and of y in their units; None for the median distance. If more than half of the pairs are
            equal, as for rare labels, the median of the other distances is used.

    Raises:
        ValueError: The samples are not finite numbers or labels, there are too few, x and y have different lengths, the
            numbers are so far apart that their distances overflow, no two groups have the same size, a bandwidth is
            not above 0, or there are too few permutations.
    """
    first, second = as_variable(x, "x"), as_variable(y, "y")
    check_lengths(("x", len(first)), ("y", len(second)))
    if len(first) < _FEWEST:
        raise ValueError(f"x and y must have at least {_FEWEST} samples, got {len(first)}")
    members = None
    if groups is not None:
        members, _ = as_labels(groups, "groups")
        check_lengths(("x", len(first)), ("groups", len(members)))
    least = 0 if members is None else 1
    if permutations < least:
        raise ValueError(f"permutations must be at least {least}{' with groups' if least else ''}, got {permutations}")
    if any(width is not None and not 0 < width < math.inf for width in bandwidths):
        raise ValueError(f"bandwidths must be above 0 and finite, or None for the median, got {bandwidths}")
    generator = torch.Generator().manual_seed(seed)
    if len(first) > MOST:
        drawn = _drawn(len(first), members, generator)
        first, second = first[drawn], second[drawn]
        members = None if members is None else members[drawn]
    exchange = None if members is None else _Exchange(members)
    K, L = kernel(first, bandwidths[0]), kernel(second, bandwidths[1])
    if K is None or L is None:
        return HSICResult(0.0, 1.0, 0.0, len(first))
    centred = centre(K)
    value = _inner(centred, L)
    own = _inner(centred, K), _inner(centre(L), L)
    # If all samples are equally far apart, only rounding error is left of the centred kernel.
    scale = math.sqrt(own[0] * own[1]) if min(own) > _NOTHING else 0.0
    by_chance = []
    for _ in range(permutations):
        order = torch.randperm(len(L), generator=generator) if exchange is None else exchange(generator)
        by_chance.append(_inner(centred, L[order][:, order]))
    # Values that are equal up to rounding count as equal.
    exceeding = sum(each >= value - _ROUNDING * (scale or 1.0) for each in by_chance)
    p_value = (1 + exceeding) / (1 + permutations)
    if exchange is not None:
        value -= math.fsum(by_chance) / permutations
    return HSICResult(value, p_value, value / scale if scale > 0 else 0.0, len(first))


class _Exchange:
    """Random permutations of whole groups, each with another of the same size, row for row."""

    def __init__(self, members: Tensor) -> None:
        """Collect the groups by size; ``members`` is ``(n,)`` int64, the group of each sample."""
        by_size: dict[int, list[Tensor]] = {}
        for group in members.unique().tolist():
            rows = (members == group).nonzero()[:, 0]
            by_size.setdefault(len(rows), []).append(rows)
        self.blocks = [torch.stack(rows) for rows in by_size.values()]
        """Rows of the groups, ``(groups, size)`` for every size."""
        self.count = len(members)
        if all(len(block) < 2 for block in self.blocks):
            sizes = sorted(by_size)
            raise ValueError(f"groups must be two or more of one size, to be exchanged; got sizes {sizes[:10]}")

    def __call__(self, generator: torch.Generator) -> Tensor:
        """Return ``(n,)`` int64: the row whose y each sample receives."""
        order = torch.empty(self.count, dtype=torch.int64)
        for block in self.blocks:
            order[block] = block[torch.randperm(len(block), generator=generator)]
        return order


def _drawn(count: int, members: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw `MOST` rows, or whole groups one by one while they have at most `MOST` rows in total."""
    if members is None:
        return torch.randperm(count, generator=generator)[:MOST]
    sizes = members.bincount()
    order = torch.randperm(len(sizes), generator=generator)
    fits = order[sizes[order].cumsum(0) <= MOST]
    return torch.isin(members, fits).nonzero()[:, 0]


def kernel(values: Tensor, bandwidth: float | None = None) -> Tensor | None:
    """Return the Gaussian kernel matrix with a diagonal of 0.

    Args:
        values: ``(n, d)`` float64.
        bandwidth: σ; None for the median distance, or for the median of the positive distances if the median is 0.

    Returns:
        ``(n, n)`` float64, or None if all samples are equal.
    """
    distances = torch.nn.functional.pdist(values)
    if not bool(distances.square().isfinite().all()):
        raise ValueError(
            f"samples must not be so far apart that distances overflow, got up to {values.abs().max():.3g}"
        )
    if not bool(distances.any()):
        return None
    if bandwidth is None:
        bandwidth = distances.median().item() or distances[distances > 0].median().item()
    matrix = values.new_zeros(len(values), len(values))
    above = torch.triu_indices(len(values), len(values), offset=1)
    matrix[above[0], above[1]] = (-distances.square() / (2 * bandwidth**2)).exp()
    return matrix + matrix.T


def centre(K: Tensor) -> Tensor:
    """Return the U-centred kernel matrix (Székely and Rizzo, Annals of Statistics 2014).

    The formula of `hsic` is the inner product of the centred K with L, divided by n(n − 3). Only one of the two needs
    centring, once for all permutations of the other.

    Args:
        K: ``(n, n)``, symmetric, with a diagonal of 0; n at least 4.

    Returns:
        ``(n, n)``, symmetric. The diagonal is arbitrary, because the diagonal of L is 0.
    """
    n = len(K)
    rows = K.sum(dim=1) / (n - 2)
    return K - rows[:, None] - rows[None, :] + K.sum() / ((n - 1) * (n - 2))


def _inner(centred: Tensor, L: Tensor) -> float:
    n = len(L)
    return torch.dot(centred.flatten(), L.flatten()).item() / (n * (n - 3))
