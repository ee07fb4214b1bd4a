"""Degradation masks: how strongly each pixel of an image is degraded."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.degradation.config import SpatialConfig


def draw_mask(config: SpatialConfig, height: int, width: int, random: np.random.Generator) -> Tensor:
    """Draw a random mask.

    It is either a smooth random field whose values are spread evenly over [0, 1], or a ramp: the image is taken as a
    plane that recedes in a random direction, and pixels are degraded more the farther away they are.

    Args:
        config: Probability of each kind, and the size of structures in smooth masks.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        random: Random number generator of all draws.

    Returns:
        ``(1, height, width)`` float32 in [0, 1].
    """
    if random.random() < config.ramp_probability:
        return _ramp(height, width, random)
    return _smooth(config, height, width, random)


def _smooth(config: SpatialConfig, height: int, width: int, random: np.random.Generator) -> Tensor:
    cells = int(random.integers(config.cells[0], config.cells[1] + 1))
    longer = max(height, width)
    # The grid extends beyond the image, so that the image can be cut out at a random place.
    grid = [max(1, math.ceil(cells * side / longer)) + 3 for side in (height, width)]
    field = torch.from_numpy(random.standard_normal((1, 1, *grid))).float()
    step = longer / cells
    size = [math.ceil(points * step) for points in grid]
    field = F.interpolate(field, size=size, mode="bicubic", align_corners=False)
    top, left = (int(random.integers(0, large - side + 1)) for large, side in zip(size, (height, width), strict=True))
    field = field[0, :, top : top + height, left : left + width]
    # The normal distribution function maps a Gaussian field to a uniform one. Interpolation has reduced its variance,
    # so the field is standardised first.
    field = (field - field.mean()) / field.std().clamp(min=1e-6) if field.numel() > 1 else field
    uniform: Tensor = torch.special.ndtr(field)
    return uniform.clamp(0.0, 1.0)


def _ramp(height: int, width: int, random: np.random.Generator) -> Tensor:
    angle = random.uniform(-math.pi, math.pi)
    y = torch.linspace(-1.0, 1.0, height)[:, None]
    x = torch.linspace(-1.0, 1.0, width)[None, :]
    along = math.cos(angle) * x + math.sin(angle) * y
    along = (along - along.min()) / (along.max() - along.min()).clamp(min=1e-6)
    # Distance on an inclined plane: it changes slowly nearby and fast towards the horizon; linearly if bend is 0.
    bend = random.uniform(0.0, 0.8)
    distance = along * (1 - bend) / (1 - bend * along)
    return distance[None].clamp(0.0, 1.0)
