"""The second-order pipeline: images through a recipe, all of a group together, on CPU or GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.degradation.config import DegradationConfig
from savl.degradation.kernels import SIDE, Kernel
from savl.degradation.masks import draw_mask
from savl.degradation.recipe import Noise, Recipe, Stage, draw_recipe


class DegradationUnavailable(RuntimeError):
    """kornia, which filters and compresses, is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Degraded:
    """What became of a group of images."""

    y: Tensor
    """``(B, 3, h, w)`` float32 in [0, 1], multiples of 1/255."""
    severity: Tensor
    """``(B, h, w)`` float32 in [0, 1]: how strongly each pixel was degraded, the ground truth of a severity map. It is
    the image's strength times the mask it was degraded through, and even where there was no mask."""
    recipe: Recipe
    """What was drawn."""


class Degradation:
    """Real-ESRGAN's second-order degradation (Wang et al., 2021), uniform over an image or varying within it.

    Where it varies, the mask is at work inside every operation: blurred and untouched image are blended by it, noise is
    multiplied by it, compressed and uncompressed image are blended by it. Blending finished versions instead would
    average their independent noises, and the middle of such a blend would be cleaner than either end while its ground
    truth said otherwise.
    """

    def __init__(self, config: DegradationConfig, scale: int = 4) -> None:
        """Prepare.

        Args:
            config: Ranges and chances.
            scale: Factor between high and low resolution, at least 1.

        Raises:
            DegradationUnavailable: kornia is not installed.
            ValueError: ``scale`` is no integer of at least 1.
        """
        if type(scale) is not int or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1, got {scale!r}")
        self.config = config
        self.scale = scale
        self._filter, self._jpeg = _kornia()

    def __call__(self, x: Tensor, seed: int | Sequence[int], *, alike: int = 1) -> Degraded:
        """Degrade a group of images; they share their resizes (see `draw_recipe`).

        Args:
            x: ``(B, 3, H, W)`` float32 in [0, 1], H and W multiples of the scale.
            seed: What every draw follows from: a number ≥ 0, or several. Another kind of device gives another noise.
            alike: So many images, one after the other, share everything but the noise itself: recipe and mask.

        Returns:
            Low-resolution images of ``(H/scale, W/scale)`` pixels with their ground truth.

        Raises:
            ValueError: ``x`` has another shape or dtype, or ``alike`` is no integer of at least 1 that divides B.
        """
        if x.dim() != 4 or x.shape[1] != 3 or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 (B, 3, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}")
        if 0 in x.shape or x.shape[2] % self.scale or x.shape[3] % self.scale:
            raise ValueError(f"x must have sides that are multiples of scale={self.scale}, got {tuple(x.shape)}")
        if type(alike) is not int or alike < 1:
            raise ValueError(f"alike must be an integer of at least 1, got {alike!r}")
        if x.shape[0] % alike:
            raise ValueError(f"x must hold a multiple of alike={alike} images, got {x.shape[0]}")
        random = np.random.default_rng(seed)
        recipe = draw_recipe(self.config, x.shape[0] // alike, random)
        mask = self._mask(recipe, x, random)
        recipe = recipe.repeated(alike)
        mask = None if mask is None else mask.repeat_interleave(alike, dim=0)
        noise = torch.Generator(x.device).manual_seed(int(random.integers(2**63)))
        y = self.apply(x, recipe, mask, noise)
        strength = torch.tensor(recipe.strength, device=x.device).view(-1, 1, 1)
        if mask is None:
            return Degraded(y, strength.expand(-1, *y.shape[2:]).contiguous(), recipe)
        return Degraded(y, strength * _at(mask, y)[:, 0], recipe)

    def apply(self, x: Tensor, recipe: Recipe, mask: Tensor | None, noise: torch.Generator) -> Tensor:
        """Degrade by a recipe.

        Args:
            x: ``(B, 3, H, W)`` float32 in [0, 1].
            recipe: For B images.
            mask: ``(B, 1, H, W)`` in [0, 1], or None for the whole of it everywhere.
            noise: Source of the noise, on the device of ``x``.

        Returns:
            ``(B, 3, H/scale, W/scale)`` float32 in [0, 1], multiples of 1/255.
        """
        full = x.shape[2:]
        low = (full[0] // self.scale, full[1] // self.scale)
        out = x
        if recipe.first is not None:
            out = self._stage(out, recipe.first, full, mask, noise)
        if recipe.second is not None:
            out = self._stage(out, recipe.second, low, mask, noise)
        before = [None if last else quality for quality, last in zip(recipe.quality, recipe.jpeg_last, strict=True)]
        after = [quality if last else None for quality, last in zip(recipe.quality, recipe.jpeg_last, strict=True)]
        out = self._compress(out, before, mask)
        out = _resize(out, low, recipe.method)
        out = self._blur(out, recipe.sinc, mask)
        out = self._compress(out, after, mask)
        return (out.clamp(0.0, 1.0) * 255.0).round() / 255.0

    def _mask(self, recipe: Recipe, x: Tensor, random: np.random.Generator) -> Tensor | None:
        if not any(recipe.spatial):
            return None
        height, width = x.shape[2:]
        masks = [
            draw_mask(self.config.spatial, height, width, random) if spatial else torch.ones(1, height, width)
            for spatial in recipe.spatial
        ]
        return torch.stack(masks).to(x.device)

    def _stage(
        self, x: Tensor, stage: Stage, reference: Sequence[int], mask: Tensor | None, noise: torch.Generator
    ) -> Tensor:
        out = self._blur(x, stage.blur, mask)
        size = [max(1, round(side * stage.resize.factor)) for side in reference]
        out = _resize(out, size, stage.resize.method)
        out = _add_noise(out, stage.noise, mask, noise)
        return self._compress(out, stage.quality, mask)

    def _blur(self, x: Tensor, kernels: Sequence[Kernel | None], mask: Tensor | None) -> Tensor:
        chosen = [index for index, kernel in enumerate(kernels) if kernel is not None]
        if not chosen:
            return x
        values = torch.stack([kernel.values() for kernel in kernels if kernel is not None]).to(x.device)
        margin = SIDE // 2
        # Reflection needs more pixels than it adds.
        border = "reflect" if min(x.shape[2:]) > margin else "replicate"
        padded = F.pad(x[chosen], (margin,) * 4, mode=border)
        return _blended(x, chosen, self._filter(padded, values, padding="valid"), mask)

    def _compress(self, x: Tensor, qualities: Sequence[float | None], mask: Tensor | None) -> Tensor:
        chosen = [index for index, quality in enumerate(qualities) if quality is not None]
        if not chosen:
            return x
        values = torch.tensor([quality for quality in qualities if quality is not None], device=x.device)
        return _blended(x, chosen, self._jpeg(x[chosen].clamp(0.0, 1.0), values), mask)


def _blended(x: Tensor, chosen: Sequence[int], changed: Tensor, mask: Tensor | None) -> Tensor:
    """The images with the chosen ones changed, as far as the mask says."""
    if mask is not None:
        changed = torch.lerp(x[chosen], changed, _at(mask, x)[chosen])
    if len(chosen) == x.shape[0]:
        return changed
    out = x.clone()
    out[chosen] = changed
    return out


def _at(mask: Tensor, x: Tensor) -> Tensor:
    """The mask at the size of the images."""
    if mask.shape[2:] == x.shape[2:]:
        return mask
    return F.interpolate(mask, size=x.shape[2:], mode="area" if mask.shape[2] > x.shape[2] else "bilinear")


def _resize(x: Tensor, size: Sequence[int], method: str) -> Tensor:
    if tuple(size) == tuple(x.shape[2:]):
        return x
    return F.interpolate(x, size=tuple(size), mode=method)


def _add_noise(x: Tensor, noises: Sequence[Noise | None], mask: Tensor | None, generator: torch.Generator) -> Tensor:
    out = x
    for kind in ("gaussian", "poisson"):
        chosen = [index for index, noise in enumerate(noises) if noise is not None and noise.kind == kind]
        if not chosen:
            continue
        these = [noise for noise in noises if noise is not None and noise.kind == kind]
        gray = [index for index, noise in enumerate(these) if noise.gray]
        amount = torch.tensor([noise.amount for noise in these], device=x.device).view(-1, 1, 1, 1)
        if kind == "gaussian":
            added = torch.randn(len(these), *x.shape[1:], device=x.device, generator=generator)
            added[gray] = added[gray, :1]
            added = added * (amount / 255.0)
        else:
            added = _shot_noise(x[chosen], gray, generator) * amount
        if mask is not None:
            added = added * _at(mask, x)[chosen]
        out = out.clone() if out is x else out
        out[chosen] += added
    return out.clamp(0.0, 1.0)


def _shot_noise(x: Tensor, gray: Sequence[int], generator: torch.Generator) -> Tensor:
    """Difference between Poisson counts and their rates, in [0, 1] units; gray images share that of their luma.

    As published, an image counts as many photons at full brightness as it has 8-bit values, up to a power of two.
    """
    levels = (x.clamp(0.0, 1.0) * 255.0).round()
    if gray:
        weights = x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        levels[gray] = (levels[gray] * weights).sum(dim=1, keepdim=True).round().expand(-1, 3, -1, -1)
    photons = [2.0 ** math.ceil(math.log2(len(image.unique()))) for image in levels]
    rate = levels / 255.0 * x.new_tensor(photons).view(-1, 1, 1, 1)
    counts = torch.poisson(rate, generator=generator)
    counts[gray] = counts[gray, :1]
    return (counts - rate) / x.new_tensor(photons).view(-1, 1, 1, 1)


def _kornia() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    try:
        from kornia.enhance import jpeg_codec_differentiable
        from kornia.filters import filter2d
    except ImportError as error:
        raise DegradationUnavailable(
            f"degrading images needs kornia, which cannot be imported ({error}); pip install 'savl[train]' brings it"
        ) from error
    return filter2d, jpeg_codec_differentiable
