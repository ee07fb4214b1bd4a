"""Processes that train together under ``torchrun``, or a single one, and reductions over them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingUnavailable(RuntimeError):
    """A package that training needs is not installed; the message says how to install it."""


def join_processes(cpu: bool) -> Accelerator:
    """Join the processes of this run; without a launcher there is a single one.

    Args:
        cpu: Train on the CPU even if there is a GPU.

    Raises:
        TrainingUnavailable: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise TrainingUnavailable(
            f"training needs accelerate, which cannot be imported ({error}); pip install 'savl[train]' brings it"
        ) from error
    # The trainer sets autocast itself, because accelerate keeps the first choice for the whole process. The timeout is
    # long because all processes wait while the first one validates.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[timeout])


def mean_losses(accelerator: Accelerator, losses: dict[str, float]) -> dict[str, float]:
    """Return the mean of each loss over all processes, which must have the same losses in the same order."""
    if accelerator.num_processes == 1:
        return losses
    means = accelerator.reduce(torch.tensor(list(losses.values()), device=accelerator.device), "mean")
    assert isinstance(means, Tensor)
    return dict(zip(losses, means.tolist(), strict=True))


def mean_number(accelerator: Accelerator, number: float) -> float:
    """Return the mean of a number over all processes, exactly the same one in each of them."""
    if accelerator.num_processes == 1:
        return number
    mean = accelerator.reduce(torch.tensor(number, dtype=torch.float64, device=accelerator.device), "mean")
    assert isinstance(mean, Tensor)
    return float(mean)


def any_process(accelerator: Accelerator, true: bool) -> bool:
    """Return whether a condition is true in any process; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return true
    count = accelerator.reduce(torch.tensor(float(true), device=accelerator.device), "sum")
    assert isinstance(count, Tensor)
    return bool(count > 0)


def of_every_process(accelerator: Accelerator, number: int) -> list[int]:
    """Return the number of each process, ordered by rank."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    assert isinstance(numbers, Tensor)
    return [int(each) for each in numbers]
