"""The second-order degradation pipeline: applies a recipe to a group of images, on the CPU or a GPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.bicubic import bicubic_downsample
from savl.degradation.blur_kernels import SIDE, BlurKernel
from savl.degradation.config import DegradationConfig
from savl.degradation.masks import draw_mask
from savl.degradation.recipe import Camera, Noise, Recipe, Stage, draw_recipe

UNSHARP_SIGMA = 0.8
"""Standard deviation of the Gaussian in a camera's unsharp mask, in pixels of the camera."""


class DegradationUnavailable(RuntimeError):
    """kornia, which computes blur and JPEG, is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Degraded:
    """A group of degraded images with their ground truth."""

    y: Tensor
    """Low-resolution images, ``(B, 3, h, w)`` float32 in [0, 1], multiples of 1/255."""
    degradation_mask: Tensor
    """Ground truth for the severity, ``(B, h, w)`` float32 in [0, 1]: the strength of the degradation of each pixel. It
    is the strength of the image times its mask, or the strength everywhere if there was no mask."""
    recipe: Recipe
    """The random parameters."""
    x: Tensor
    """High-resolution targets of ``y``, ``(B, 3, H, W)`` float32 in [0, 1]: the input of the pipeline, except for
    images that a camera degrades (`savl.degradation.config.CameraConfig.soft_target`)."""

    @property
    def severity(self) -> Tensor:
        """Return `degradation_mask`, which had this name before version 0.2."""
        warnings.warn("Degraded.severity is now called degradation_mask", DeprecationWarning, stacklevel=2)
        return self.degradation_mask


class Degradation:
    """Real-ESRGAN's second-order degradation (Wang et al., 2021), uniform over an image or varying within it.

    Where it varies, the mask is applied in every operation: the blurred image is blended with the unblurred one, the
    noise is multiplied by the mask, and the compressed image is blended with the uncompressed one. Blending the clean
    image with the finished result instead would average independent noises: half-way between, the noise would be weaker
    than on either side, which would contradict the ground truth.
    """

    def __init__(self, config: DegradationConfig, scale: int = 4) -> None:
        """Prepare the pipeline.

        Args:
            config: Ranges and probabilities of all operations.
            scale: High-resolution size divided by low-resolution size, at least 1.

        Raises:
            DegradationUnavailable: kornia is not installed.
            ValueError: ``scale`` is not an integer of at least 1.
        """
        if type(scale) is not int or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1, got {scale!r}")
        self.config = config
        self.scale = scale
        self._filter, self._jpeg = _kornia()

    def __call__(
        self, x: Tensor, seed: int | Sequence[int], *, images_per_recipe: int = 1, alike: int | None = None
    ) -> Degraded:
        """Degrade a group of images, which are all resized in the same way (see `draw_recipe`).

        Args:
            x: ``(B, 3, H, W)`` float32 in [0, 1], H and W multiples of the scale.
            seed: Seed of all random draws: a number ≥ 0, or several. The CPU and GPUs draw different noise from it.
            images_per_recipe: Number of consecutive images that share a recipe and a mask; only their noise values
                differ. It must divide B.
            alike: Deprecated name of ``images_per_recipe``.

        Returns:
            Low-resolution images of ``(H/scale, W/scale)`` pixels with their ground truth and targets.

        Raises:
            ValueError: ``x`` has another shape or dtype, or ``images_per_recipe`` is not an integer of at least 1 that
                divides B.
        """
        if alike is not None:
            warnings.warn("alike is now called images_per_recipe", DeprecationWarning, stacklevel=2)
            images_per_recipe = alike
        if x.dim() != 4 or x.shape[1] != 3 or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 (B, 3, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}")
        if 0 in x.shape or x.shape[2] % self.scale or x.shape[3] % self.scale:
            raise ValueError(f"x must have sides that are multiples of scale={self.scale}, got {tuple(x.shape)}")
        if type(images_per_recipe) is not int or images_per_recipe < 1:
            raise ValueError(f"images_per_recipe must be an integer of at least 1, got {images_per_recipe!r}")
        if x.shape[0] % images_per_recipe:
            raise ValueError(
                f"x must hold a multiple of images_per_recipe={images_per_recipe} images, got {x.shape[0]}"
            )
        random = np.random.default_rng(seed)
        recipe = draw_recipe(self.config, x.shape[0] // images_per_recipe, random)
        mask = self._mask(recipe, x, random)
        recipe = recipe.repeated(images_per_recipe)
        mask = None if mask is None else mask.repeat_interleave(images_per_recipe, dim=0)
        noise = torch.Generator(x.device).manual_seed(int(random.integers(2**63)))
        y = self.apply(x, recipe, mask, noise)
        strength = torch.tensor(recipe.strength, device=x.device).view(-1, 1, 1)
        share = strength.expand(-1, *y.shape[2:]).contiguous() if mask is None else strength * _at(mask, y)[:, 0]
        if recipe.camera is not None and self.config.camera.soft_target:
            x = _eight_bit(_photograph(x, recipe.camera, 1))
        return Degraded(y, share, recipe, x)

    def apply(self, x: Tensor, recipe: Recipe, mask: Tensor | None, noise: torch.Generator) -> Tensor:
        """Apply a recipe.

        Args:
            x: ``(B, 3, H, W)`` float32 in [0, 1].
            recipe: A recipe for B images.
            mask: ``(B, 1, H, W)`` in [0, 1], or None to degrade every pixel in full.
            noise: Random number generator of the noise, on the device of ``x``.

        Returns:
            ``(B, 3, H/scale, W/scale)`` float32 in [0, 1], multiples of 1/255.
        """
        full = x.shape[2:]
        low = (full[0] // self.scale, full[1] // self.scale)
        out = x
        if recipe.single:
            out = bicubic_downsample(x, self.scale)
        elif recipe.camera is not None:
            out = _photograph(x, recipe.camera, self.scale)
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
        return _eight_bit(out)

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

    def _blur(self, x: Tensor, kernels: Sequence[BlurKernel | None], mask: Tensor | None) -> Tensor:
        chosen = [index for index, kernel in enumerate(kernels) if kernel is not None]
        if not chosen:
            return x
        values = torch.stack([kernel.values() for kernel in kernels if kernel is not None]).to(x.device)
        margin = SIDE // 2
        # Reflection needs an image that is larger than the margin.
        border = "reflect" if min(x.shape[2:]) > margin else "replicate"
        padded = F.pad(x[chosen], (margin,) * 4, mode=border)
        return _blended(x, chosen, self._filter(padded, values, padding="valid"), mask)

    def _compress(self, x: Tensor, qualities: Sequence[float | None], mask: Tensor | None) -> Tensor:
        chosen = [index for index, quality in enumerate(qualities) if quality is not None]
        if not chosen:
            return x
        values = torch.tensor([quality for quality in qualities if quality is not None], device=x.device)
        return _blended(x, chosen, self._jpeg(x[chosen].clamp(0.0, 1.0), values), mask)


def _eight_bit(x: Tensor) -> Tensor:
    return (x.clamp(0.0, 1.0) * 255.0).round() / 255.0


def _photograph(x: Tensor, cameras: Sequence[Camera], pitch: int) -> Tensor:
    """Return the images that cameras record of a scene. A pixel of an image is ``pitch`` pixels of the scene wide.

    The Gaussian blur is applied to the spectrum, where it is exact at every standard deviation. Sampled kernels with a
    standard deviation below one pixel are not exact. The values at the centres of the camera's pixels are then
    sharpened.

    Args:
        x: ``(B, 3, H, W)``, H and W multiples of ``pitch``.
        cameras: B cameras.
        pitch: Width of a pixel of the camera, at least 1.

    Returns:
        ``(B, 3, H/pitch, W/pitch)``, not clamped.
    """
    first, second, rotation, amount = (
        x.new_tensor(values).view(-1, 1, 1, 1)
        for values in zip(*((*camera.sigma, camera.rotation, camera.sharpening) for camera in cameras), strict=True)
    )

    def blur(fy: Tensor, fx: Tensor) -> Tensor:
        along = fx * rotation.cos() + fy * rotation.sin()
        across = fy * rotation.cos() - fx * rotation.sin()
        gaussian = torch.exp(-2 * (math.pi * pitch) ** 2 * ((first * along) ** 2 + (second * across) ** 2))
        # The centre of the camera's first pixel lies this far from that of the scene's first pixel.
        return torch.polar(gaussian, (math.pi * (pitch - 1)) * (fx + fy).expand_as(gaussian))

    def sharpen(fy: Tensor, fx: Tensor) -> Tensor:
        return 1 + amount * (1 - torch.exp(-2 * (math.pi * UNSHARP_SIGMA) ** 2 * (fx**2 + fy**2)))

    widest = max(max(camera.sigma) for camera in cameras)
    blurred = _filtered(x, blur, math.ceil(4 * pitch * widest))[:, :, ::pitch, ::pitch]
    return _filtered(blurred, sharpen, math.ceil(4 * UNSHARP_SIGMA))


def _filtered(x: Tensor, transfer: Callable[[Tensor, Tensor], Tensor], margin: int) -> Tensor:
    """Multiply the spectrum by a function of the vertical and horizontal frequency in cycles per pixel."""
    border = "reflect" if min(x.shape[2:]) > margin else "replicate"
    padded = F.pad(x, (margin,) * 4, mode=border)
    height, width = padded.shape[2:]
    fy = torch.fft.fftfreq(height, device=x.device)[:, None]
    fx = torch.fft.rfftfreq(width, device=x.device)
    out: Tensor = torch.fft.irfft2(torch.fft.rfft2(padded) * transfer(fy, fx), s=(height, width))
    return out[:, :, margin : height - margin, margin : width - margin]


def _blended(x: Tensor, chosen: Sequence[int], changed: Tensor, mask: Tensor | None) -> Tensor:
    """Return the images, the chosen ones replaced by their changed versions, blended by the mask."""
    if mask is not None:
        changed = torch.lerp(x[chosen], changed, _at(mask, x)[chosen])
    if len(chosen) == x.shape[0]:
        return changed
    out = x.clone()
    out[chosen] = changed
    return out


def _at(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask at the size of the images."""
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
    """Return the difference between Poisson counts and their rates, in units of [0, 1]; for gray noise, of the luma.

    As in Real-ESRGAN, the number of photons at full brightness is the number of distinct 8-bit values of the image,
    rounded up to a power of two.
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
