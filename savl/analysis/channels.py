"""Response of the field's channels to the strength of a single degradation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.analysis.controlled import DegradedFeatures, degrade_at_every_level
from savl.analysis.features import Features, measure_fields
from savl.network import SAVL

SWEEP_LEVELS = 9
"""Levels of the sweep over one scene."""


@dataclass(frozen=True)
class ChannelResponse:
    """Response of the R channels of the mean to one degradation."""

    name: str
    """``noise``, ``blur`` or ``jpeg``."""
    r_squared: tuple[float, ...]
    """R² of a linear regression of each channel on the amount over all scenes."""
    slope: tuple[float, ...]
    """Slope of that regression: standard deviations of the channel from no degradation to the strongest."""
    amounts: tuple[float, ...]
    """Levels of the sweep."""
    sweep: tuple[tuple[float, ...], ...]
    """R rows with one value per level: change of the channel's mean over one scene against the clean scene, in standard
    deviations of the channel."""


def deviations(parts: Sequence[Features]) -> NDArray[np.float64]:
    """Return the standard deviation of every channel over all features, ``(R,)``; 1 for a constant channel."""
    spread = np.concatenate([part.mean for part in parts]).astype(np.float64).std(axis=0)
    return np.where(spread > 0, spread, 1.0)


def channel_response(
    model: SAVL,
    z: Tensor,
    data: DegradedFeatures,
    place: int,
    unit: NDArray[np.float64],
    seed: Sequence[int],
) -> ChannelResponse:
    """Regress the channels on the amount over all scenes, and sweep the amount over one scene.

    Args:
        model: A network with a field.
        z: ``(K, 3, h, w)`` clean crops of one scene.
        data: Images of one degradation; the sweep ends at its strongest level.
        place: Position of the network in the features of the images.
        unit: ``(R,)`` unit of each channel, see `deviations`.
        seed: Seed of the noise in the sweep.
    """
    degradation = data.degradation
    strongest = max(degradation.amounts)
    levels = np.linspace(0.0, strongest, SWEEP_LEVELS)
    swept = degrade_at_every_level(z, degradation.with_amounts(levels.tolist()), seed)
    means = torch.from_numpy(measure_fields(model, swept)[0].mean).double()
    by_level = means.view(SWEEP_LEVELS, z.shape[0], -1).mean(dim=1).numpy()
    change = (by_level - by_level[0]) / unit
    slope, r_squared = regress(data.features[place].mean.astype(np.float64) / unit, data.amounts / strongest)
    return ChannelResponse(
        degradation.name,
        tuple(r_squared.tolist()),
        tuple(slope.tolist()),
        tuple(levels.tolist()),
        tuple(tuple(row) for row in change.T.tolist()),
    )


def regress(y: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit every column of ``y`` ``(n, R)`` to ``x`` ``(n,)`` by least squares; return slopes and R², ``(R,)`` each.

    ``x`` must vary. A constant column has slope 0 and R² 0.
    """
    x, y = x - x.mean(), y - y.mean(axis=0)
    covariance, of_x, of_y = x @ y, float(x @ x), np.square(y).sum(axis=0)
    # Rounding leaves a constant column a variance of about 1e-32 of its square.
    varies = of_y > 1e-20
    r_squared = np.where(varies, covariance**2 / (of_x * np.where(varies, of_y, 1.0)), 0.0)
    return np.where(varies, covariance / of_x, 0.0), r_squared


def direction_cosine(a: ChannelResponse, b: ChannelResponse) -> float:
    """Return the cosine of the angle between two degradations' slopes, in [-1, 1]; 0 if one has no slope."""
    first, second = np.asarray(a.slope), np.asarray(b.slope)
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length > 0 else 0.0
