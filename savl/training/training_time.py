"""How long a run has trained, and how many steps it will come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic


class TrainingTime:
    """The time between steps, over all parts of a run that was stopped and resumed.

    The first step of every part is not counted: the pool is filled before it and kernels are compiled in it.
    """

    def __init__(self, minutes: float, agree: Callable[[float], float] = float) -> None:
        """Begin a run.

        Args:
            minutes: After how many of them it ends; 0 for never.
            agree: Makes one number of seconds of those that several processes measured; asked after every step but the
                first where there is a limit.
        """
        self.limit = minutes * 60.0 if minutes > 0 else math.inf
        """In seconds."""
        self.seconds = 0.0
        """Counted so far."""
        self.steps = 0
        """Those that took them."""
        self.now: Callable[[], float] = monotonic
        self._agree = agree
        self._last: float | None = None

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        return self.seconds >= self.limit

    def begin(self) -> None:
        """Begin to train, or to go on: the next step is not counted."""
        self._last = None

    def step_done(self) -> None:
        """Count the time since the step before."""
        now = self.now()
        if self._last is not None:
            passed = now - self._last
            self.seconds += passed if self.limit == math.inf else self._agree(passed)
            self.steps += 1
        self._last = now

    def expected_steps(self, done: int, at_most: int) -> int:
        """Length of the run in steps, if those to come take as long as those that were counted.

        Args:
            done: Steps done.
            at_most: Steps that end it in any case.

        Returns:
            From ``done`` to ``at_most``; the latter too while nothing is known.
        """
        if self.limit == math.inf or self.seconds <= 0.0:
            return at_most
        left = max(self.limit - self.seconds, 0.0) * self.steps / self.seconds
        return min(done + math.ceil(left), at_most)

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Undo `state_dict`."""
        self.seconds, self.steps = float(state["seconds"]), int(state["steps"])
