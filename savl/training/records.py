"""What a run leaves to look at: a log of JSON lines, and TensorBoard's events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from savl.atomic_write import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"
EVENTS_NAME = "tensorboard"
SHOWN = 4
"""Images of a batch that TensorBoard shows."""


class Records:
    """Writes both; TensorBoard's part is left out where tensorboard is not installed."""

    def __init__(self, output: Path, step: int) -> None:
        """Open them.

        Args:
            output: The run's folder.
            step: Steps done. What was written about later ones, by a run killed after its last checkpoint, is taken
                back: it will be done, and written, again.
        """
        self.log = output / LOG_NAME
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomically(self.log, "".join(kept).encode())
        self._events = _writer(output / EVENTS_NAME, step)

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Write a line, and a point of each curve."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(prefix + name, value, step)

    def images(self, step: int, lr: Tensor, sr: Tensor | None, hr: Tensor, severity: Tensor | None) -> None:
        """Show the first images of a batch: LR enlarged without interpolation, HR, SR and severity where there are any.

        Args:
            step: Steps done.
            lr: ``(B, 3, h, w)`` in [0, 1].
            sr: ``(B, 3, H, W)``, clamped here; or None.
            hr: ``(B, 3, H, W)`` in [0, 1].
            severity: ``(B, h, w)`` in [0, 2], shown from black to white; or None.
        """
        if self._events is None:
            return
        size = hr.shape[2:]
        shown = {"LR": F.interpolate(lr[:SHOWN], size=size, mode="nearest"), "HR": hr[:SHOWN]}
        if sr is not None:
            shown["SR"] = sr[:SHOWN]
        if severity is not None:
            shown["severity"] = F.interpolate(severity[:SHOWN, None] / 2, size=size, mode="nearest")
        for name, images in shown.items():
            self._events.add_images(name, images.detach().float().clamp(0.0, 1.0).cpu(), step)

    def close(self) -> None:
        """Write out what is still in memory."""
        if self._events is not None:
            self._events.close()


def _writer(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _step_of(line: str) -> float:
    """The step a line tells of; infinity for half a line, and for what is not this run's."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
