"""A photograph, and recipes of a single operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig
from savl.degradation.blur_kernels import BlurKernel
from savl.degradation.recipe import Noise, Recipe, Resize, Stage
from savl.images.folder import read_rgb

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Apply = Callable[..., Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Compute with one thread."""


@pytest.fixture(scope="session")
def photo() -> Tensor:
    """``(1, 3, 384, 384)`` in [0, 1]."""
    return read_rgb(EXAMPLES / "church.webp")[None]


@pytest.fixture(scope="session")
def alone() -> Apply:
    """Apply a blur kernel, a noise or a JPEG quality to one image and nothing else; its size stays."""
    degradation = Degradation(DegradationConfig(), scale=1)

    def apply(
        x: Tensor,
        blur: BlurKernel | None = None,
        noise: Noise | None = None,
        quality: float | None = None,
        mask: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        stage = Stage((blur,), Resize(1.0, "area"), (noise,), (quality,))
        recipe = Recipe(stage, None, "area", (None,), (None,), (False,), (1.0,), (False,))
        return degradation.apply(x, recipe, mask, torch.Generator().manual_seed(seed))

    return apply
