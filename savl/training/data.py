"""Training pairs: random patches of high-resolution images, degraded as they are drawn, and mixed in a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.degradation import Degradation, bicubic_downsample
from savl.inference.image_folder import find_images
from savl.training.config import DataConfig
from savl.training.decoded_images import decode_images


@dataclass(frozen=True)
class Batch:
    """One step's images, float32 in [0, 1]."""

    y: Tensor
    """``(B, 3, h, w)`` degraded low-resolution images."""
    x: Tensor
    """``(B, 3, scale·h, scale·w)`` high-resolution images."""
    z: Tensor
    """``(B, 3, h, w)`` content code: the clean downsample of x."""
    severity: Tensor | None = None
    """``(B, h, w)`` in [0, 1]: how strongly each pixel of y was degraded, where that is known."""
    alike: int = 1
    """So many images, one after the other, were degraded by one recipe through one mask."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        severity = None if self.severity is None else self.severity.to(device)
        return Batch(self.y.to(device), self.x.to(device), self.z.to(device), severity, self.alike)


class PatchSource:
    """Random patches of all images under some folders, an image as likely as it is large.

    Images are decoded once and kept as 8-bit pixels, 3 bytes a pixel.
    """

    def __init__(
        self,
        folders: Iterable[str | Path],
        side: int,
        on_image: Callable[[int, int], None] | None = None,
        cache: str | Path = "",
    ) -> None:
        """Decode the images.

        Args:
            folders: Searched recursively for images.
            side: Of the patches, pixels.
            on_image: Told (decoded so far, total) after each image.
            cache: Folder that keeps them decoded, or an empty string; see `decode_images`.

        Raises:
            ValueError: A folder does not exist, or there is no image, or none large enough.
            ImageFileError: An image cannot be read.
            OSError: The cache cannot be written or read.
        """
        self.side = side
        paths = find_images(folders)
        decoded = decode_images(paths, cache, on_image)
        self.images = [pixels for pixels in decoded if min(pixels.shape[:2]) >= side]
        self.left_out = len(decoded) - len(self.images)
        """Images that are too small."""
        if not self.images:
            raise ValueError(
                f"data.hr: none of the {len(paths)} images is at least {side} pixels on both sides, which "
                f"(data.patch + 2 · data.margin) · scale needs; use a smaller patch or larger images"
            )
        area = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self.weights = area / area.sum()

    def __call__(self, count: int, random: np.random.Generator) -> Tensor:
        """Patches as they stand in the images, ``(count, 3, side, side)`` uint8."""
        patches = np.stack([self._patch(random) for _ in range(count)])
        return torch.from_numpy(patches).permute(0, 3, 1, 2)

    def _patch(self, random: np.random.Generator) -> NDArray[np.uint8]:
        image = self.images[int(random.choice(len(self.images), p=self.weights))]
        top = int(random.integers(image.shape[0] - self.side + 1))
        left = int(random.integers(image.shape[1] - self.side + 1))
        return image[top : top + self.side, left : left + self.side]


class PairPool:
    """Degraded pairs, of which every step replaces the oldest and draws a batch from all.

    What a step sees follows from seed, rank and step alone, whatever was asked for before: a resumed run fills the pool
    with what the uninterrupted one would have had in it. Pairs are kept with 8 bits, on the device.
    """

    def __init__(
        self,
        patches: PatchSource,
        degradation: Degradation,
        settings: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Set up; the pool is filled at the first call.

        Args:
            patches: Gives patches of ``(patch + 2 · margin) · scale`` pixels.
            degradation: What becomes of them.
            settings: Sizes.
            seed: Base of every draw.
            rank: Of the process; others draw other patches.
            device: Where images are degraded and kept; the CPU if left out.
        """
        self.patches = patches
        self.degradation = degradation
        self.settings = settings
        self.device = device or torch.device("cpu")
        self._base = (seed, rank)
        self._groups: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        count = -(-self.settings.pool // self.settings.fresh)
        wanted = range(step, step + count)
        self._groups = {k: self._groups[k] if k in self._groups else self._group(k) for k in wanted}
        random = np.random.default_rng((*self._base, 1, step))
        alike = self.settings.alike
        recipes = self.settings.fresh // alike
        chosen = random.choice(count * recipes, self.settings.batch // alike, replace=False)
        pairs = [self._turned(int(index), step, random) for index in chosen]
        y, x, severity = (torch.cat(part).float() / 255.0 for part in zip(*pairs, strict=True))
        return Batch(y, x, bicubic_downsample(x, self.degradation.scale), severity[:, 0], alike)

    def _turned(self, index: int, step: int, random: np.random.Generator) -> tuple[Tensor, ...]:
        """The images of one recipe, ``(alike, channels, …)`` each, all turned alike: a blur has a direction."""
        alike = self.settings.alike
        group, within = divmod(index, self.settings.fresh // alike)
        turns, mirrored = int(random.integers(4)), random.random() < 0.5
        these = slice(within * alike, (within + 1) * alike)
        pairs = tuple(torch.rot90(part[these], turns, (2, 3)) for part in self._groups[step + group])
        return tuple(part.flip(3) for part in pairs) if mirrored else pairs

    def _group(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """LR images, HR images and severity, ``(fresh, channels, …)`` uint8, degraded together."""
        random = np.random.default_rng((*self._base, 0, number))
        whole = self.patches(self.settings.fresh, random).to(self.device)
        seed = int(random.integers(2**63))
        degraded = self.degradation(whole.float() / 255.0, seed, alike=self.settings.alike)
        y = torch.cat((degraded.y, degraded.severity[:, None]), dim=1).mul(255.0).round().byte()
        patch, scale = self.settings.patch, self.degradation.scale
        # Images of one recipe are cut at one place: through one mask, and with one grid of JPEG.
        alike = self.settings.alike
        places = random.integers(0, 2 * self.settings.margin + 1, (self.settings.fresh // alike, 2)).repeat(alike, 0)
        lr = torch.stack([_cut(image, place, patch) for image, place in zip(y, places, strict=True)])
        hr = [_cut(image, scale * place, scale * patch) for image, place in zip(whole, places, strict=True)]
        return lr[:, :3], torch.stack(hr), lr[:, 3:]


def _cut(image: Tensor, place: NDArray[np.int64], side: int) -> Tensor:
    top, left = place.tolist()
    return image[:, top : top + side, left : left + side]
