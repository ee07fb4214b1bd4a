"""The worker processes of the service, and the queue of images for them.

If a worker dies, its images are upscaled again by another one, and a new worker replaces it. An image that was being
upscaled when a worker died is then upscaled alone, so that an image that ends every worker, for example because it
needs too much memory, fails after `MOST_ATTEMPTS` attempts and does not take other images with it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import multiprocessing
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from savl.service.worker import Cancel, Computed, Failure, Job, Options, Ready, Result, WorkerSettings, run_worker

MOST_ATTEMPTS = 3
"""Number of workers that may die while they upscale an image before its request fails."""
LONGEST_CANCEL = 60.0
"""Seconds after which a worker is killed if it has not stopped a job that was cancelled."""
RESTART_PAUSE = 5.0
"""Seconds until another worker is started after one has died while it loaded the network."""
_LONGEST_EXIT = 10.0

_log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many images wait or are being upscaled as the service accepts."""


class UpscalingError(RuntimeError):
    """There is no result for an image.

    Attributes:
        failure: The reason.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class PendingImage(Future[Result]):
    """A future for the result of an image; its exception is an `UpscalingError`.

    Attributes:
        number: Number of the image in the pool.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(eq=False)
class _Request:
    job: Job
    pending: PendingImage
    attempts: int = 0
    cancelled: bool = False
    timer: threading.Timer | None = None
    """Kills the worker if it does not stop the job that was cancelled."""


@dataclass(eq=False)
class _Worker:
    settings: WorkerSettings
    process: Any
    connection: Connection
    folder: tempfile.TemporaryDirectory[str]
    """Its temporary files, which a worker that is killed leaves behind."""
    first: bool
    """`WorkerPool.start` waits for it; it replaces none."""
    ready: threading.Event = field(default_factory=threading.Event)
    problem: str | None = None
    requests: dict[int, _Request] = field(default_factory=dict)
    outbox: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)


