"""How learning rate and prior weight change over a run."""

from __future__ import annotations

import math

from savl.training.config import ObjectiveConfig, OptimizerConfig


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate that is used for a step.

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


def prior_weight(settings: ObjectiveConfig, step: int) -> float:
    """The weight of the divergence from the prior at a step: beta · (1 + lambda), less before and in its warm-up."""
    since = step - settings.kl_start
    if since < 0:
        return 0.0
    warm = min(1.0, since / settings.kl_warmup) if settings.kl_warmup else 1.0
    return warm * settings.beta * (1.0 + settings.suppression)
