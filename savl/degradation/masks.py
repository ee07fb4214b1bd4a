"""Where in an image how much of a degradation happens."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.degradation.config import SpatialConfig


def draw_mask(config: SpatialConfig, height: int, width: int, random: np.random.Generator) -> Tensor:
    """A map of how strongly each pixel is degraded.

    Either smooth, its values spread over [0, 1] as evenly as a random field allows, or a ramp: the image as a plane
    that recedes in a random direction, distance being what degrades.

    Args:
        config: What is likely.
        height: Pixels.
        width: Pixels.
        random: Source of every draw.

    Returns:
        ``(1, height, width)`` float32 in [0, 1].
    """
    if random.random() < config.ramp_probability:
        return _ramp(height, width, random)
    return _smooth(config, height, width, random)


def _smooth(config: SpatialConfig, height: int, width: int, random: np.random.Generator) -> Tensor:
    cells = int(random.integers(config.cells[0], config.cells[1] + 1))
    longer = max(height, width)
    # Two points beyond the image, so that its border lies within the grid.
    grid = [max(1, math.ceil(cells * side / longer)) + 3 for side in (height, width)]
    field = torch.from_numpy(random.standard_normal((1, 1, *grid))).float()
    step = longer / cells
    size = [math.ceil(points * step) for points in grid]
    field = F.interpolate(field, size=size, mode="bicubic", align_corners=False)
    top, left = (int(random.integers(0, large - side + 1)) for large, side in zip(size, (height, width), strict=True))
    field = field[0, :, top : top + height, left : left + width]
    # The normal distribution function makes a Gaussian field uniform, but for what interpolation took of its variance.
    field = (field - field.mean()) / field.std().clamp(min=1e-6) if field.numel() > 1 else field
    uniform: Tensor = torch.special.ndtr(field)
    return uniform.clamp(0.0, 1.0)


def _ramp(height: int, width: int, random: np.random.Generator) -> Tensor:
    angle = random.uniform(-math.pi, math.pi)
    y = torch.linspace(-1.0, 1.0, height)[:, None]
    x = torch.linspace(-1.0, 1.0, width)[None, :]
    along = math.cos(angle) * x + math.sin(angle) * y
    along = (along - along.min()) / (along.max() - along.min()).clamp(min=1e-6)
    # Distance on a plane seen at a slant: slow nearby, steep towards the horizon; none at all for a bend of 0.
    bend = random.uniform(0.0, 0.8)
    distance = along * (1 - bend) / (1 - bend * along)
    return distance[None].clamp(0.0, 1.0)
