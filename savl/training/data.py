"""Training pairs: patches that are degraded during training or cut from real pairs, in a pool, and prefetched."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from savl.degradation import Degradation, bicubic_downsample
from savl.training.data_config import DataConfig
from savl.training.paired_patches import PairedPatches
from savl.training.patches import PatchSource


@dataclass(frozen=True)
class Batch:
    """Images of one step, float32 in [0, 1]."""

    y: Tensor
    """``(B, 3, h, w)`` degraded low-resolution images."""
    x: Tensor
    """``(B, 3, scale·h, scale·w)`` high-resolution images."""
    z: Tensor
    """``(B, 3, h, w)`` content code: the clean downsample of x."""
    degradation_mask: Tensor | None = None
    """``(B, h, w)`` in [0, 1]: how strongly each pixel of y was degraded, 0 for real pairs; None if that is not known
    for any image."""
    images_per_recipe: int = 1
    """Number of consecutive images that were degraded by one recipe through one mask, or cut from one real pair."""
    amounts: Tensor | None = None
    """``(B, 3)``: how much blur, noise and JPEG each image has (`savl.degradation.recipe.Recipe.amounts`). NaN
    means not known. Only images with a single operation have three known amounts; real pairs have none."""
    real: Tensor | None = None
    """``(B,)`` bool: which images are from real pairs, so that their degradation is not known; None if none is."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Group(NamedTuple):
    """Training pairs that enter the pool together; the first dimension of each tensor is ``fresh``."""

    y: Tensor
    """``(fresh, 3, h, w)`` uint8."""
    x: Tensor
    """``(fresh, 3, scale·h, scale·w)`` uint8."""
    degradation_mask: Tensor
    """``(fresh, 1, h, w)`` uint8, 0 for real pairs."""
    amounts: Tensor
    """``(fresh, 3)`` float32, see `Batch`."""
    real: Tensor
    """``(fresh,)`` bool."""


GroupArrays = tuple[NDArray[Any], ...]
"""A `Group` as it is sent between processes."""


