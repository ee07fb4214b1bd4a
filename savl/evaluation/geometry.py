"""Geometry of class means: whether different degradations move a representation in different directions.

Probes measure whether classes can be distinguished. They do not measure along how many directions the class means vary:
a probe also separates points on one line. The figures of this module need no fitting, so that a training script can
compute them often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from savl.evaluation.samples import Samples

COMPONENTS = 3
"""Principal components that `class_mean_geometry` returns."""
STRAIGHT_RAYS = 49 / 19
"""Participation ratio of three straight, orthogonal and equally long rays with five equally spaced levels each, which
start at one point (2.58). It is a reference and no upper bound: curved rays can have a higher ratio."""


@dataclass(frozen=True)
class ClassMeanGeometry:
    """Geometry of the mean features of K degradations at L levels, of which the first is no degradation."""

    participation_ratio: float
    """tr(C)² / tr(C²), where C is the covariance of the K·L class means: the effective number of directions in which
    they vary, between 1 and the rank of C. 0 if all means are equal. Compare with `STRAIGHT_RAYS`."""
    explained: tuple[float, ...]
    """Shares of tr(C) along the first `COMPONENTS` principal components, descending."""
    cosines: dict[str, float]
    """Cosine of the angle between the directions of two degradations, for every pair, such as ``noise_blur``. The
    direction of a degradation is the mean at its strongest level minus the mean at its first level. 0 if one of the
    directions has no length."""
    lengths: dict[str, float]
    """Length of the direction of every degradation, in units of the feature."""
    positions: tuple[tuple[tuple[float, ...], ...], ...]
    """Coordinates of the centred means along the first `COMPONENTS` principal components: ``(K, L, COMPONENTS)``."""


def participation_ratio(means: Samples) -> float:
    """Return tr(C)² / tr(C²), where C is the covariance of the rows of a matrix.

    The ratio is 1 if all rows lie on one line, and d if the rows vary equally along d orthogonal directions.

    Args:
        means: ``(n, R)`` finite numbers on any device; one row per class.

    Returns:
        A number between 1 and min(n − 1, R); 0 if all rows are equal.

    Raises:
        ValueError: The shape is another one, or the numbers are not finite.
    """
    centred = _centred(_finite(means, 2))
    energy = torch.linalg.svdvals(centred).square()
    return float(energy.sum().square() / energy.square().sum()) if bool(energy.any()) else 0.0


def class_mean_geometry(means: Samples, names: Sequence[str]) -> ClassMeanGeometry:
    """Compute the participation ratio of class means and the cosines between the directions of degradations.

    Computed in float64 on the CPU. Every class has the same weight. Features are not standardised, so channels that
    vary more have more influence.

    Args:
        means: ``(K, L, R)`` finite numbers on any device: the mean feature of K degradations at L ≥ 2 levels, where R
            is the number of channels. Level 0 is no degradation, and the last level is the strongest.
        names: Names of the K ≥ 1 degradations.

    Raises:
        ValueError: The shape is another one, the numbers are not finite, or there is not one name per
            degradation.
    """
    values = _finite(means, 3)
    if len(names) != len(values):
        raise ValueError(f"names must have one name per degradation, {len(values)}, got {len(names)}")
    if values.shape[1] < 2:
        raise ValueError(f"means must have at least two levels, got the shape {tuple(values.shape)}")
    rows = values.flatten(0, 1)
    u, s, _ = torch.linalg.svd(_centred(rows), full_matrices=False)
    kept = min(COMPONENTS, len(s))
    places = torch.zeros(len(rows), COMPONENTS, dtype=torch.float64)
    places[:, :kept] = u[:, :kept] * s[:kept]
    # The sign of a component is arbitrary. The coordinate of largest magnitude is made positive on every machine.
    places *= places.gather(0, places.abs().argmax(dim=0, keepdim=True)).sign()
    energy = torch.zeros(COMPONENTS, dtype=torch.float64)
    energy[:kept] = s[:kept].square()
    total = float(s.square().sum())
    directions = dict(zip(names, values[:, -1] - values[:, 0], strict=True))
    return ClassMeanGeometry(
        participation_ratio(rows),
        tuple((energy / total if total > 0 else energy).tolist()),
        {f"{a}_{b}": _cosine(directions[a], directions[b]) for a, b in combinations(names, 2)},
        {name: float(direction.norm()) for name, direction in directions.items()},
        tuple(tuple(tuple(level) for level in ray) for ray in places.view(*values.shape[:2], COMPONENTS).tolist()),
    )


def _finite(values: Samples, dimensions: int) -> Tensor:
    tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if tensor.ndim != dimensions or 0 in tensor.shape:
        expected = "(n, R)" if dimensions == 2 else "(K, L, R)"
        raise ValueError(f"means must have the shape {expected}, none of them 0, got {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError("means must be finite, got NaN or infinity")
    return tensor


def _centred(rows: Tensor) -> Tensor:
    """Subtract the mean of the rows. Rounding errors of equal rows are set to 0."""
    centred = rows - rows.mean(dim=0)
    return torch.where(centred.abs() > 1e-12 * rows.abs().amax(), centred, 0.0)


def _cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0
