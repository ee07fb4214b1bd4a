"""Scores of the averaged weights while they are trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from savl.bicubic import bicubic_upscale
from savl.degradation import Degradation
from savl.evaluation import Fidelity, fidelity, match_pairs
from savl.evaluation.fidelity import smallest_side
from savl.evaluation.pairs import read_pair
from savl.images.folder import find_images, read_rgb
from savl.network import SAVL
from savl.training.config import ValidationConfig


class Validation:
    """A few image pairs, decoded once, whole or cut around their centre."""

    def __init__(self, settings: ValidationConfig, degradation: Degradation, seed: int) -> None:
        """Read the images, and degrade them where there is no folder of LR images.

        Args:
            settings: Which, and how many.
            degradation: Makes LR images, the same ones in every run with this seed.
            seed: Base of its draws.

        Raises:
            ValueError: A folder is missing or empty, its names do not match, or an image is too small or of the wrong
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
                images = [read_pair(pair, scale) for pair in pairs]
            except ValueError as error:
                raise ValueError(f"validation: {error}") from error
            for pair, (lr, hr) in zip(pairs, images, strict=True):
                self._check(pair.hr, hr)
                self.pairs.append((_centre(lr, side // scale, 1), _centre(hr, side, scale)))
        else:
            for index, path in enumerate(find_images([settings.hr], argument="validation.hr")[: settings.images]):
                hr = _centre(read_rgb(path), side, scale)
                self._check(path, hr)
                self.pairs.append((degradation(hr[None], (seed, index)).y[0], hr))
        self.bicubic = Fidelity.mean(
            [fidelity(bicubic_upscale(lr[None], scale)[0], hr, crop=scale) for lr, hr in self.pairs]
        )

    def _check(self, path: Path, hr: Tensor) -> None:
        smallest = smallest_side(self.scale)
        if min(hr.shape[1:]) < smallest:
            raise ValueError(f"validation: {path} must have at least {smallest} pixels on both sides to be scored")

    @torch.inference_mode()
    def __call__(self, model: SAVL) -> dict[str, float]:
        """Mean scores of a network, and how many dB of luma it is above bicubic interpolation."""
        device = model.rgb_mean.device
        was_training = model.training
        model.eval()
        scores = [fidelity(model(lr[None].to(device))[0].float().cpu(), hr, crop=self.scale) for lr, hr in self.pairs]
        model.train(was_training)
        mean = Fidelity.mean(scores)
        measured = {name: value for name, value in asdict(mean).items() if value is not None}
        return {**measured, "gain_y": mean.psnr_y - self.bicubic.psnr_y}


def _centre(image: Tensor, side: int, multiple: int) -> Tensor:
    """At most ``side`` pixels each way, a multiple of ``multiple``, beginning at one too."""
    for axis in (1, 2):
        length = min(image.shape[axis] - image.shape[axis] % multiple, side)
        start = (image.shape[axis] - length) // 2
        image = image.narrow(axis, start - start % multiple, length)
    return image
