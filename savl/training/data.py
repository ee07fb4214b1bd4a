"""Training pairs: random patches of high-resolution images, degraded on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from savl.degradation import LightDegradation, bicubic_downsample
from savl.inference.image_folder import decode_rgb, find_images


@dataclass(frozen=True)
class Batch:
    """One step's images, float32 in [0, 1]."""

    y: Tensor
    """``(B, 3, h, w)`` degraded low-resolution images."""
    x: Tensor
    """``(B, 3, scale·h, scale·w)`` high-resolution images."""
    z: Tensor
    """``(B, 3, h, w)`` content code: the clean downsample of x."""


class PatchSource:
    """Random patches of all images under some folders, every pixel equally likely to be drawn.

    Images are decoded once and kept as 8-bit pixels (3 bytes each). A batch depends on (seed, step) alone, so a resumed
    run sees what the uninterrupted one would have seen.
    """

    def __init__(
        self,
        folders: Iterable[str | Path],
        *,
        patch: int,
        batch: int,
        scale: int,
        seed: int,
        degradation: LightDegradation,
        on_image: Callable[[int, int], None] | None = None,
    ) -> None:
        """Decode the images.

        Args:
            folders: Searched recursively for images.
            patch: Side of the LR patches in pixels.
            batch: Patches per batch.
            scale: Factor between LR and HR.
            seed: Base of every draw.
            degradation: Applied to the clean LR patches.
            on_image: Told (decoded so far, total) after each image.

        Raises:
            ValueError: A folder does not exist, or there is no image, or none large enough.
            ImageFileError: An image cannot be read.
        """
        self.side = patch * scale
        self.batch = batch
        self.scale = scale
        self.seed = seed
        self.degradation = degradation
        paths = find_images(folders)
        self.images: list[np.ndarray] = []
        small = 0
        for index, path in enumerate(paths):
            pixels = decode_rgb(path)
            if min(pixels.shape[:2]) >= self.side:
                self.images.append(pixels)
            else:
                small += 1
            if on_image is not None:
                on_image(index + 1, len(paths))
        if not self.images:
            raise ValueError(
                f"data.hr: none of the {small} images is at least {self.side} pixels on both sides, which "
                f"patch={patch} at scale {scale} needs; use a smaller patch or larger images"
            )
        area = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self.weights = area / area.sum()

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        random = np.random.default_rng((self.seed, step))
        x = np.stack([self._patch(random) for _ in range(self.batch)])
        hr = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255.0
        z = bicubic_downsample(hr, self.scale)
        return Batch(y=self.degradation(z, random), x=hr, z=z)

    def _patch(self, random: np.random.Generator) -> np.ndarray:
        image = self.images[int(random.choice(len(self.images), p=self.weights))]
        top = int(random.integers(image.shape[0] - self.side + 1))
        left = int(random.integers(image.shape[1] - self.side + 1))
        patch = np.rot90(image[top : top + self.side, left : left + self.side], int(random.integers(4)))
        return patch[:, ::-1] if random.random() < 0.5 else patch
