"""Compare severity maps with known masks: images are degraded unevenly, and the map should follow the mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig
from savl.evaluation import intervals
from savl.images.folder import read_rgb
from savl.network import SAVL


@dataclass(frozen=True)
class SeverityAgreement:
    """Agreement of the severity map of one image with its mask: Spearman's rank correlation over all pixels."""

    name: str
    correlation: float
    """Correlation of the severity map with the mask; positive if the map is high where the image is degraded more."""
    smoothed: float
    """The same for the map averaged over 9×9 pixels, a scale at which the mask varies."""
    noise: str
    """Kind and amount of the noise of both stages of the recipe."""


def severity_agreement(
    model: SAVL,
    images: Iterable[Path],
    config: DegradationConfig | None = None,
    *,
    seed: int = 0,
) -> Iterator[SeverityAgreement]:
    """Degrade images through random masks and compare severity maps with the masks.

    Args:
        model: A network with a variational field, on any device.
        images: High-resolution images; their sides are cut to multiples of the scale.
        config: Degradation; the published pipeline if omitted. A mask is always applied.
        seed: Base seed; the draws of an image depend on it and on the image's position in the list.

    Yields:
        One entry per image.

    Raises:
        ValueError: The network has no severity.
        ImageFileError: An image cannot be read.
        DegradationUnavailable: kornia is not installed.
        AnalysisUnavailable: scipy is not installed.
    """
    if model.config.degradation_code != "variational":
        raise ValueError(
            f"model must have a variational degradation code to have a severity, got {model.config.degradation_code!r}"
        )
    config = config or DegradationConfig()
    uneven = replace(config, spatial=replace(config.spatial, probability=1.0))
    scale = model.config.scale
    degradation = Degradation(uneven, scale)
    device = model.rgb_mean.device
    for index, path in enumerate(images):
        x = read_rgb(path)[None]
        height, width = (side - side % scale for side in x.shape[2:])
        degraded = degradation(x[..., :height, :width], (seed, index))
        with torch.inference_mode():
            field = model.estimate(degraded.y.to(device))
        assert field is not None
        assert field.severity is not None
        found, truth = field.severity.float().cpu()[0], degraded.degradation_mask[0]
        stages = (degraded.recipe.first, degraded.recipe.second)
        noise = [stage.noise[0] for stage in stages if stage is not None]
        kinds = [f"{each.kind} {each.amount:.2g}" for each in noise if each is not None]
        yield SeverityAgreement(
            path.stem, rank_correlation(found, truth), rank_correlation(_smooth(found), truth), ", ".join(kinds)
        )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's coefficient of two tensors of the same size, in [-1, 1]; 0 if one of them is constant."""
    return intervals.rank_correlation(a.flatten().numpy(), b.flatten().numpy()) or 0.0


def _smooth(a: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(a[None, None], 9, stride=1, padding=4, count_include_pad=False)[0, 0]
