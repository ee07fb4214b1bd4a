"""HSIC: do two variables depend on each other at all? A kernel statistic and its permutation test."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from savl.evaluation.samples import Samples, as_labels, as_variable, check_lengths

MOST = 2000
"""Samples that are compared, at most: a matrix of them all is 32 MB, and there are about seven at a time."""
_FEWEST = 4
_ROUNDING = 1e-12
"""Relative, of two values that should be equal."""
_NOTHING = 1e-14
"""What rounding leaves of a value that should be 0: entries of the matrices are at most 1."""


@dataclass(frozen=True)
class HSICResult:
    """How strongly two variables depend on each other, and whether that can be chance."""

    value: float
    """Around 0, either side, for independent variables."""
    p_value: float
    """Share of random pairings at least as dependent, the true one counted among them: small for dependent ones."""
    normalised: float
    """In [-1, 1], 1 for a variable with itself: comparable between codes of different sizes and scales."""
    samples: int
    """How many were compared."""

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
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
    """Hilbert–Schmidt independence criterion, unbiased, with Gaussian kernels (Song et al., JMLR 2012, eq. 5).

    With K and L the kernel matrices of x and y, their diagonals set to 0,
    ``HSIC = [tr(KL) + 1ᵀK1·1ᵀL1/((n−1)(n−2)) − 2/(n−2)·1ᵀKL1] / (n(n−3))``,
    ``k(a, b) = exp(−‖a − b‖²/(2σ²))``, σ the median distance between different samples. In float64.

    The p-value is ``(1 + #{permuted ≥ observed}) / (1 + permutations)`` over random permutations of y against x (so it
    is never 0), which asks that samples be exchangeable. The normalised value is
    ``HSIC(x, y) / √(HSIC(x, x)·HSIC(y, y))``, as in CKA (Kornblith et al., ICML 2019, there with biased HSIC).

    Samples of a group are alike, in x and in y, for no other reason than that they are of one group, and the formula
    takes that for dependence. With `groups` it is groups as wholes that are exchanged, each with one of its own size,
    row for row; and the value is the formula's less its mean over those exchanges, what such groups have by chance.

    A variable that is constant depends on nothing: value 0, p-value 1.

    Args:
        x: ``(n, d)`` numbers, ``(n,)`` floating numbers, or ``(n,)`` labels (whole numbers, booleans, strings), which
            become one-hot codes; n at least 4. Above 2000 samples, 2000 are drawn and the rest is left out.
        y: Likewise, row for row.
        groups: ``(n,)`` labels of samples that belong together, photographs say; at least two of one size. None where
            samples are independent of each other.
        permutations: Of the test; 0 for none, which leaves a p-value of 1 and which groups do not allow.
        seed: Of all draws; torch's own generators are left alone.
        bandwidths: σ of x and of y in their own units, the median where None. Where more than half of the pairs are
            equal, as for rare labels, the median is that of the others.

    Raises:
        ValueError: Samples that are not finite numbers or labels, too few of them, not as many of x as of y, numbers so
            far apart that their distances overflow, no two groups of one size, a bandwidth that is not above 0, or too
            few permutations.
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
    # Of kernels that take all samples for equally far apart nothing is left but rounding.
    scale = math.sqrt(own[0] * own[1]) if min(own) > _NOTHING else 0.0
    by_chance = []
    for _ in range(permutations):
        order = torch.randperm(len(L), generator=generator) if exchange is None else exchange(generator)
        by_chance.append(_inner(centred, L[order][:, order]))
    # Equal values may differ in their last bits, and count.
    exceeding = sum(each >= value - _ROUNDING * (scale or 1.0) for each in by_chance)
    p_value = (1 + exceeding) / (1 + permutations)
    if exchange is not None:
        value -= math.fsum(by_chance) / permutations
    return HSICResult(value, p_value, value / scale if scale > 0 else 0.0, len(first))


class _Exchange:
    """Random exchanges of whole groups, each with one of its own size, row for row."""

    def __init__(self, members: Tensor) -> None:
        """``(n,)`` int64: which group a sample is of."""
        by_size: dict[int, list[Tensor]] = {}
        for group in members.unique().tolist():
            rows = (members == group).nonzero()[:, 0]
            by_size.setdefault(len(rows), []).append(rows)
        self.blocks = [torch.stack(rows) for rows in by_size.values()]
        """Of every size ``(groups, size)``."""
        self.count = len(members)
        if all(len(block) < 2 for block in self.blocks):
            sizes = sorted(by_size)
            raise ValueError(f"groups must be two or more of one size, to be exchanged; got sizes {sizes[:10]}")

    def __call__(self, generator: torch.Generator) -> Tensor:
        """``(n,)`` int64: whose y every sample gets."""
        order = torch.empty(self.count, dtype=torch.int64)
        for block in self.blocks:
            order[block] = block[torch.randperm(len(block), generator=generator)]
        return order


def _drawn(count: int, members: Tensor | None, generator: torch.Generator) -> Tensor:
    """`MOST` rows, or whole groups, drawn one by one, as long as they are not more rows than that."""
    if members is None:
        return torch.randperm(count, generator=generator)[:MOST]
    sizes = members.bincount()
    order = torch.randperm(len(sizes), generator=generator)
    fits = order[sizes[order].cumsum(0) <= MOST]
    return torch.isin(members, fits).nonzero()[:, 0]


def kernel(values: Tensor, bandwidth: float | None = None) -> Tensor | None:
    """Gaussian kernel matrix with a diagonal of 0.

    Args:
        values: ``(n, d)`` float64.
        bandwidth: σ; None for the median distance between samples that differ from each other, if half of all do not.

    Returns:
        ``(n, n)`` float64, or None where all samples are equal.
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
    """Take from a kernel matrix what its rows and columns explain, the diagonal not counted.

    The formula of `hsic` is the inner product of the centred K with L, over n(n − 3): one of the two is centred, once
    for all permutations of the other (Székely and Rizzo, Annals of Statistics 2014, who call it U-centring).

    Args:
        K: ``(n, n)``, symmetric, with a diagonal of 0; n at least 4.

    Returns:
        ``(n, n)``, symmetric; the diagonal means nothing, and meets that of L, which is 0.
    """
    n = len(K)
    rows = K.sum(dim=1) / (n - 2)
    return K - rows[:, None] - rows[None, :] + K.sum() / ((n - 1) * (n - 2))


def _inner(centred: Tensor, L: Tensor) -> float:
    n = len(L)
    return torch.dot(centred.flatten(), L.flatten()).item() / (n * (n - 3))
