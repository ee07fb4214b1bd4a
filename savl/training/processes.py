"""Processes that train together under ``torchrun``, or a single one, and reductions over them."""

from __future__ import annotations

import atexit
from collections import deque
from datetime import timedelta
from time import monotonic, sleep
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

_last_sums: deque[ref[Tensor]] = deque(maxlen=64)
"""The tensors that were last summed over all processes; threads of the process group may still hold them."""


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
    means = _sum(torch.tensor(list(losses.values()), device=accelerator.device)) / accelerator.num_processes
    return dict(zip(losses, means.tolist(), strict=True))


def mean_number(accelerator: Accelerator, number: float) -> float:
    """Return the mean of a number over all processes, exactly the same one in each of them."""
    if accelerator.num_processes == 1:
        return number
    total = _sum(torch.tensor(number, dtype=torch.float64, device=accelerator.device))
    return float(total / accelerator.num_processes)


def any_process(accelerator: Accelerator, true: bool) -> bool:
    """Return whether a condition is true in any process; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return true
    return bool(_sum(torch.tensor(float(true), device=accelerator.device)) > 0)


def of_every_process(accelerator: Accelerator, number: int) -> list[int]:
    """Return the number of each process, ordered by rank."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    assert isinstance(numbers, Tensor)
    return [int(each) for each in numbers]


def _sum(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes; exiting waits until no thread holds it."""
    torch.distributed.all_reduce(tensor)
    _last_sums.append(ref(tensor))
    return tensor


@atexit.register
def _wait_until_tensors_are_freed() -> None:
    """Wait at exit, for at most 5 seconds, until the threads of the process group have freed the last tensors.

    A thread of gloo may free the tensor of a collective after the collective has completed, and needs Python's global
    lock (GIL) for it. If it requests the lock while the interpreter is finalized, the process is aborted.
    `torch.distributed.destroy_process_group` does not prevent that: it does not wait for the threads as long as
    anything else refers to the group, as some modules of torch do.
    """
    end = monotonic() + 5
    while any(tensor() is not None for tensor in _last_sums) and monotonic() < end:
        sleep(0.001)
