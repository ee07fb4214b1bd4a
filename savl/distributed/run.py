"""Process tasks on a cluster, and report what happens."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from savl.distributed.cluster import worker_arguments
from savl.distributed.coordinator import Update
from savl.distributed.share import Share
from savl.distributed.worker import Settings, Task, TaskWorker

_POLL = 0.2  # seconds between two updates
_STOP_SECONDS = 60.0
"""How long workers may take to stop. They stop after the current tile, or after the file that they are writing."""

_GROUPS_PER_WORKER = 32
_MOST_FILES = 32
_MOST_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Workers:
    """The workers of a run.

    Attributes:
        ray: The module ``ray``, connected to the cluster.
        share: How many there are, and what each one has of the cluster.
        settings: How they upscale.
        coordinator: Handle of the actor with the `Coordinator`.
    """

    ray: Any
    share: Share
    settings: Settings
    coordinator: Any

    def run(self, tasks: Sequence[Task], sizes: Mapping[int | str, int]) -> Generator[Update, None, None]:
        """Process tasks; yield what happens until all are finished.

        If the iterator is closed before, or an exception such as `KeyboardInterrupt` is raised in it, the workers stop
        first, and remove partial files.

        Args:
            tasks: The tasks.
            sizes: Size in bytes of the file of each task, by its key.

        Raises:
            RuntimeError: Workers cannot start, for example because they cannot load the model.
        """
        consumer = _Consumer()
        threading.Thread(target=self._consume, args=(tasks, sizes, consumer), name="savl-ray", daemon=True).start()
        try:
            while not consumer.ended.is_set():
                yield self._take()
                consumer.ended.wait(_POLL)
            yield self._take()
        finally:
            if not consumer.ended.is_set():
                consumer.stopping.set()
                self.ray.get(self.coordinator.stop.remote())
                consumer.ended.wait(_STOP_SECONDS)
        if consumer.failure is not None:
            raise RuntimeError(_innermost(consumer.failure)) from consumer.failure

    def _take(self) -> Update:
        update: Update = self.ray.get(self.coordinator.take.remote())
        return update

    def _consume(self, tasks: Sequence[Task], sizes: Mapping[int | str, int], consumer: _Consumer) -> None:
        """Run the tasks to their end; the outcomes come by way of the coordinator."""
        try:
            rows = [{"tasks": pickle.dumps(group)} for group in _groups(tasks, sizes, self.share.workers)]
            dataset = self.ray.data.from_items(rows, override_num_blocks=len(rows))
            done = dataset.map_batches(
                TaskWorker,
                fn_constructor_args=(self.settings, self.coordinator),
                **worker_arguments(self.ray, self.share),
            )
            # Not iter_batches, whose threads would outlive this one. Closed here and not by a later garbage collection.
            results = done.iter_internal_ref_bundles()
            for _ in results:
                if consumer.stopping.is_set() and not self._take().active:
                    break
            del results
        except BaseException as error:
            consumer.failure = error
        finally:
            consumer.ended.set()


class _Consumer:
    """State of the thread that consumes the results of the tasks.

    Its end is an event, because `threading.Thread.is_alive` is wrong after a `join` that Ctrl-C has interrupted: until
    Python 3.13, the thread then counts as ended.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.ended = threading.Event()
        self.failure: BaseException | None = None


def _groups(tasks: Sequence[Task], sizes: Mapping[int | str, int], workers: int) -> Iterator[list[Task]]:
    """Yield the tasks in groups, each of which one worker gets at once.

    Small files in groups take less of Ray's time. Groups are small enough that all workers end at about the same time.
    """
    most = max(1, min(_MOST_FILES, len(tasks) // (workers * _GROUPS_PER_WORKER)))
    group: list[Task] = []
    size = 0
    for task in tasks:
        if group and (len(group) == most or size + sizes.get(task.key, 0) > _MOST_BYTES):
            yield group
            group, size = [], 0
        group.append(task)
        size += sizes.get(task.key, 0)
    if group:
        yield group


def _innermost(error: BaseException) -> str:
    """Return the first cause of an error of Ray in one line."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None and cause is not error:
        error = cause
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
