"""Compute tiles of several images in one pass over the network.

The threads of a worker upscale one image each. A tile of one image waits a few milliseconds for tiles of the others
that have the same shape, and they become one batch. On a GPU, a batch of small tiles takes about as long as one of
them. Only one pass over the network runs at a time, because passes in several threads would compete for the same cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from savl.inference.run import Computation
from savl.inference.upscaler import Upscaler
from savl.network import DegradationField

LONGEST_WAIT = 0.02
"""Longest time in seconds that a tile waits for tiles of other images."""


@dataclass(eq=False)
class _Batch:
    """Tiles of one shape that wait to be computed together."""

    inputs: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    closed: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    results: list[Tensor] | None = None


class TileBatcher:
    """Call a network's ``reconstruct`` for tiles of several threads at once.

    Attributes:
        computed: Callback, called with the number of tiles after every batch.
    """

    def __init__(self, most: int, most_pixels: Callable[[], int], computed: Callable[[int], None]) -> None:
        """Create a batcher without images.

        Args:
            most: Largest number of tiles in a batch, at least 1.
            most_pixels: Function that returns the largest number of LR pixels in a batch. A single tile may have more.
            computed: Callback, called with the number of tiles after every batch.
        """
        self.computed = computed
        self._most = most
        self._most_pixels = most_pixels
        self._images = 0
        self._waiting: dict[Any, _Batch] = {}
        self._changed = threading.Condition()
        self._network = threading.Lock()

    @contextmanager
    def image(self) -> Iterator[None]:
        """Mark that this thread upscales an image. Tiles wait only while several threads do."""
        with self._changed:
            self._images += 1
        try:
            yield
        finally:
            with self._changed:
                self._images -= 1
                self._changed.notify_all()

    def estimate(self, function: Callable[[Tensor], DegradationField | None]) -> Any:
        """Return ``function``, the network's ``estimate``, made to wait for passes of other threads."""

        def locked(lr: Tensor) -> DegradationField | None:
            with self._network:
                return function(lr)

        return locked

    def reconstruct(self, function: Callable[..., Tensor]) -> Any:
        """Return ``function``, the network's ``reconstruct``, computed in batches.

        The function that is returned takes the same arguments; ``strength`` must be a tensor or None. An exception of
        ``function`` reaches every thread whose tile causes it by itself.
        """

        def batched(lr: Tensor, field: DegradationField | None, strength: Tensor | None = None) -> Tensor:
            mu, severity = (None, None) if field is None else (field.mu, field.severity)
            given = (lr, mu, severity, strength)
            kind = lr.device.type
            key = (
                tuple(None if each is None else (each.shape, each.dtype) for each in given),
                torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            )
            batch, place = self._join(key, given)
            if place == 0:
                self._lead(key, batch, lambda *parts: _reconstruct(function, parts))
            else:
                batch.done.wait()
            if batch.results is None:  # the batch failed: each thread computes its own tile, or finds its own error
                with self._network:
                    return _reconstruct(function, given)
            return batch.results[place]

        return batched

    def _join(self, key: Any, given: tuple[Tensor | None, ...]) -> tuple[_Batch, int]:
        with self._changed:
            batch = self._waiting.get(key)
            if batch is None or batch.closed:
                batch = self._waiting[key] = _Batch()
            batch.inputs.append(given)
            place = len(batch.inputs) - 1
            if self._is_full(batch):
                batch.closed = True
            self._changed.notify_all()
            return batch, place

    def _is_full(self, batch: _Batch) -> bool:
        lr = batch.inputs[0][0]
        assert lr is not None
        pixels = lr.shape[0] * lr.shape[2] * lr.shape[3]
        return len(batch.inputs) >= self._most or (len(batch.inputs) + 1) * pixels > self._most_pixels()

    def _lead(self, key: Any, batch: _Batch, compute: Callable[..., Tensor]) -> None:
        """Wait for other tiles and for the network, then compute the batch."""
        deadline = time.monotonic() + LONGEST_WAIT
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: batch.closed or len(batch.inputs) >= self._images, timeout=deadline - time.monotonic()
                )
            with self._network:
                with self._changed:  # tiles may still join while another pass runs
                    batch.closed = True
                    if self._waiting.get(key) is batch:
                        del self._waiting[key]
                try:
                    out = compute(*(_joined(column) for column in zip(*batch.inputs, strict=True)))
                except Exception:
                    if len(batch.inputs) == 1:
                        raise
                    return  # out of memory, for example: the tiles are computed one by one
                size = out.shape[0] // len(batch.inputs)
                batch.results = list(out.split(size))
                self.computed(len(batch.inputs))
        finally:
            batch.done.set()


def _joined(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [each for each in tensors if each is not None]
    return torch.cat(present) if len(present) > 1 else present[0] if present else None


def _reconstruct(function: Callable[..., Tensor], parts: tuple[Tensor | None, ...]) -> Tensor:
    lr, mu, severity, strength = parts
    code = None if mu is None else DegradationField(mu=mu, severity=severity)
    return function(lr, code) if strength is None else function(lr, code, strength)


class BatchingUpscaler(Upscaler):
    """An upscaler whose threads share passes over the network. It uses no CUDA graphs."""

    def __init__(self, *arguments: Any, most: int = 8, computed: Callable[[int], None], **settings: Any) -> None:
        """Create the upscaler.

        Args:
            arguments: Positional arguments of `Upscaler`.
            most: Largest number of tiles in a batch.
            computed: Callback, called with the number of tiles after every batch.
            settings: Keyword arguments of `Upscaler`.
        """
        super().__init__(*arguments, cuda_graph=False, **settings)
        self.batcher = TileBatcher(most, lambda: self._default_tile(1) ** 2, computed)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Upscale a batch of images, as `Upscaler` does."""
        with self.batcher.image():
            return super().__call__(*arguments, **settings)

    def _computation(self) -> Computation:
        found = super()._computation()
        return replace(
            found,
            estimate=self.batcher.estimate(found.estimate),
            reconstruct=self.batcher.reconstruct(found.reconstruct),
        )
