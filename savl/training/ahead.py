"""The next batch, made while a step is learned from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from savl.training.data import Batch


class Ahead:
    """Makes batches one ahead, in a thread, and on a GPU in a stream of its own.

    What the thread waits for there, a copy to the GPU or from it, is the work of that stream alone. In the training's
    stream it would be all passes enqueued so far, and the GPU would have nothing to do until the batch is made.
    """

    def __init__(self, source: Callable[[int], Batch], device: torch.device) -> None:
        """Make nothing yet.

        Args:
            source: Gives the batch of a step.
            device: Where batches are wanted.
        """
        self._source = source
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._upcoming: Future[tuple[Batch, torch.cuda.Event | None]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def begin(self, step: int) -> None:
        """Begin to make the batch of a step."""
        self._upcoming = self._thread.submit(self._make, step)

    def take(self) -> Batch:
        """The batch that was begun last, on the device, for the current stream.

        Raises:
            Exception: Whatever the source raised.
        """
        assert self._upcoming is not None
        batch, made = self._upcoming.result()
        if made is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(made)
            for tensor in (batch.y, batch.x, batch.z, batch.degradation_mask):
                if tensor is not None:
                    tensor.record_stream(here)  # its memory is of the other stream, which could use it again too early
        return batch

    def _make(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            batch = self._source(step).to(self._device)
        return batch, None if self._stream is None else self._stream.record_event()
