"""A worker: one model in a process of the cluster, which processes jobs one after another.

This module is imported by Ray before a worker has its settings, so that it must not import torch: how the threads of
OpenMP wait is decided when torch is loaded.
"""

from __future__ import annotations

import pickle
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savl.distributed.coordinator import MOST_ATTEMPTS

if TYPE_CHECKING:
    from savl.images.job import Job, JobProcessor, Outcome, Signature
    from savl.inference.enlarge import Strength

_TICK = 0.25  # seconds between two reports of the tiles done
_BUSY_WAIT = 0.2  # seconds between two attempts to get a file that another process has locked


class Stopped(KeyboardInterrupt):
    """The run was stopped. As after Ctrl-C, partial files are removed."""


@dataclass(frozen=True)
class Settings:
    """How a worker upscales; the same for all workers of a run.

    Attributes:
        model: Name of shipped weights, or of the file whose content the coordinator has; "" if it has a module.
        version: Version of savl that started the run.
        started: When the run began, in seconds since the epoch.
        output_url: Folder of the outputs, if it is a URL.
        strength, tile, tile_pad, device, dtype, threads, eager, map_endings, scale, quality, overwrite, page: As the
            options of `savl upscale`.
    """

    model: str
    version: str
    started: float
    output_url: str | None = None
    strength: Strength | None = None
    tile: int | None = None
    tile_pad: int = 32
    device: str = "cpu"
    dtype: str | None = None
    threads: int = 1
    eager: bool = False
    map_endings: tuple[str, ...] = ()
    scale: float | None = None
    quality: int = 95
    overwrite: bool = False
    page: int | None = None


@dataclass(frozen=True)
class Task:
    """A job for a worker, with absolute paths.

    Attributes:
        key: Identifies the job.
        job: The job.
        before: Signatures of its outputs when the run began.
    """

    key: int | str
    job: Job
    before: Mapping[Path, Signature | None]


class Worker:
    """Processes jobs with one model."""

    def __init__(self, settings: Settings, coordinator: Any) -> None:
        """Load the model.

        Args:
            settings: How to upscale.
            coordinator: Handle of the actor with the `Coordinator`.

        Raises:
            RuntimeError: This node has another version of savl.
        """
        from savl.version import version

        if version() != settings.version:
            raise RuntimeError(
                f"node {platform.node()} has savl {version()}, but the command is savl {settings.version}: install "
                "the same version on all nodes"
            )
        from savl.inference.process_settings import keep_freed_memory, limit_spinning, use_threads

        limit_spinning()
        use_threads(settings.threads)
        keep_freed_memory()
        from savl.distributed.storage import SendingWork, UrlPlace
        from savl.images.job import Work
        from savl.inference.upscale_file import EnlargeWork

        self._settings = settings
        self._name = uuid.uuid4().hex
        self._coordinator = coordinator
        work: Work = EnlargeWork(
            self._load(),
            map_endings=settings.map_endings,
            scale=settings.scale,
            quality=settings.quality,
            overwrite=settings.overwrite,
            page=settings.page,
        )
        self._place = None if settings.output_url is None else UrlPlace(settings.output_url)
        self._work = work if self._place is None else SendingWork(work, self._place, overwrite=settings.overwrite)
        self._tiles = (0, 0)
        self._stopping = threading.Event()
        threading.Thread(target=self._report_tiles, name="savl-report", daemon=True).start()

    def process(self, task: Task, *, waits: bool = False) -> Outcome | None:
        """Process a job, and tell the coordinator what became of it.

        Args:
            task: The job.
            waits: Wait for another process that is working on the job, instead of returning None.

        Raises:
            Stopped: The run was stopped.
        """
        from savl.images.job import Failed
        from savl.ops.scopes import fused_by_default

        self._raise_if_stopped()
        self._tiles = (0, 0)
        outcome: Outcome | None
        command = self._call("begin", task.key)
        if command == "stop":
            raise Stopped
        if command == "work":
            processor = self._processor(task)
            try:
                with fused_by_default(eager=self._settings.eager):
                    while True:
                        outcome = processor.process(task.job, on_begin=lambda: None, on_tile=self._on_tile)
                        if outcome is not None or not waits:
                            break
                        self._raise_if_stopped()
                        time.sleep(_BUSY_WAIT)
            except Stopped:
                self._call("leave")
                raise
        else:
            outcome = Failed(f"its worker ended {MOST_ATTEMPTS} times without a result, perhaps for lack of memory")
        outcome = self._with_urls(outcome)
        self._call("finish", task.key, outcome)
        return outcome

    def _processor(self, task: Task) -> JobProcessor:
        from savl.images.job import JobProcessor

        return JobProcessor(
            self._work,
            before=task.before,
            exact=frozenset(task.job.outputs if task.job.exact else ()),
            overwrite=self._settings.overwrite,
            page=self._settings.page,
            elapsed=lambda: time.time() - self._settings.started,
            place=self._place,
        )

    def _with_urls(self, outcome: Outcome | None) -> Outcome | None:
        from dataclasses import replace

        from savl.images.job import Done, Failed, Kept

        if self._place is None:
            return outcome
        if isinstance(outcome, Failed):
            return replace(outcome, reason=self._place.with_urls(outcome.reason))
        if isinstance(outcome, Kept):
            return replace(outcome, target=self._place.with_urls(outcome.target))
        if isinstance(outcome, Done):
            return replace(outcome, written=self._place.with_urls(outcome.written))
        return None

    def _load(self) -> Any:
        """Return the upscaler of the settings."""
        from savl.inference.upscale_image import as_upscaler

        settings = self._settings
        arguments: dict[str, Any] = {
            "strength": settings.strength,
            "tile": settings.tile,
            "tile_pad": settings.tile_pad,
            "device": settings.device,
            "dtype": settings.dtype,
        }
        model = self._call_without_name("get_model")
        if model is None:
            return as_upscaler(settings.model, **arguments)
        import ray

        value = ray.get(model[0])
        if not isinstance(value, bytes):
            return as_upscaler(value, **arguments)
        with tempfile.TemporaryDirectory(prefix="savl-") as folder:  # loaded by its content: nodes need not share files
            file = Path(folder, Path(settings.model).name)
            file.write_bytes(value)
            return as_upscaler(file, **arguments)

    def _on_tile(self, done: int, total: int) -> None:
        self._tiles = done, total
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _report_tiles(self) -> None:
        while True:
            time.sleep(_TICK)
            try:
                stop = self._call("tick", *self._tiles)
            except Exception:  # the coordinator has ended, and with it the run
                self._stopping.set()
                return
            if stop:  # Reports go on: the coordinator counts workers that are silent as dead, and this one cleans up.
                self._stopping.set()

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._call_without_name(method, self._name, *arguments)

    def _call_without_name(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._coordinator, method).remote(*arguments))


class TaskWorker(Worker):
    """Worker for the tasks of `savl upscale`: rows with a list of pickled tasks. The coordinator gets the outcomes."""

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[int]]]:
        """Process the tasks in the rows of a batch; yield a row for each."""
        for pickled in batch["tasks"]:
            for task in pickle.loads(pickled):
                try:
                    self.process(task)
                except Stopped:
                    yield {"done": [0]}
                    return
                yield {"done": [1]}
