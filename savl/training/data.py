"""Training pairs: random patches of high-resolution images, degraded as they are drawn, and mixed in a pool."""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from savl.degradation import Degradation, bicubic_downsample
from savl.images.folder import find_images
from savl.training.config import DataConfig
from savl.training.decoded_images import cache_file, decode_images, map_images


@dataclass(frozen=True)
class Batch:
    """One step's images, float32 in [0, 1]."""

    y: Tensor
    """``(B, 3, h, w)`` degraded low-resolution images."""
    x: Tensor
    """``(B, 3, scale·h, scale·w)`` high-resolution images."""
    z: Tensor
    """``(B, 3, h, w)`` content code: the clean downsample of x."""
    degradation_mask: Tensor | None = None
    """``(B, h, w)`` in [0, 1]: how strongly each pixel of y was degraded; None where that is not known."""
    images_per_recipe: int = 1
    """Number of consecutive images that were degraded by one recipe through one mask."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        mask = None if self.degradation_mask is None else self.degradation_mask.to(device)
        return Batch(self.y.to(device), self.x.to(device), self.z.to(device), mask, self.images_per_recipe)


class PatchSource:
    """Random patches of all images under some folders, an image as likely as it is large.

    Images are decoded once and kept as 8-bit pixels, 3 bytes a pixel. Where there is a cache, a pickled one holds the
    name of its file instead of the pixels.
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
        self._mapped = None if cache == "" else (cache_file(paths, cache), len(paths))
        self.images = self._large_enough(decoded)
        self.left_out = len(decoded) - len(self.images)
        """Images that are too small."""
        if not self.images:
            raise ValueError(
                f"data.hr: none of the {len(paths)} images is at least {side} pixels on both sides, which "
                f"(data.patch + 2 · data.margin) · scale needs; use a smaller patch or larger images"
            )
        area = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self.weights = area / area.sum()

    def _large_enough(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return [pixels for pixels in images if min(pixels.shape[:2]) >= self.side]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._mapped is not None:
            del state["images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._mapped is not None:
            self.images = self._large_enough(map_images(*self._mapped))

    def __call__(self, count: int, random: np.random.Generator) -> Tensor:
        """Patches as they stand in the images, ``(count, 3, side, side)`` uint8."""
        patches = np.stack([self._patch(random) for _ in range(count)])
        return torch.from_numpy(patches).permute(0, 3, 1, 2)

    def _patch(self, random: np.random.Generator) -> NDArray[np.uint8]:
        image = self.images[int(random.choice(len(self.images), p=self.weights))]
        top = int(random.integers(image.shape[0] - self.side + 1))
        left = int(random.integers(image.shape[1] - self.side + 1))
        return image[top : top + self.side, left : left + self.side]


Group = tuple[Tensor, Tensor, Tensor]
"""LR images, HR images and degradation masks, ``(fresh, channels, …)`` uint8, degraded together."""
Sent = tuple[NDArray[np.uint8], ...]
"""The same on its way from another process."""


class PairPool:
    """Degraded pairs, of which every step replaces the oldest and draws a batch from all.

    What a step sees follows from seed, rank and step alone, whatever was asked for before: a resumed run fills the pool
    with what the uninterrupted one would have had in it. Other processes degrade alike, to the bit where this one
    computes with a single thread as they do; with more, a pixel in some thousands is rounded to its neighbour. Pairs
    are kept with 8 bits, on the device.
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
            settings: Sizes, and by how many processes images are degraded.
            seed: Base of every draw.
            rank: Of the process; others draw other patches.
            device: Where pairs are kept, and images degraded unless the settings say otherwise; the CPU if left out.
        """
        self.settings = settings
        self.scale = degradation.scale
        self.device = device or torch.device("cpu")
        self._base = (seed, rank)
        place = torch.device("cpu") if settings.degrade_on == "cpu" else self.device
        here = _Groups(patches, degradation, settings, self._base, place)
        self._groups: Callable[[int], Group] = _InOtherProcesses(here, settings.workers) if settings.workers else here
        self._numbers: list[int | None] = [None] * -(-settings.pool // settings.fresh)
        """Which group lies in a place of the pool."""
        self._pool: Group | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        pool = self._filled(step)
        random = np.random.default_rng((*self._base, 1, step))
        alike, places = self.settings.images_per_recipe, len(self._numbers)
        recipes = self.settings.fresh // alike  # of a group
        chosen = random.choice(places * recipes, self.settings.batch // alike, replace=False)
        turns = [(int(random.integers(4)), bool(random.random() < 0.5)) for _ in chosen]
        group, within = np.divmod(chosen, recipes)
        first = (step + group) % places * self.settings.fresh + within * alike
        rows = torch.from_numpy((first[:, None] + np.arange(alike)).reshape(-1)).to(self.device)
        y, x, mask = (_turned(part[rows], turns, alike).float() / 255.0 for part in pool)
        return Batch(y, x, bicubic_downsample(x, self.scale), mask[:, 0], alike)

    def close(self) -> None:
        """End the processes that degrade; the next call starts others."""
        if isinstance(self._groups, _InOtherProcesses):
            self._groups.close()

    def _filled(self, step: int) -> Group:
        """The pool of a step, images one after the other."""
        places = len(self._numbers)
        for number in range(step, step + places):
            place = number % places
            if self._numbers[place] == number:
                continue
            group = self._groups(number)
            if self._pool is None:
                y, x, mask = (part.new_empty(places, *part.shape, device=self.device) for part in group)
                self._pool = y, x, mask
            for whole, part in zip(self._pool, group, strict=True):
                whole[place] = part
            self._numbers[place] = number
        assert self._pool is not None
        y, x, mask = (part.flatten(0, 1) for part in self._pool)
        return y, x, mask


def _turned(images: Tensor, turns: list[tuple[int, bool]], alike: int) -> Tensor:
    """Every ``alike`` images by so many right angles, and mirrored or not: a blur has a direction."""
    for quarter, mirrored in set(turns):
        these = [k * alike + i for k, turn in enumerate(turns) if turn == (quarter, mirrored) for i in range(alike)]
        part = torch.rot90(images[these], quarter, (2, 3))
        images[these] = part.flip(3) if mirrored else part
    return images


@dataclass(frozen=True)
class _Groups(Dataset[Sent]):
    """The pairs that a step brings into the pool, by its number."""

    patches: PatchSource
    degradation: Degradation
    settings: DataConfig
    base: tuple[int, int]
    device: torch.device

    def __call__(self, number: int) -> Group:
        random = np.random.default_rng((*self.base, 0, number))
        whole = self.patches(self.settings.fresh, random).to(self.device)
        seed = int(random.integers(2**63))
        degraded = self.degradation(whole.float() / 255.0, seed, images_per_recipe=self.settings.images_per_recipe)
        y = torch.cat((degraded.y, degraded.degradation_mask[:, None]), dim=1).mul(255.0).round().byte()
        patch, scale = self.settings.patch, self.degradation.scale
        # Images of one recipe are cut at one place: through one mask, and with one grid of JPEG.
        alike = self.settings.images_per_recipe
        places = random.integers(0, 2 * self.settings.margin + 1, (self.settings.fresh // alike, 2)).repeat(alike, 0)
        lr = torch.stack([_cut(image, place, patch) for image, place in zip(y, places, strict=True)])
        hr = [_cut(image, scale * place, scale * patch) for image, place in zip(whole, places, strict=True)]
        return lr[:, :3], torch.stack(hr), lr[:, 3:]

    def __getitem__(self, number: int) -> Sent:
        return tuple(part.cpu().numpy() for part in self(number))


class _InOtherProcesses:
    """Groups one after the other, made ahead of time by several processes."""

    AHEAD = 4
    """Groups that each process may be ahead."""

    def __init__(self, groups: _Groups, workers: int) -> None:
        self._dataset = groups
        self._workers = workers
        self._next: int | None = None
        self._loaded: Iterator[Sent] = iter(())

    def __call__(self, number: int) -> Group:
        if number != self._next:
            self.close()
            self._loaded = self._started(number)
        self._next = number + 1
        y, x, mask = (torch.from_numpy(part) for part in next(self._loaded))
        return y, x, mask

    def _started(self, number: int) -> Iterator[Sent]:
        # Not a draw from torch's own generator: a step may be drawing from it.
        generator = torch.Generator()
        with _signals_blocked(), warnings.catch_warnings():
            # How many processes are too many for this machine is for the settings to say.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            return iter(
                DataLoader(
                    self._dataset,
                    batch_size=None,
                    collate_fn=_as_it_is,
                    sampler=count(number),
                    num_workers=self._workers,
                    prefetch_factor=self.AHEAD,
                    generator=generator,
                    multiprocessing_context="spawn",  # CUDA does not survive a fork
                )
            )

    def close(self) -> None:
        """End the processes, which follows from forgetting what they make."""
        self._loaded, self._next = iter(()), None


def _as_it_is(group: Any) -> Any:
    """Arrays stay arrays, whose bytes are sent.

    Some processes that sent tensors, whose memory is shared from within C++ by a thread, were aborted as they ended.
    """
    return group


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started meanwhile never see what asks to stop, which reaches a whole group of processes.

    The trainer ends its step in hand, writes a checkpoint, and ends them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cut(image: Tensor, place: NDArray[np.int64], side: int) -> Tensor:
    top, left = place.tolist()
    return image[:, top : top + side, left : left + side]
