"""Monitoring of a run: a log of JSON lines, TensorBoard events, and validation of the averaged weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.atomic_write import write_atomically
from savl.bicubic import bicubic_upscale
from savl.degradation import Degradation
from savl.evaluation import Fidelity, fidelity
from savl.evaluation.fidelity import smallest_side
from savl.images.folder import find_images, read_rgb
from savl.images.pairs import match_pairs, read_pair
from savl.network import SAVL
from savl.training.data_config import ValidationConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"
EVENTS_NAME = "tensorboard"
SHOWN = 4
"""Images of a batch that TensorBoard shows."""


class RunLog:
    """Writes log.jsonl, and TensorBoard events if tensorboard is installed."""

    def __init__(self, output: Path, step: int) -> None:
        """Open the files.

        Args:
            output: Folder of the run.
            step: Steps done. Entries of later steps, from a run that was killed after its last checkpoint, are removed,
                because these steps are repeated.
        """
        self.log = output / LOG_NAME
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomically(self.log, "".join(kept).encode())
        self._events = _writer(output / EVENTS_NAME, step)

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Write a line to the log and a point to each curve of TensorBoard, there with a prefix to the names."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(prefix + name, value, step)

    def images(self, step: int, lr: Tensor, sr: Tensor | None, hr: Tensor, severity: Tensor | None) -> None:
        """Write the first images of a batch to TensorBoard; LR images and severity are enlarged to the size of HR.

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
        """Flush and close the files."""
        if self._events is not None:
            self._events.close()


def _writer(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity for an incomplete line and for one that this log did not write."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


class Validation:
    """Scores networks on a few image pairs, which are decoded once."""

    def __init__(self, settings: ValidationConfig, degradation: Degradation, seed: int) -> None:
        """Read the images, and degrade them if there is no folder of LR images.

        Args:
            settings: Folders, number and size of the images.
            degradation: Makes the LR images, the same ones in every run with this seed.
            seed: Seed of the degradation.

        Raises:
            ValueError: A folder is missing or empty, names do not match, or an image is too small or of the wrong
                scale.
            ImageFileError: An image cannot be read.
        """
        scale = degradation.scale
        self.scale = scale
        self.pairs: list[tuple[Tensor, Tensor]] = []
        side = settings.side - settings.side % scale
        if settings.lr:
            try:
                pairs = match_pairs(settings.lr, settings.hr)[: settings.images]
                images = [
                    read_pair(pair, scale, reduce_lr=settings.reduce_lr, remedy="set validation.reduce_lr = true")
                    for pair in pairs
                ]
            except ValueError as error:
                raise ValueError(f"validation: {error}") from error
            for pair, (lr, hr) in zip(pairs, images, strict=True):
                self._check(pair.hr, hr)
                self.pairs.append((_center_crop(lr, side // scale, 1), _center_crop(hr, side, scale)))
        else:
            for index, path in enumerate(find_images([settings.hr], argument="validation.hr")[: settings.images]):
                hr = _center_crop(read_rgb(path), side, scale)
                self._check(path, hr)
                degraded = degradation(hr[None], (seed, index))
                self.pairs.append((degraded.y[0], degraded.x[0]))
        self.bicubic = Fidelity.mean(
            [fidelity(bicubic_upscale(lr[None], scale)[0], hr, crop=scale) for lr, hr in self.pairs]
        )

    def _check(self, path: Path, hr: Tensor) -> None:
        smallest = smallest_side(self.scale)
        if min(hr.shape[1:]) < smallest:
            raise ValueError(f"validation: {path} must have at least {smallest} pixels on both sides to be scored")

    @torch.inference_mode()
    def __call__(self, model: SAVL) -> dict[str, float]:
        """Return the mean scores of a network, and ``gain_y``, its PSNR of luma above that of bicubic interpolation."""
        device = model.rgb_mean.device
        was_training = model.training
        model.eval()
        scores = [fidelity(model(lr[None].to(device))[0].float().cpu(), hr, crop=self.scale) for lr, hr in self.pairs]
        model.train(was_training)
        mean = Fidelity.mean(scores)
        measured = {name: value for name, value in asdict(mean).items() if value is not None}
        return {**measured, "gain_y": mean.psnr_y - self.bicubic.psnr_y}


def _center_crop(image: Tensor, side: int, multiple: int) -> Tensor:
    """Crop an image to at most ``side`` pixels per side, with size and offset multiples of ``multiple``."""
    for axis in (1, 2):
        length = min(image.shape[axis] - image.shape[axis] % multiple, side)
        start = (image.shape[axis] - length) // 2
        image = image.narrow(axis, start - start % multiple, length)
    return image
