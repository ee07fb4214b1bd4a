"""The processes that train together, one or several under ``torchrun``, and how they agree."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingUnavailable(RuntimeError):
    """A package that training needs is not installed; the message says how to get it."""


def join_processes(cpu: bool) -> Accelerator:
    """Join the processes of this run, of which there is one where no launcher says otherwise.

    Args:
        cpu: Train on the CPU even where there is a GPU.

    Raises:
        TrainingUnavailable: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise TrainingUnavailable(
            f"training needs accelerate, which cannot be imported ({error}); pip install 'savl[train]' brings it"
        ) from error
    # Precision is this package's own business: accelerate would keep the first choice for the whole process. And
    # processes wait for the first one while it validates.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])


def mean_losses(accelerator: Accelerator, losses: dict[str, float]) -> dict[str, float]:
    """The mean of every loss over all processes, by its name; all have the same names in the same order."""
    if accelerator.num_processes == 1:
        return losses
    means = accelerator.reduce(torch.tensor(list(losses.values()), device=accelerator.device), "mean")
    assert isinstance(means, Tensor)
    return dict(zip(losses, means.tolist(), strict=True))


def mean_number(accelerator: Accelerator, number: float) -> float:
    """The mean over all processes, exactly the same for each of them."""
    if accelerator.num_processes == 1:
        return number
    mean = accelerator.reduce(torch.tensor(number, dtype=torch.float64, device=accelerator.device), "mean")
    assert isinstance(mean, Tensor)
    return float(mean)


def any_process(accelerator: Accelerator, true: bool) -> bool:
    """Whether something is true in any process, the same answer for all of them."""
    if accelerator.num_processes == 1:
        return true
    count = accelerator.reduce(torch.tensor(float(true), device=accelerator.device), "sum")
    assert isinstance(count, Tensor)
    return bool(count > 0)


def of_every_process(accelerator: Accelerator, number: int) -> list[int]:
    """The number that each process has, by rank."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    assert isinstance(numbers, Tensor)
    return [int(each) for each in numbers]
