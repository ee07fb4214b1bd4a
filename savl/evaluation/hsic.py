"""HSIC: do two variables depend on each other at all? A kernel statistic and its permutation test."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from savl.evaluation.samples import Samples, as_variable, check_lengths

MOST = 2000
"""Samples that are compared, at most: a matrix of them all is 32 MB, and there are about seven at a time."""
_FEWEST = 4
_ROUNDING = 1e-12


@dataclass(frozen=True)
class HSICResult:
    """How strongly two variables depend on each other, and whether that can be chance."""

    value: float
    """Unbiased: around 0, either side, for independent variables."""
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

    A variable that is constant depends on nothing: value 0, p-value 1.

    Args:
        x: ``(n, d)`` numbers, ``(n,)`` floating numbers, or ``(n,)`` labels (whole numbers, booleans, strings), which
            become one-hot codes; n at least 4. Above 2000 samples, 2000 are drawn and the rest is left out.
        y: Likewise, row for row.
        permutations: Of the test; 0 for none, which leaves a p-value of 1.
        seed: Of all draws; torch's own generators are left alone.
        bandwidths: σ of x and of y in their own units, the median where None. Where more than half of the pairs are
            equal, as for rare labels, the median is that of the others.

    Raises:
        ValueError: Samples that are not finite numbers or labels, too few of them, not as many of x as of y, a
            bandwidth that is not above 0, or a negative number of permutations.
    """
    first, second = as_variable(x, "x"), as_variable(y, "y")
    check_lengths(("x", len(first)), ("y", len(second)))
    if len(first) < _FEWEST:
        raise ValueError(f"x and y must have at least {_FEWEST} samples, got {len(first)}")
    if permutations < 0:
        raise ValueError(f"permutations must be at least 0, got {permutations}")
    if any(width is not None and not 0 < width < math.inf for width in bandwidths):
        raise ValueError(f"bandwidths must be above 0 and finite, or None for the median, got {bandwidths}")
    generator = torch.Generator().manual_seed(seed)
    if len(first) > MOST:
        drawn = torch.randperm(len(first), generator=generator)[:MOST]
        first, second = first[drawn], second[drawn]
    K, L = kernel(first, bandwidths[0]), kernel(second, bandwidths[1])
    if K is None or L is None:
        return HSICResult(0.0, 1.0, 0.0, len(first))
    centred = centre(K)
    value = _inner(centred, L)
    scale = math.sqrt(_inner(centred, K) * _inner(centre(L), L))
    exceeding = 0
    for _ in range(permutations):
        order = torch.randperm(len(L), generator=generator)
        # Equal values may differ in their last bits, and count.
        exceeding += _inner(centred, L[order][:, order]) >= value - _ROUNDING * scale
    p_value = (1 + exceeding) / (1 + permutations)
    return HSICResult(value, p_value, value / scale if scale > 0 else 0.0, len(first))


def kernel(values: Tensor, bandwidth: float | None = None) -> Tensor | None:
    """Gaussian kernel matrix with a diagonal of 0.

    Args:
        values: ``(n, d)`` float64.
        bandwidth: σ; None for the median distance between samples that differ from each other, if half of all do not.

    Returns:
        ``(n, n)`` float64, or None where all samples are equal.
    """
    distances = torch.nn.functional.pdist(values)
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
