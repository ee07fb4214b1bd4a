"""One factor varied: how the channels of the mean move with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.analysis.factorial import Variation, vary
from savl.analysis.features import Features, measure_fields
from savl.network import SAVL

SWEEP_LEVELS = 9


@dataclass(frozen=True)
class ChannelResponse:
    """What one kind of degradation does to the R channels."""

    name: str
    r_squared: tuple[float, ...]
    """Of a linear regression of the channel on the amount, over all scenes: the share of the channel's variance that
    the amount explains."""
    slope: tuple[float, ...]
    """Of that regression: standard deviations of the channel from no degradation to the strongest."""
    amounts: tuple[float, ...]
    """Levels of the sweep."""
    sweep: tuple[tuple[float, ...], ...]
    """R rows of a value for every level: mean of the channel over one scene, less that without degradation, in standard
    deviations of the channel."""


def deviations(parts: Sequence[Features]) -> NDArray[np.float64]:
    """Standard deviation of every channel over all features ``(R,)``; 1 where a channel is constant."""
    spread = np.concatenate([part.mean for part in parts]).astype(np.float64).std(axis=0)
    return np.where(spread > 0, spread, 1.0)


def channel_response(
    model: SAVL,
    z: Tensor,
    variation: Variation,
    features: Features,
    amounts: NDArray[np.float64],
    unit: NDArray[np.float64],
    seed: Sequence[int],
) -> ChannelResponse:
    """Regress channels on the amount over all scenes, and sweep the amount over one.

    Args:
        model: A network with a field.
        z: ``(K, 3, h, w)`` clean crops of the one scene.
        variation: What is varied, up to its strongest level.
        features: Of n images at any levels of it.
        amounts: ``(n,)`` theirs.
        unit: ``(R,)`` what counts as one, as `deviations` gives it.
        seed: Of the noise in the sweep.
    """
    strongest = max(variation.amounts)
    levels = np.linspace(0.0, strongest, SWEEP_LEVELS)
    swept = vary(z, variation.with_amounts(levels.tolist()), seed)
    means = torch.from_numpy(measure_fields(model, swept)[0].mean).double()
    by_level = means.view(SWEEP_LEVELS, z.shape[0], -1).mean(dim=1).numpy()
    moved = (by_level - by_level[0]) / unit
    slope, r_squared = regress(features.mean.astype(np.float64) / unit, amounts / strongest)
    return ChannelResponse(
        variation.name,
        tuple(r_squared.tolist()),
        tuple(slope.tolist()),
        tuple(levels.tolist()),
        tuple(tuple(row) for row in moved.T.tolist()),
    )


def regress(y: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares of every column of ``y`` ``(n, R)`` on ``x`` ``(n,)``, which varies: slopes and R², ``(R,)`` each.

    A column that is constant has slope 0 and R² 0.
    """
    x, y = x - x.mean(), y - y.mean(axis=0)
    covariance, of_x, of_y = x @ y, float(x @ x), np.square(y).sum(axis=0)
    # Rounding leaves a constant column a variance of about 1e-32 of its square.
    varies = of_y > 1e-20
    r_squared = np.where(varies, covariance**2 / (of_x * np.where(varies, of_y, 1.0)), 0.0)
    return np.where(varies, covariance / of_x, 0.0), r_squared


def direction_cosine(a: ChannelResponse, b: ChannelResponse) -> float:
    """Cosine between the directions in which two kinds of degradation move the mean, in [-1, 1]; 0 if one does not."""
    first, second = np.asarray(a.slope), np.asarray(b.slope)
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length > 0 else 0.0
