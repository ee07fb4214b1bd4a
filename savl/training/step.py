"""Training steps whose losses may still be on the way from the GPU, and whether these are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from savl.training.data import Batch


@dataclass
class PendingStep:
    """A step whose forward and backward passes were enqueued and whose numbers have not been checked."""

    index: int
    """Number of steps before it."""
    seed: int
    """Seed of its random numbers."""
    lr_factor: float
    """Learning rate as a fraction of the peak."""
    batch: Batch
    losses: dict[str, Tensor]
    """Scalars on the device, without gradient, by name."""
    checked: dict[str, Tensor] = field(default_factory=dict)
    """Scalars on the device that must be finite, by their names in an error message."""
    _sent: _Transfer | None = None

    def send(self) -> None:
        """Start to copy losses and checked numbers to the CPU, without waiting."""
        self._sent = _Transfer(self.losses | self.checked)

    def read(self) -> tuple[dict[str, float], str | None]:
        """Wait for the numbers; they are sent now unless `send` was called.

        Returns:
            The losses, and the name of the first checked number that is not finite, or None if all are finite.
        """
        if self._sent is None:
            self.send()
        assert self._sent is not None
        numbers = self._sent.read()
        losses = {name: numbers[name] for name in self.losses}
        return losses, next((name for name in self.checked if not math.isfinite(numbers[name])), None)

    def found_inf(self) -> Tensor:
        """Return 1 if a checked number is not finite, else 0: ``()`` float32 on the device, without waiting for it.

        A fused optimizer of torch changes no weight if its ``found_inf`` is 1.
        """
        return 1.0 - torch.stack([value.isfinite() for value in self.checked.values()]).all().float()


class CompletedStep(NamedTuple):
    """A completed step whose loss and gradient norm are finite."""

    number: int
    """Number of the step, from 1."""
    lr_factor: float
    """Learning rate as a fraction of the peak."""
    losses: dict[str, float]


class _Transfer:
    """An asynchronous copy of scalars from a device to the CPU."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        """Enqueue the copy.

        Args:
            values: At least one scalar by name, all on one device; they arrive as float32.
        """
        self._names = list(values)
        self._arrived: torch.cuda.Event | None = None
        stacked = torch.stack([value.detach().float() for value in values.values()])
        # Asynchronous only from a CUDA GPU, where an event tells when the copy is complete.
        self._values = stacked.to("cpu", non_blocking=stacked.is_cuda)
        if stacked.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(stacked.device))

    def read(self) -> dict[str, float]:
        """Wait for the copy, but not for anything that was enqueued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))
