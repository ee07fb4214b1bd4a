"""Is the severity map true? Images degraded unevenly, and how far the map agrees with where that was done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig
from savl.images.folder import read_rgb
from savl.network import SAVL


@dataclass(frozen=True)
class SeverityAgreement:
    """One image's severity map against the truth; rank correlations are Spearman's, over all pixels."""

    name: str
    correlation: float
    """Between the severity map and the true severity. Positive: the map is high where the image is degraded more."""
    smoothed: float
    """The same with the map averaged over 9×9 pixels, as far as the truth varies."""
    noise: str
    """What noise the recipe had, both stages."""


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
        images: High-resolution ones; cut to multiples of the scale.
        config: What becomes of them, the published pipeline if left out; always through a mask.
        seed: Base of every draw; an image's own follow from its place in the list.

    Yields:
        An entry an image.

    Raises:
        ValueError: The network has no severity.
        ImageFileError: An image cannot be read.
        DegradationUnavailable: kornia is not installed.
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
    """Return Spearman's coefficient of two tensors of the same size, in [-1, 1]; 0 where one of them is constant."""
    if bool((a == a.flatten()[0]).all()) or bool((b == b.flatten()[0]).all()):
        return 0.0
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, ``(n,)`` float64; equal values share the mean of their ranks."""
    _, places, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.double().cumsum(0)
    ranks: Tensor = last - (counts - 1) / 2
    return ranks[places]


def _smooth(a: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(a[None, None], 9, stride=1, padding=4, count_include_pad=False)[0, 0]
