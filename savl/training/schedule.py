"""Schedule of a run: the learning rate, and the training time that may end the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

from savl.training.config import OptimizerConfig


def learning_rate_factor(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Args:
        settings: Warm-up and schedule.
        step: Steps done before this one.
        steps: Length of the run.

    Returns:
        A factor in [0, 1].
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "multistep":
        return float(settings.gamma ** sum(step >= milestone for milestone in settings.milestones))
    done = (step - settings.warmup) / max(steps - settings.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return settings.final_fraction + (1 - settings.final_fraction) * cosine


class TrainingTime:
    """Time between steps, summed over all parts of a run that was stopped and resumed.

    The first step of each part is not counted, because the pool is filled before it and kernels are compiled in it.
    """

    def __init__(self, minutes: float, mean: Callable[[float], float] = float) -> None:
        """Start at zero.

        Args:
            minutes: Time limit in minutes; 0 for none.
            mean: Returns the mean of a number over all processes. With a time limit it is called after every step but
                the first.
        """
        self.limit = minutes * 60.0 if minutes > 0 else math.inf
        """Time limit in seconds."""
        self.seconds = 0.0
        """Time counted so far."""
        self.steps = 0
        """Number of steps in that time."""
        self.now: Callable[[], float] = monotonic
        self._mean = mean
        self._last: float | None = None

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        return self.seconds >= self.limit

    def begin(self) -> None:
        """Begin or resume training: the next step is not counted."""
        self._last = None

    def step_done(self) -> None:
        """Count the time since the previous step."""
        now = self.now()
        if self._last is not None:
            passed = now - self._last
            self.seconds += passed if self.limit == math.inf else self._mean(passed)
            self.steps += 1
        self._last = now

    def expected_steps(self, done: int, at_most: int) -> int:
        """Return the expected length of the run in steps, if the remaining ones take as long as those so far.

        Args:
            done: Steps done.
            at_most: Upper limit.

        Returns:
            A number from ``done`` to ``at_most``; ``at_most`` while no time is known.
        """
        if self.limit == math.inf or self.seconds <= 0.0:
            return at_most
        left = max(self.limit - self.seconds, 0.0) * self.steps / self.seconds
        return min(done + math.ceil(left), at_most)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"seconds": self.seconds, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state that `state_dict` returned."""
        self.seconds, self.steps = float(state["seconds"]), int(state["steps"])
