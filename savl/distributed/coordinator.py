"""What the workers of a run and the command that started them know of each other."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from savl.images.job import Outcome

MOST_ATTEMPTS = 3
"""How often a file is begun whose workers end without a result. It then fails, so that a file that no worker survives
does not occupy the cluster forever."""


_ALIVE_SECONDS = 10.0
"""A worker that has not reported for so long has ended."""

Command = Literal["work", "give up", "stop"]


@dataclass
class Active:
    """A file that a worker is processing.

    Attributes:
        key: Identifies the file.
        seen: When the worker reported last, by `time.monotonic`.
        done: Number of tiles done.
        total: Number of tiles; 0 before the first one is done.
    """

    key: int | str
    seen: float
    done: int = 0
    total: int = 0


@dataclass
class Update:
    """What happened since the last update.

    Attributes:
        finished: Key and outcome of each file that was finished; the outcome is None for a file that another process
            has locked.
        active: The files that are being processed, by worker.
    """

    finished: list[tuple[int | str, Outcome | None]] = field(default_factory=list)
    active: dict[str, Active] = field(default_factory=dict)


class Coordinator:
    """State of a run. One Ray actor has it; all methods are short.

    The workers report to it, and learn from it that they are to stop: a signal of the terminal does not reach them, and
    ending their processes would leave partial files.
    """

    def __init__(self, model: Any = None, *, keeps_outcomes: bool = True) -> None:
        """Begin a run.

        Args:
            model: What `get_model` returns.
            keeps_outcomes: Keep the outcomes for `take`.
        """
        self._model = model
        self._keeps_outcomes = keeps_outcomes
        self._attempts: Counter[int | str] = Counter()
        self._update = Update()
        self._stopping = False

    def get_model(self) -> Any:
        """Return the model for the workers: a reference to an object of Ray in a list, or None."""
        return self._model

    def begin(self, worker: str, key: int | str) -> Command:
        """Record that a worker begins a file; return whether it is to process it.

        A file whose worker ended without a result is begun again, by another worker or by its successor. "give up"
        means that the file has ended too many workers.
        """
        if self._stopping:
            return "stop"
        self._attempts[key] += 1
        self._update.active[worker] = Active(key, time.monotonic())
        return "work" if self._attempts[key] <= MOST_ATTEMPTS else "give up"

    def finish(self, worker: str, key: int | str, outcome: Outcome | None) -> None:
        """Record what became of a file."""
        del self._attempts[key]
        self._update.active.pop(worker, None)
        if self._keeps_outcomes:
            self._update.finished.append((key, outcome))

    def leave(self, worker: str) -> None:
        """Record that a worker has stopped, and left no partial file."""
        self._update.active.pop(worker, None)

    def tick(self, worker: str, done: int, total: int) -> bool:
        """Record how many tiles of a worker's file are finished; return whether the worker is to stop."""
        active = self._update.active.get(worker)
        if active is not None:
            active.done, active.total, active.seen = done, total, time.monotonic()
        return self._stopping

    def stop(self) -> None:
        """Have the workers stop."""
        self._stopping = True

    def take(self) -> Update:
        """Return what happened since the last call, without workers that have ended."""
        oldest = time.monotonic() - _ALIVE_SECONDS
        active = {worker: file for worker, file in self._update.active.items() if file.seen > oldest}
        update, self._update = Update(self._update.finished, active), Update(active=active)
        return update
