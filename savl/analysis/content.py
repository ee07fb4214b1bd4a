"""What a clean crop looks like, in a few numbers: the content that a degradation field should know nothing of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CELLS = 4
"""A crop is described in so many cells along each side."""
_LUMA = (0.299, 0.587, 0.114)
_FLOOR = 1e-6
"""Added to the energy of gradients before its logarithm: about that of rounding to 8 bits."""


@dataclass(frozen=True, eq=False)
class Content:
    """Principal components of descriptions."""

    values: NDArray[np.float32]
    """``(n, d)``."""
    explained: float
    """Share of the descriptions' variance in them, in [0, 1]."""


def describe(z: Tensor) -> Tensor:
    """Colours and texture of clean crops.

    Of every cell the mean colour (3 numbers) and the logarithms of the mean squared horizontal and vertical gradients
    of the luma (2 numbers). Texture has to be in it: an estimator that sees nothing of brightness may still take
    texture for noise.

    Args:
        z: ``(K, 3, h, w)`` in [0, 1], sides of at least 5 pixels.

    Returns:
        Colours ``(K, 48)`` and texture ``(K, 32)`` side by side: ``(K, 80)`` float32.
    """
    luma = torch.einsum("c,bchw->bhw", z.new_tensor(_LUMA), z)[:, None]
    colours = F.adaptive_avg_pool2d(z, CELLS)
    energies = [F.adaptive_avg_pool2d(luma.diff(dim=axis).square(), CELLS) for axis in (3, 2)]
    texture = (torch.cat(energies, dim=1) + _FLOOR).log()
    return torch.cat((colours.flatten(1), texture.flatten(1)), dim=1)


def principal_content(descriptions: Sequence[Tensor], components: int) -> Content:
    """Reduce the descriptions of all crops, colours and texture counting alike.

    Args:
        descriptions: What `describe` gave, n rows in all, at least 2.
        components: So many at most, fewer where there are fewer crops.
    """
    rows = torch.cat(list(descriptions)).double()
    rows = rows - rows.mean(dim=0)
    colours = 3 * CELLS**2
    for block in (rows[:, :colours], rows[:, colours:]):
        block /= block.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = min(components, len(rows) - 1)
    # The sign of a component is arbitrary: the largest entry is made positive, so that every machine gives the same.
    values = u[:, :kept] * s[:kept]
    values = values * values.gather(0, values.abs().argmax(dim=0, keepdim=True)).sign()
    energy = s.square()
    explained = float(energy[:kept].sum() / energy.sum().clamp(min=1e-12))
    return Content(values.float().numpy(), explained)
