"""Learning rate schedule and time limit of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

from savl.training.objective_config import OptimizerConfig


def learning_rate_factor(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Args:
        settings: Settings of the warm-up and the schedule.
        step: Number of steps that were completed before this one.
        steps: Length of the run in steps.

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
    """Measure the training time of a run and compare it with the time limit.

    The time of a run that was stopped and resumed is the sum over all its parts. In each part, measuring begins at the
    end of the first step, because the pool of training pairs is filled before that step and kernels are compiled in it.
    """

    def __init__(self, minutes: float, mean_over_processes: Callable[[float], float] = float) -> None:
        """Set the time to zero.

        Args:
            minutes: Time limit in minutes; 0 for no limit.
            mean_over_processes: Function that returns the mean of a number over all processes. If there is a time
                limit, it is called after every step except the first.
        """
        self.limit = minutes * 60.0 if minutes > 0 else math.inf
        """Time limit in seconds; infinity if there is none."""
        self.seconds = 0.0
        """Training time so far, in seconds."""
        self.steps = 0
        """Number of steps in that time."""
        self.now: Callable[[], float] = monotonic
        """Clock that returns the time in seconds."""
        self._mean_over_processes = mean_over_processes
        self._last: float | None = None

    @property
    def limit_reached(self) -> bool:
        """Whether the training time has reached the limit."""
        return self.seconds >= self.limit

    def begin(self) -> None:
        """Begin or resume training. The time of the next step is not counted."""
        self._last = None

    def step_done(self) -> None:
        """Count the time since the previous step."""
        now = self.now()
        if self._last is not None:
            passed = now - self._last
            self.seconds += passed if self.limit == math.inf else self._mean_over_processes(passed)
            self.steps += 1
        self._last = now

    def expected_steps(self, done: int, max_steps: int) -> int:
        """Estimate the length of the run in steps from the mean time per step so far.

        Args:
            done: Number of completed steps.
            max_steps: Upper bound of the estimate.

        Returns:
            A number from ``done`` to ``max_steps``. It is ``max_steps`` if there is no time limit or no step was timed.
        """
        if self.limit == math.inf or self.seconds <= 0.0:
            return max_steps
        left = max(self.limit - self.seconds, 0.0) * self.steps / self.seconds
        return min(done + math.ceil(left), max_steps)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"seconds": self.seconds, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state that `state_dict` returned."""
        self.seconds, self.steps = float(state["seconds"]), int(state["steps"])