class WorkerPool:
    """Worker processes that upscale images. All methods may be called from any thread."""

    def __init__(
        self,
        workers: Sequence[WorkerSettings],
        *,
        most_waiting: int = 64,
        on_computed: Callable[[int], None] = lambda tiles: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        """Describe the pool; `start` starts it.

        Args:
            workers: Settings of each worker, at least one.
            most_waiting: Largest number of images that wait or are being upscaled, at least 1.
            on_computed: Callback, called with the number of tiles after every pass over the network.
            on_restart: Callback, called whenever a worker that died is replaced.
        """
        self.scale = 0
        """Scale of the network, after `start`."""
        self._settings = workers
        self._most_waiting = most_waiting
        self._on_computed = on_computed
        self._on_restart = on_restart
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._workers: list[_Worker] = []
        self._queue: deque[_Request] = deque()
        self._accepted = 0
        self._stopped = False

    def start(self) -> None:
        """Start the workers, and wait until each has loaded the network.

        Raises:
            RuntimeError: A worker could not load the network; the message says why.
        """
        # Runs before multiprocessing waits for its processes at the end of this one: workers ignore its SIGTERM.
        atexit.register(self.stop)
        with self._lock:
            for each in self._settings:
                self._workers.append(self._new_worker(each, first=True))
            workers = list(self._workers)
        for worker in workers:
            worker.ready.wait()
            if worker.problem is not None:
                self.stop()
                raise RuntimeError(worker.problem)

    @property
    def ready_workers(self) -> int:
        """Number of workers that have loaded the network and live."""
        return sum(worker.ready.is_set() for worker in tuple(self._workers))

    @property
    def accepted(self) -> int:
        """Number of images that wait or are being upscaled."""
        return self._accepted

    @property
    def process_ids(self) -> list[int]:
        """Process identifiers of the workers."""
        return [worker.process.pid for worker in tuple(self._workers)]

    def submit(self, image: bytes, options: Options) -> PendingImage:
        """Queue an image.

        Args:
            image: Content of an image file.
            options: How it is upscaled.

        Returns:
            A future for the result. To give up the result, pass the future to `cancel`.

        Raises:
            QueueFullError: As many images wait or are being upscaled as the pool accepts.
            RuntimeError: The pool is stopped.
        """
        with self._lock:
            if self._stopped:
                raise RuntimeError("the service is being stopped")
            if self._accepted >= self._most_waiting:
                raise QueueFullError(f"{self._accepted} images wait or are being upscaled; try again later")
            number = next(self._numbers)
            request = _Request(Job(number, image, options), PendingImage(number))
            self._accepted += 1
            self._queue.append(request)
            self._dispatch()
        return request.pending

    def cancel(self, pending: PendingImage) -> None:
        """Remove an image from the queue, or stop its upscaling after the current tile."""
        number = pending.number
        with self._lock:
            for request in self._queue:
                if request.job.number == number:
                    self._queue.remove(request)
                    self._finish(request, _cancelled(number))
                    return
            for worker in self._workers:
                found = worker.requests.get(number)
                if found is not None and not found.cancelled:
                    found.cancelled = True
                    worker.outbox.put(Cancel(number))
                    found.timer = _later(LONGEST_CANCEL, self._kill_if_hung, worker, number)

    def stop(self) -> None:
        """Cancel what has not finished, and end the workers."""
        with self._lock:
            self._stopped = True
            workers, self._workers = self._workers, []
            waiting = [*self._queue, *(request for worker in workers for request in worker.requests.values())]
            self._queue.clear()
            for request in waiting:
                self._finish(request, Failure(request.job.number, "cancelled", "the service is being stopped"))
            for worker in workers:
                worker.requests.clear()
        for worker in workers:
            worker.outbox.put(None)
            if not worker.ready.is_set():  # it is loading the network, and would read the message only afterwards
                worker.process.kill()
        deadline = time.monotonic() + _LONGEST_EXIT
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.folder.cleanup()
        atexit.unregister(self.stop)

    def _new_worker(self, settings: WorkerSettings, *, first: bool) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a copy of a process with threads may not run torch
        ours, theirs = context.Pipe()
        folder = tempfile.TemporaryDirectory(prefix="savl-", ignore_cleanup_errors=True)
        arguments = (theirs, settings, folder.name)
        process = context.Process(target=run_worker, args=arguments, name="savl-worker", daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(settings, process, ours, folder, first)
        for work in (self._listen, self._speak):
            threading.Thread(target=work, args=(worker,), daemon=True).start()
        return worker

    def _speak(self, worker: _Worker) -> None:
        """Send messages to a worker. A thread of its own does it, because a worker that hangs blocks the sender."""
        with contextlib.suppress(OSError):  # the worker has died, which `_listen` notices
            while True:
                message = worker.outbox.get()
                worker.connection.send(message)
                if message is None:
                    return

    def _listen(self, worker: _Worker) -> None:
        """Receive messages of a worker until it dies."""
        while True:
            try:
                message = worker.connection.recv()
            except Exception:  # EOFError or OSError: it has died; MemoryError: `_replace` ends it
                break
            if isinstance(message, Computed):
                self._on_computed(message.tiles)
                continue
            with self._lock:
                if isinstance(message, Ready):
                    self.scale = message.scale
                    worker.ready.set()
                elif message.number < 0:
                    worker.problem = message.message
                else:
                    request = worker.requests.pop(message.number, None)
                    if request is not None:
                        self._finish(request, message)
                self._dispatch()
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Queue the images of a worker that died again, and start another one."""
        worker.process.join(_LONGEST_EXIT)
        if worker.process.is_alive():  # its connection is closed, but it hangs while it exits
            worker.process.kill()
            worker.process.join()
        worker.outbox.put(None)
        worker.folder.cleanup()
        with self._lock:
            if self._stopped or worker not in self._workers:
                return
            reason = worker.problem or f"exit code {worker.process.exitcode}"
            if not worker.ready.is_set():
                if not worker.first:
                    _log.warning("a worker could not load the network (%s); another attempt follows", reason)
                    _later(RESTART_PAUSE, self._start_instead_of, worker)
                else:
                    worker.problem = worker.problem or f"a worker ended with exit code {worker.process.exitcode}"
                    worker.ready.set()
                return
            _log.warning("a worker died (%s); a new one replaces it", reason)
            worker.ready.clear()
            for request in worker.requests.values():
                request.attempts += 1
                if request.cancelled:
                    self._finish(request, _cancelled(request.job.number))
                elif request.attempts >= MOST_ATTEMPTS:
                    message = f"{request.attempts} workers died while they upscaled this image"
                    self._finish(request, Failure(request.job.number, "internal", message))
                else:
                    self._queue.appendleft(request)
            worker.requests.clear()
            self._start_instead_of(worker)
            self._dispatch()
        self._on_restart()

    def _start_instead_of(self, worker: _Worker) -> None:
        with self._lock:
            if self._stopped:
                return
            try:
                new = self._new_worker(worker.settings, first=False)
            except OSError as error:  # too many processes or open files, or no memory
                _log.warning("a worker could not be started (%s); another attempt follows", error)
                _later(RESTART_PAUSE, self._start_instead_of, worker)
                return
            self._workers[self._workers.index(worker)] = new

    def _dispatch(self) -> None:
        """Send images from the queue to workers with room for them, the one with the fewest images first."""
        while self._queue:
            request = self._queue[0]
            free = [
                worker
                for worker in self._workers
                if worker.ready.is_set()
                and len(worker.requests) < (1 if request.attempts else worker.settings.images)  # alone after a death
                and not any(other.attempts for other in worker.requests.values())
            ]
            if not free:
                return
            self._queue.popleft()
            worker = min(free, key=lambda each: len(each.requests))
            worker.requests[request.job.number] = request
            worker.outbox.put(request.job)

    def _finish(self, request: _Request, message: Result | Failure) -> None:
        self._accepted -= 1
        if request.timer is not None:
            request.timer.cancel()
        with contextlib.suppress(InvalidStateError):
            if isinstance(message, Result):
                request.pending.set_result(message)
            else:
                request.pending.set_exception(UpscalingError(message))

    def _kill_if_hung(self, worker: _Worker, number: int) -> None:
        with self._lock:
            if number in worker.requests:
                worker.process.kill()


def _cancelled(number: int) -> Failure:
    return Failure(number, "cancelled", "the request was cancelled")


def _later(seconds: float, function: Callable[..., None], *arguments: Any) -> threading.Timer:
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()
    return timer