class PairPool:
    """Pool of degraded and real pairs: every step replaces the oldest ones and draws a batch from all.

    The batch of a step depends on seed, rank and step alone, so that a resumed run continues with the batches of an
    uninterrupted one. Worker processes give the same pairs as this process, bit for bit if this process computes with a
    single thread as they do; otherwise about one pixel in thousands is rounded differently. Pairs are kept with 8 bits
    per channel, on the device.
    """

    def __init__(
        self,
        patches: PatchSource | None,
        degradation: Degradation,
        settings: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        device: torch.device | None = None,
        pairs: PairedPatches | None = None,
    ) -> None:
        """Prepare; the pool is filled at the first call.

        Args:
            patches: Source of patches of ``(patch + 2 · margin) · scale`` pixels; None if all are from real pairs.
            degradation: Degrades them.
            settings: Sizes, device of the degradation and number of worker processes.
            seed: Seed of all draws.
            rank: Rank of the training process; each rank draws other patches.
            device: Device of the pairs; the CPU by default.
            pairs: Source of patches of real pairs; None if there are none.
        """
        self.settings = settings
        self.scale = degradation.scale
        self.device = device or torch.device("cpu")
        self._seed = (seed, rank)
        degrade_on = torch.device("cpu") if settings.degrade_on == "cpu" else self.device
        groups = _Groups(patches, pairs, degradation, settings, self._seed, degrade_on)
        self._groups: Callable[[int], Group] = (
            _WorkerProcesses(groups, settings.workers) if settings.workers else groups
        )
        self._numbers: list[int | None] = [None] * -(-settings.pool // settings.fresh)
        """Number of the group in each slot of the pool."""
        self._pool: Group | None = None
        self._has_real = pairs is not None

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step."""
        pool = self._filled(step)
        random = np.random.default_rng((*self._seed, 1, step))
        per_recipe, slots = self.settings.images_per_recipe, len(self._numbers)
        recipes = self.settings.fresh // per_recipe  # of a group
        chosen = random.choice(slots * recipes, self.settings.batch // per_recipe, replace=False)
        turns = [(int(random.integers(4)), bool(random.random() < 0.5)) for _ in chosen]
        group, within = np.divmod(chosen, recipes)
        first = (step + group) % slots * self.settings.fresh + within * per_recipe
        rows = torch.from_numpy((first[:, None] + np.arange(per_recipe)).reshape(-1)).to(self.device)
        y, x, mask = (_rotate_and_mirror(part[rows], turns, per_recipe).float() / 255.0 for part in pool[:3])
        z, real = bicubic_downsample(x, self.scale), pool.real[rows] if self._has_real else None
        return Batch(y, x, z, mask[:, 0], per_recipe, pool.amounts[rows], real)

    def close(self) -> None:
        """End the worker processes; the next call starts new ones."""
        if isinstance(self._groups, _WorkerProcesses):
            self._groups.close()

    def _filled(self, step: int) -> Group:
        """Return the pool of a step, flattened over its groups."""
        slots = len(self._numbers)
        for number in range(step, step + slots):
            slot = number % slots
            if self._numbers[slot] == number:
                continue
            group = self._groups(number)
            if self._pool is None:
                self._pool = Group(*(part.new_empty(slots, *part.shape, device=self.device) for part in group))
            for whole, part in zip(self._pool, group, strict=True):
                whole[slot] = part
            self._numbers[slot] = number
        assert self._pool is not None
        return Group(*(part.flatten(0, 1) for part in self._pool))


def _rotate_and_mirror(images: Tensor, turns: list[tuple[int, bool]], per_recipe: int) -> Tensor:
    """Rotate and mirror images; those of one recipe in the same way, because a blur has a direction."""
    for quarter, mirrored in set(turns):
        recipes = [index for index, turn in enumerate(turns) if turn == (quarter, mirrored)]
        rows = [index * per_recipe + image for index in recipes for image in range(per_recipe)]
        part = torch.rot90(images[rows], quarter, (2, 3))
        images[rows] = part.flip(3) if mirrored else part
    return images


@dataclass(frozen=True)
class _Groups(Dataset[GroupArrays]):
    """Groups of pairs by their number; group n enters the pool at step n."""

    patches: PatchSource | None
    pairs: PairedPatches | None
    degradation: Degradation
    settings: DataConfig
    seed: tuple[int, int]
    device: torch.device

    def __call__(self, number: int) -> Group:
        random = np.random.default_rng((*self.seed, 0, number))
        recipes = self.settings.fresh // self.settings.images_per_recipe
        real = 0 if self.pairs is None else self.pairs.recipes_of(number, recipes)
        parts = []
        if real < recipes:
            parts.append(self._degraded(recipes - real, random))
        if real:
            parts.append(self._real(real, random))
        return parts[0] if len(parts) == 1 else Group(*map(torch.cat, zip(*parts, strict=True)))

    def _degraded(self, recipes: int, random: np.random.Generator) -> Group:
        assert self.patches is not None
        per_recipe = self.settings.images_per_recipe
        whole = self.patches(recipes * per_recipe, random).to(self.device)
        seed = int(random.integers(2**63))
        degraded = self.degradation(whole.float() / 255.0, seed, images_per_recipe=per_recipe)
        y = torch.cat((degraded.y, degraded.degradation_mask[:, None]), dim=1).mul(255.0).round().byte()
        x = degraded.x.mul(255.0).round().byte()
        patch, scale = self.settings.patch, self.degradation.scale
        # Images of one recipe are cropped at one position, where they share the mask and the grid of JPEG blocks.
        corners = random.integers(0, 2 * self.settings.margin + 1, (recipes, 2)).repeat(per_recipe, 0)
        lr = torch.stack([_crop(image, corner, patch) for image, corner in zip(y, corners, strict=True)])
        hr = [_crop(image, scale * corner, scale * patch) for image, corner in zip(x, corners, strict=True)]
        amounts = torch.from_numpy(degraded.recipe.amounts())
        return Group(lr[:, :3], torch.stack(hr), lr[:, 3:], amounts, torch.zeros(len(amounts), dtype=torch.bool))

    def _real(self, recipes: int, random: np.random.Generator) -> Group:
        assert self.pairs is not None
        y, x = (part.to(self.device) for part in self.pairs(recipes, self.settings.images_per_recipe, random))
        images = len(y)
        mask, amounts = torch.zeros_like(y[:, :1]), torch.full((images, 3), torch.nan)
        return Group(y, x, mask, amounts, torch.ones(images, dtype=torch.bool))

    def __getitem__(self, number: int) -> GroupArrays:
        return tuple(part.cpu().numpy() for part in self(number))


class _WorkerProcesses:
    """Consecutive groups that several processes make in advance."""

    PREFETCH = 4
    """Groups that each process makes in advance."""

    def __init__(self, groups: _Groups, workers: int) -> None:
        self._dataset = groups
        self._workers = workers
        self._next: int | None = None
        self._loaded: Iterator[GroupArrays] = iter(())

    def __call__(self, number: int) -> Group:
        if number != self._next:
            self.close()
            self._loaded = self._started(number)
        self._next = number + 1
        return Group(*map(torch.from_numpy, next(self._loaded)))

    def _started(self, number: int) -> Iterator[GroupArrays]:
        # Not a draw from torch's global generator: a step may be drawing from it.
        generator = torch.Generator()
        with _signals_blocked(), warnings.catch_warnings():
            # The number of processes is the choice of the user.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            return iter(
                DataLoader(
                    self._dataset,
                    batch_size=None,
                    collate_fn=_unchanged,
                    sampler=count(number),
                    num_workers=self._workers,
                    prefetch_factor=self.PREFETCH,
                    generator=generator,
                    worker_init_fn=_exit_at_once,
                    multiprocessing_context="spawn",  # CUDA does not survive a fork
                )
            )

    def close(self) -> None:
        """End the processes, which happens when their iterator is deleted."""
        self._loaded, self._next = iter(()), None


def _unchanged(group: Any) -> Any:
    """Keep arrays, whose bytes are sent to this process, instead of converting them to tensors.

    Tensors are sent through shared memory by a thread of C++, and some processes that sent them were aborted at exit.
    """
    return group


def _exit_at_once(worker: int) -> None:
    """Make a worker process end without finalizing its interpreter, with exit code 0.

    A worker ends while its thread that sends arrays may still run. The interpreter terminates such threads when it is
    finalized. If one is executing C++ code at that time, the process is aborted, and the trainer reports a failed
    worker.
    """
    atexit.register(os._exit, 0)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that ignore SIGINT and SIGTERM, which a terminal sends to a whole process group.

    The trainer obeys the signal: it completes its step, writes a checkpoint, and ends the processes.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _crop(image: Tensor, corner: NDArray[np.int64], side: int) -> Tensor:
    top, left = corner.tolist()
    return image[:, top : top + side, left : left + side]


class Prefetcher:
    """Makes the next batch in a thread while the current step runs, on a GPU in a CUDA stream of its own.

    Copies to and from the GPU make the thread wait for its own stream only. In the stream of the training it would wait
    for all passes that are enqueued there, and the GPU would idle until the batch is made.
    """

    def __init__(self, source: Callable[[int], Batch], device: torch.device) -> None:
        """Prepare; `start` begins the first batch.

        Args:
            source: Returns the batch of a step.
            device: Device of the batches.
        """
        self._source = source
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._upcoming: Future[tuple[Batch, torch.cuda.Event | None]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def start(self, step: int) -> None:
        """Start to make the batch of a step."""
        self._upcoming = self._thread.submit(self._make, step)

    def take(self) -> Batch:
        """Return the batch that was started last, on the device, ready for the current stream.

        Raises:
            Exception: The exception that the source raised, if any.
        """
        assert self._upcoming is not None
        batch, made = self._upcoming.result()
        if made is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(made)
            for tensor in vars(batch).values():
                if isinstance(tensor, Tensor):
                    # The memory belongs to the other stream, which could reuse it while this one still reads it.
                    tensor.record_stream(current)
        return batch

    def _make(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            batch = self._source(step).to(self._device)
        return batch, None if self._stream is None else self._stream.record_event()
