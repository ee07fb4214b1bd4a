"""The process that upscales images for the service. It holds one network, and upscales several images in threads.

It receives `Job` and `Cancel` from the pool and answers each job with a `Result` or a `Failure`. It exits after None,
and when its connection closes, which happens if the service dies.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

Kind = Literal["image", "option", "memory", "cancelled", "internal"]


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker computes, and with what."""

    model: str = "savl-tiny"
    """Name of shipped weights, or path of a file that `savl.load` accepts."""
    device: str = "auto"
    """Device, as for `savl.upscale`."""
    dtype: str = "auto"
    """Dtype in which the network computes: "float32", "bfloat16" or "auto", which is float32."""
    tile: int | None = None
    """Side of the tiles in LR pixels; None chooses it by the free memory."""
    tile_pad: int = 32
    """Context around each tile in LR pixels."""
    threads: int | None = None
    """Number of threads of torch; None for one per processor."""
    images: int = 4
    """Number of images that a worker upscales at the same time, and largest number of tiles in a batch."""


@dataclass(frozen=True)
class Options:
    """How one image is upscaled; the fields have the meaning that they have for `savl.upscale_file`."""

    format: str
    scale: float | None = None
    strength: float | Literal["auto"] = "auto"
    quality: int = 95
    page: int | None = None


@dataclass(frozen=True)
class Job:
    """An image for a worker."""

    number: int
    image: bytes
    """Content of the image file."""
    options: Options


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for the result of a job any more."""

    number: int


@dataclass(frozen=True)
class Ready:
    """The network is loaded."""

    scale: int
    device: str


@dataclass(frozen=True)
class Result:
    """The upscaled image of a job."""

    number: int
    image: bytes
    """Content of the image file."""
    size: tuple[int, int]
    """Width and height in pixels."""
    notes: tuple[str, ...]
    """What the output format could not keep, in full sentences."""


@dataclass(frozen=True)
class Failure:
    """Why there is no result; ``number`` is −1 if the network could not be loaded."""

    number: int
    kind: Kind
    """The cause: "image" (the file cannot be read), "option" (a value is not accepted), "memory" (memory ran out),
    "cancelled", or "internal" for everything else."""
    message: str


@dataclass(frozen=True)
class Computed:
    """A batch of tiles was computed."""

    tiles: int


class _CancelledError(Exception):
    """Raised between two tiles of a job that was cancelled."""


def run_worker(connection: Connection, settings: WorkerSettings, folder: str) -> None:
    """Load the network and upscale images until the connection closes. This is the main function of the process.

    Args:
        connection: To the pool.
        settings: What to compute.
        folder: Folder for temporary files, which the pool removes.
    """
    # The service stops its workers by a message, after they have finished what they began. Ctrl-C and service managers
    # send their signals to all processes of a group.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending, contextlib.suppress(OSError):  # the service has died; the loop below ends
            connection.send(message)

    try:
        worker = _Worker(settings, folder, lambda tiles: send(Computed(tiles)))
    except Exception as error:
        send(Failure(-1, "internal", str(error) or type(error).__name__))
        return
    send(Ready(worker.upscaler.scale, str(worker.upscaler.device)))
    with ThreadPoolExecutor(settings.images, "savl-image") as threads:
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                message = None  # the service has died
            if message is None:
                worker.cancel_all()
                return
            if isinstance(message, Cancel):
                worker.cancel(message.number)
            else:
                worker.pending.add(message.number)
                threads.submit(_answer, worker, message, send)


def _answer(worker: _Worker, job: Job, send: Callable[[object], None]) -> None:
    answer = worker.work(job)
    try:
        send(answer)
    except Exception as error:  # a large result is copied to be sent, for which the memory may not suffice
        del answer
        send(worker.failure(job, error))


class _Worker:
    """The network of a worker, and which of its jobs were cancelled."""

    def __init__(self, settings: WorkerSettings, folder: str, computed: Callable[[int], None]) -> None:
        from savl.inference.device import checked_device, checked_dtype
        from savl.inference.process_settings import keep_freed_memory, limit_spinning, use_threads
        from savl.service.batching import BatchingUpscaler
        from savl.weights import load

        keep_freed_memory()
        limit_spinning()
        use_threads(settings.threads)
        self._folder = folder
        self.pending: set[int] = set()
        self._cancelled: set[int] = set()
        self._closed = False
        self.upscaler = BatchingUpscaler(
            load(settings.model),
            tile=settings.tile,
            tile_pad=settings.tile_pad,
            device=checked_device(settings.device),
            dtype=None if settings.dtype == "auto" else checked_dtype(settings.dtype),
            most=settings.images,
            computed=computed,
        )

    def cancel(self, number: int) -> None:
        """Stop a job after its current tile, unless it is done."""
        if number in self.pending:
            self._cancelled.add(number)

    def cancel_all(self) -> None:
        """Stop every job after its current tile."""
        self._closed = True

    def work(self, job: Job) -> Result | Failure:
        """Upscale the image of a job."""
        from savl.inference.upscale_file import upscale_file

        def check(done: int = 0, count: int = 0) -> None:
            if self._closed or job.number in self._cancelled:
                raise _CancelledError

        options = job.options
        try:
            check()
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                target = Path(folder) / f"result.{options.format}"
                processed = upscale_file(
                    job.image,
                    target,
                    model=self.upscaler,
                    strength=options.strength,
                    format=options.format,
                    scale=options.scale,
                    quality=options.quality,
                    page=options.page,
                    on_tile=check,
                )
                return Result(job.number, target.read_bytes(), processed.new_size, processed.notes)
        except _CancelledError:
            return Failure(job.number, "cancelled", "the request was cancelled")
        except Exception as error:
            return self.failure(job, error)
        finally:
            self.pending.discard(job.number)
            self._cancelled.discard(job.number)

    def failure(self, job: Job, error: Exception) -> Failure:
        """Return the answer to a job that ended with an error."""
        from savl.images.errors import ImageFileError, UnwritableImage
        from savl.out_of_memory import is_out_of_memory, out_of_memory_in_short

        if is_out_of_memory(error):
            return Failure(job.number, "memory", out_of_memory_in_short(error))
        unreadable = isinstance(error, ImageFileError) and not isinstance(error, UnwritableImage)
        wrong = isinstance(error, ValueError | TypeError) and not isinstance(error, ImageFileError)
        kind: Kind = "image" if unreadable else "option" if wrong else "internal"
        return Failure(job.number, kind, str(error) or type(error).__name__)
