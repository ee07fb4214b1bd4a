"""Random patches of real pairs, which are checked and measured when they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.images.pairs import Pair, check_sizes, match_pairs, reduced
from savl.images.result_mark import read_mark
from savl.training.alignment import measure_alignment
from savl.training.data_config import PairsConfig
from savl.training.patches import Images, OnImage, cache_file, decode_images, map_images

LISTED = 20
"""Largest number of unsuitable pairs that an error lists."""
SUPPORT = 2
"""LR pixels around a patch that the antialiased bicubic kernel reads when it reduces the patch."""


class PairedPatches:
    """Random patches of real pairs, at the same place of both images; a pair's probability is proportional to its area.

    Images are decoded once and kept as those of `savl.training.patches.PatchSource`.
    """

    def __init__(
        self,
        settings: PairsConfig,
        side: int,
        scale: int,
        on_image: OnImage | None = None,
        cache: str | Path = "",
        include_results: bool = False,
    ) -> None:
        """Decode the images, and check and measure the pairs.

        Args:
            settings: Folders, share and limits.
            side: Side of the LR patches in pixels.
            scale: Size of the originals divided by that of the LR images.
            on_image: Called with (images decoded, images in total) after each image.
            cache: Folder for the decoded images, or an empty string; see `savl.training.patches.decode_images`.
            include_results: Whether to include pairs whose original has a mark of savl (`savl.images.result_mark`).

        Raises:
            ValueError: A folder does not exist, names or sizes do not match, a pair is unsuitable and
                ``settings.unsuitable`` is ``refuse``, or no pair can be used.
            ImageFileError: An image cannot be read.
            OSError: The cache cannot be written or read.
        """
        self.side, self.scale = side, scale
        self._settings = settings
        try:
            found = [pair for folders in zip(settings.lr, settings.hr, strict=True) for pair in match_pairs(*folders)]
        except ValueError as error:
            raise ValueError(f"pairs: {error}") from error
        pairs = found if include_results else [pair for pair in found if read_mark(pair.hr) is None]
        self.excluded_results = len(found) - len(pairs)
        """Number of pairs that are skipped because savl has made their originals."""
        paths = [pair.lr for pair in pairs] + [pair.hr for pair in pairs]
        decoded = decode_images(paths, cache, on_image) if pairs else []
        self._cached = None if cache == "" else (cache_file(paths, cache), len(paths))
        self.too_small = 0
        """Number of pairs that are skipped because they are smaller than a patch."""
        self.unsuitable: list[str] = []
        """Name of each pair that is skipped because its images do not fit each other, with the reason."""
        self._used: list[int] = []
        """Indices of the pairs that are used."""
        for index, (pair, images) in enumerate(zip(pairs, _as_pairs(decoded), strict=True)):
            size = self._size(pair, *images)
            if min(size) < side:
                self.too_small += 1
            elif reason := self._unsuitable(*self._cut(*images, (0, 0), size)):
                self.unsuitable.append(f"{pair.name} ({reason})")
            else:
                self._used.append(index)
        if not self._used or (self.unsuitable and settings.unsuitable == "refuse"):
            raise ValueError(self._refusal(len(found)))
        self._images = self._selected(decoded)
        area = np.array([float(hr.shape[0] * hr.shape[1]) for _, hr in self._images])
        self._weights = area / area.sum()

    def __len__(self) -> int:
        """Return the number of pairs that are used."""
        return len(self._used)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._cached is not None:
            del state["_images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._cached is not None:
            self._images = self._selected(map_images(*self._cached))

    def recipes_of(self, group: int, recipes: int) -> int:
        """Return how many recipes of a group are real pairs, so that ``share`` of all recipes up to this group are."""
        share = self._settings.share * recipes
        return math.floor(share * (group + 1)) - math.floor(share * group)

    def __call__(self, recipes: int, images_per_recipe: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw patches, neither rotated nor mirrored.

        Args:
            recipes: Number of pairs that are drawn.
            images_per_recipe: Number of patches that are cut from each of them.
            random: Random number generator.

        Returns:
            ``(recipes · images_per_recipe, 3, side, side)`` and ``(…, 3, scale·side, scale·side)``, both uint8.
        """
        misregistered = self._settings.misregistration > 0
        patches = []
        for _ in range(recipes):
            lr, hr = self._images[int(random.choice(len(self._images), p=self._weights))]
            for _ in range(images_per_recipe):
                top, left = (int(random.integers(length // self.scale - self.side + 1)) for length in hr.shape[:2])
                patch, original = self._cut(lr, hr, (top, left), (self.side, self.side))
                patches.append((patch, self._misregistered(hr, (top, left), random) if misregistered else original))
        low, high = zip(*patches, strict=True)
        return torch.stack(low), torch.stack(high)

    def _misregistered(self, hr: NDArray[np.uint8], corner: tuple[int, int], random: np.random.Generator) -> Tensor:
        """Cut the HR patch at a corner in LR pixels, shifted at random by whole HR pixels, but not beyond the image."""
        shifts = np.rint(random.normal(scale=self._settings.misregistration, size=2)).astype(int)
        side = self.scale * self.side
        starts = [
            min(max(self.scale * start + int(shift), 0), length - side)
            for start, shift, length in zip(corner, shifts, hr.shape[:2], strict=True)
        ]
        return _rectangle(hr, starts, (side, side), 1)

    def _selected(self, decoded: Images) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        pairs = _as_pairs(decoded)
        return [pairs[index] for index in self._used]

    def _size(self, pair: Pair, lr: NDArray[np.uint8], hr: NDArray[np.uint8]) -> tuple[int, int]:
        """Return height and width in LR pixels, or refuse the sizes."""
        if not self._is_enlarged(lr, hr):
            try:
                check_sizes(pair, lr.shape[:2], hr.shape[:2], self.scale, remedy="set pairs.reduce_lr = true")
            except ValueError as error:
                raise ValueError(f"pairs: {error}") from error
        return hr.shape[0] // self.scale, hr.shape[1] // self.scale

    def _is_enlarged(self, lr: NDArray[np.uint8], hr: NDArray[np.uint8]) -> bool:
        """Return whether an LR image has the size of its original and is to be reduced."""
        return self._settings.reduce_lr and lr.shape == hr.shape

    def _cut(
        self, lr: NDArray[np.uint8], hr: NDArray[np.uint8], corner: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Cut a rectangle, given in LR pixels, from both images: ``(3, h, w)`` and ``(3, scale·h, scale·w)`` uint8."""
        high = _rectangle(hr, corner, size, self.scale)
        if not self._is_enlarged(lr, hr):
            return _rectangle(lr, corner, size, 1), high
        first = [max(start - SUPPORT, 0) for start in corner]
        last = [
            min(start + length + SUPPORT, side // self.scale)
            for start, length, side in zip(corner, size, lr.shape[:2], strict=True)
        ]
        around = _rectangle(lr, first, [end - start for start, end in zip(first, last, strict=True)], self.scale)
        low = reduced(around.float() / 255.0, self.scale).mul(255.0).round().byte()
        (top, left), (height, width) = [start - begin for start, begin in zip(corner, first, strict=True)], size
        return low[:, top : top + height, left : left + width], high

    def _unsuitable(self, lr: Tensor, hr: Tensor) -> str:
        """Return why a pair cannot be used, or an empty string if it can."""
        limits = self._settings
        measured = measure_alignment(lr.float() / 255.0, hr.float() / 255.0, self.scale)
        if measured.correlation < limits.min_correlation:
            return f"the details of its images have a correlation of {measured.correlation:.2f} at any shift"
        if math.hypot(*measured.shift) > limits.max_shift:
            down, right = measured.shift
            return f"the LR image is shifted by {down:+.2f} pixels down and {right:+.2f} right"
        if abs(measured.brightness) > limits.max_brightness:
            return f"the mean of a channel differs by {measured.brightness:+.3f}"
        return ""

    def _refusal(self, found: int) -> str:
        more = f"; and {len(self.unsuitable) - LISTED} more" if len(self.unsuitable) > LISTED else ""
        reasons = [
            f"{self.excluded_results} originals were made by savl (data.include_results)",
            f"{self.too_small} are smaller than data.patch = {self.side}",
            f"{len(self.unsuitable)} are unsuitable",
        ]
        text = f"pairs: {len(self._used)} of {found} can be used; {', '.join(reasons)}"
        return f"{text}: {'; '.join(self.unsuitable[:LISTED])}{more}" if self.unsuitable else text


def _as_pairs(decoded: Images) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Return LR images and originals as pairs, from a list of all LR images and then all originals."""
    half = len(decoded) // 2
    return list(zip(decoded[:half], decoded[half:], strict=True))


def _rectangle(image: NDArray[np.uint8], corner: Sequence[int], size: Sequence[int], scale: int) -> Tensor:
    """Cut a rectangle, given in units of ``scale`` pixels, as ``(3, h, w)`` uint8."""
    rows, columns = (slice(scale * start, scale * (start + length)) for start, length in zip(corner, size, strict=True))
    return torch.from_numpy(np.ascontiguousarray(image[rows, columns].transpose(2, 0, 1)))
