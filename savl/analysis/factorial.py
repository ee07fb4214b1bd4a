"""Factorial data: every scene at every level of one degradation, so that what is content and what is not is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig, bicubic_downsample
from savl.degradation.blur_kernels import BlurKernel, GaussianBlurKernel
from savl.degradation.recipe import Noise, Recipe, Resize, Stage
from savl.images.folder import read_rgb

_KERNEL = 21
"""Side of the blur kernels in pixels, the largest that the pipeline takes: a wide Gaussian is not cut off."""


@dataclass(frozen=True)
class Variation:
    """One degradation, and the levels it comes in."""

    name: str
    """noise, blur or jpeg."""
    title: str
    unit: str
    """What the labels of its levels count, for people."""
    amounts: tuple[float, ...]
    """Growing; 0 leaves the image alone. Standard deviation of the noise in 8-bit units, of the blur in low-resolution
    pixels; for JPEG 100 minus the quality."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The levels as people call them: those of JPEG by its quality."""
        if self.name == "jpeg":
            return tuple(f"{100 - amount:g}" if amount else "none" for amount in self.amounts)
        return tuple(f"{amount:g}" for amount in self.amounts)

    def with_amounts(self, amounts: Sequence[float]) -> Variation:
        """The same degradation at other levels."""
        return Variation(self.name, self.title, self.unit, tuple(amounts))


NOISE = Variation("noise", "Noise-Level", "σ of Gaussian noise, 8-bit units", (0.0, 5.0, 10.0, 20.0, 30.0))
BLUR = Variation("blur", "Blur-Level", "σ of Gaussian blur, low-resolution pixels", (0.0, 0.5, 1.0, 1.5, 2.0))
JPEG = Variation("jpeg", "JPEG-Level", "JPEG quality", (0.0, 10.0, 30.0, 50.0, 70.0))
VARIATIONS = (NOISE, BLUR, JPEG)


def vary(z: Tensor, variation: Variation, seed: Sequence[int]) -> Tensor:
    """Degrade clean low-resolution crops by one operation at every level, by the pipeline's own operations.

    Args:
        z: ``(K, 3, h, w)`` float32 in [0, 1], clean.
        variation: The operation and its L levels.
        seed: Numbers ≥ 0 that the noise follows from; it is drawn anew for every crop and level.

    Returns:
        ``(L·K, 3, h, w)`` float32, multiples of 1/255: all crops at the first level, then at the next.

    Raises:
        DegradationUnavailable: kornia is not installed.
    """
    amounts = [amount for amount in variation.amounts for _ in range(z.shape[0])]
    blur: list[BlurKernel | None] = [None] * len(amounts)
    noise: list[Noise | None] = [None] * len(amounts)
    quality: list[float | None] = [None] * len(amounts)
    for index, amount in enumerate(amounts):
        if amount == 0:
            continue
        if variation.name == "noise":
            noise[index] = Noise("gaussian", amount, gray=False)
        elif variation.name == "blur":
            blur[index] = GaussianBlurKernel("iso", _KERNEL, (amount, amount), 0.0, 1.0)
        else:
            quality[index] = 100.0 - amount
    stage = Stage(tuple(blur), Resize(1.0, "area"), tuple(noise), tuple(quality))
    nothing = (None,) * len(amounts)
    recipe = Recipe(
        stage, None, "area", nothing, nothing, (False,) * len(amounts), (1.0,) * len(amounts), (False,) * len(amounts)
    )
    drawn = int(np.random.default_rng(list(seed)).integers(2**63))
    generator = torch.Generator(z.device).manual_seed(drawn)
    copies = z.repeat(len(variation.amounts), 1, 1, 1)
    return Degradation(DegradationConfig(), scale=1).apply(copies, recipe, None, generator)


def read_scene(path: Path, *, crops: int, side: int, scale: int, seed: Sequence[int]) -> Tensor | None:
    """Read a photograph and cut clean low-resolution crops out of it.

    Args:
        path: A high-resolution image.
        crops: So many at most, K. They do not overlap where the photograph is large enough for that, and overlap by
            half at most where it is not.
        side: Of a crop, low-resolution pixels.
        scale: High over low resolution.
        seed: Numbers ≥ 0: which of the places are taken.

    Returns:
        ``(K, 3, side, side)`` float32 in [0, 1]; None where the photograph is smaller than one crop.

    Raises:
        ImageFileError: The image cannot be read.
    """
    x = read_rgb(path)
    large = side * scale
    corners = _corners(x.shape[1], x.shape[2], large, crops)
    if not corners:
        return None
    chosen = sorted(np.random.default_rng(list(seed)).permutation(len(corners))[:crops].tolist())
    cut = [x[:, top : top + large, left : left + large] for top, left in (corners[place] for place in chosen)]
    return bicubic_downsample(torch.stack(cut), scale)


def _corners(height: int, width: int, side: int, wanted: int) -> list[tuple[int, int]]:
    """Top left corners of crops, spread evenly, on a grid: side by side, or at half that distance if those are few."""
    if min(height, width) < side:
        return []

    def grid(step: int) -> list[tuple[int, int]]:
        tops, lefts = (
            np.linspace(0, length - side, 1 + (length - side) // step).round().astype(int).tolist()
            for length in (height, width)
        )
        return [(top, left) for top in tops for left in lefts]

    apart = grid(side)
    return apart if len(apart) >= wanted else grid(max(side // 2, 1))


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` of the paths, evenly spaced, in their order."""
    if len(paths) <= count:
        return list(paths)
    return [paths[place] for place in np.linspace(0, len(paths) - 1, count).round().astype(int).tolist()]
