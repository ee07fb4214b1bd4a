"""Photographs degraded by the published pipeline and upscaled: what knowing the degradation is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from savl.analysis.severity_pictures import read_middle
from savl.bicubic import bicubic_upscale
from savl.degradation import Degradation, DegradationConfig
from savl.evaluation.fidelity import Fidelity, fidelity
from savl.inference.upscaler import Upscaler
from savl.network import SAVL

LARGEST = 512
"""Sides in pixels that photographs are cut to, around their centre."""


@dataclass(frozen=True)
class Restoration:
    """Mean scores over photographs."""

    images: int
    model: Fidelity
    bicubic: Fidelity


def restore(
    models: Sequence[SAVL], paths: Sequence[Path], *, seed: int, on_image: Callable[[int], None]
) -> list[Restoration]:
    """Degrade photographs, the same for all networks, upscale them, and compare with what they were.

    Args:
        models: Networks of one scale, on any device.
        paths: High-resolution images, at least one.
        seed: Of the degradation; an image's draws follow from its place in the list, too.
        on_image: Told how many images are done.

    Returns:
        One a network.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: An image is too small to be scored.
        DegradationUnavailable: kornia is not installed.
    """
    scale = models[0].config.scale
    degradation = Degradation(DegradationConfig(), scale)
    upscalers = [Upscaler(model, device=model.rgb_mean.device) for model in models]
    scores: list[list[Fidelity]] = []
    for place, path in enumerate(paths):
        x = read_middle(path, LARGEST, scale)
        y = degradation(x[None], (seed, place)).y
        candidates = [bicubic_upscale(y, scale)[0], *(upscaler(y).sr[0] for upscaler in upscalers)]
        scores.append([fidelity(candidate, x, crop=scale) for candidate in candidates])
        on_image(place + 1)
    bicubic, *ours = (Fidelity.mean(column) for column in zip(*scores, strict=True))
    return [Restoration(len(paths), mean, bicubic) for mean in ours]
