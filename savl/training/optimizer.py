"""The optimizer of a run."""

from __future__ import annotations

import torch

from savl.training.config import OptimizerConfig
from savl.training.muon import Muon, hidden_matrices
from savl.training.objectives import Objective


def build_optimizer(objective: Objective, settings: OptimizerConfig, fused: bool) -> torch.optim.Adam | Muon:
    """Make it, for all weights of an objective that are trained.

    Args:
        objective: With network, estimator and decoder.
        settings: Method and rates.
        fused: Whether a step must be one that can be told to change nothing, by ``found_inf``, which torch's Adam can
            only if it is fused.

    Returns:
        One that holds every trained weight once, its learning rate that of the settings.
    """
    trained = [weight for weight in objective.parameters() if weight.requires_grad]
    fused_or_not = True if fused else None
    if settings.method == "adam":
        return torch.optim.Adam(trained, lr=settings.learning_rate, betas=settings.betas, fused=fused_or_not)
    matrices = hidden_matrices(objective.model)
    ours = {id(each.weight) for each in matrices}
    return Muon(
        matrices,
        [weight for weight in trained if id(weight) not in ours],
        lr=settings.learning_rate,
        betas=settings.betas,
        momentum=settings.momentum,
        fused=fused_or_not,
    )
