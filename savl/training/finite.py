"""What is known of a step: numbers that may still be on their way from a GPU, and whether all of them are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from savl.training.data import Batch


@dataclass
class Step:
    """A step whose passes forward and backward were enqueued."""

    done: int
    """Steps done before it."""
    seed: int
    """Of everything random in it."""
    rate: float
    """Share of the peak learning rate."""
    batch: Batch
    losses: dict[str, Tensor]
    """Scalars without gradient, on the device."""
    checked: dict[str, Tensor] = field(default_factory=dict)
    """Scalars on the device that must be finite, by what they are called in an error."""
    _sent: Numbers | None = None

    def send(self) -> None:
        """Send losses and checked numbers on their way to the CPU, without waiting for them."""
        self._sent = Numbers(self.losses | self.checked)

    def read(self) -> tuple[dict[str, float], str | None]:
        """Wait for what was sent; what was not is sent now.

        Returns:
            The losses, and what the first checked number that is not finite is called; None if all are.
        """
        if self._sent is None:
            self.send()
        assert self._sent is not None
        numbers = self._sent.read()
        losses = {name: numbers[name] for name in self.losses}
        return losses, next((what for what in self.checked if not math.isfinite(numbers[what])), None)

    def found_inf(self) -> Tensor:
        """1 where a checked number is not finite, else 0: ``()`` float32 on the device, which is not waited for.

        What a fused optimizer of torch changes no weight by if it is 1.
        """
        return 1.0 - torch.stack([value.isfinite() for value in self.checked.values()]).all().float()


class Looked(NamedTuple):
    """A step that was found to be finite."""

    done: int
    """Steps done, with this one."""
    rate: float
    """Share of the peak learning rate."""
    losses: dict[str, float]


class Numbers:
    """Scalars on their way from a device to the CPU."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        """Send them off, in one copy.

        Args:
            values: Scalars of one device, by name, at least one; they reach the CPU as float32.
        """
        self._names = list(values)
        self._arrived: torch.cuda.Event | None = None
        stacked = torch.stack([value.detach().float() for value in values.values()])
        # From a CUDA GPU into pinned memory; elsewhere nothing would tell when it is there.
        self._values = stacked.to("cpu", non_blocking=stacked.is_cuda)
        if stacked.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(stacked.device))

    def read(self) -> dict[str, float]:
        """Wait until they are there, for nothing that was enqueued after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))
