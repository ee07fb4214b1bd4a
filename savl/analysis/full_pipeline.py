"""Severity maps and restored images: photographs as they are, and degraded by the whole published pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from savl.analysis.features import measure_fields, severity_map
from savl.analysis.photographs import OnProgress, distinct_names, evenly_spaced, read_centre
from savl.bicubic import bicubic_upscale
from savl.degradation import Degradation, DegradationConfig
from savl.evaluation.fidelity import Fidelity, fidelity
from savl.evaluation.severity import rank_correlation
from savl.images.folder import read_rgb
from savl.inference.upscaler import Upscaler
from savl.network import SAVL

SHOWN_SIDE = 512
"""Largest side in pixels of a photograph and its maps in the report; larger ones are reduced."""
MASKED_SIDE = 1024
"""Side in pixels that photographs are cropped to before they are degraded through a mask."""
RESTORED_SIDE = 512
"""Side in pixels that photographs are cropped to before they are degraded and upscaled."""


@dataclass(frozen=True, eq=False)
class SeverityPicture:
    """A photograph and its severity map."""

    name: str
    photo: NDArray[np.uint8]
    """``(h, w, 3)``."""
    severity: NDArray[np.float32]
    """``(h, w)`` in [0, 2]."""
    mask: NDArray[np.float32] | None = None
    """``(h, w)`` in [0, 1]: degradation mask, if it is known."""
    correlation: float | None = None
    """Spearman's coefficient of the map and the mask over all pixels."""


@dataclass(frozen=True)
class MaskAgreement:
    """Spearman's coefficients of severity maps and degradation masks, over the pixels of each image."""

    mean: float
    median: float
    images: dict[str, float]


@dataclass(frozen=True)
class Restoration:
    """Mean scores of upscaled photographs."""

    images: int
    model: Fidelity
    bicubic: Fidelity


def photograph_severity(model: SAVL, path: Path) -> SeverityPicture:
    """Compute the severity map of a photograph as it is, whatever its size.

    Args:
        model: A network with a variational field, on any device.
        path: The image.

    Raises:
        ImageFileError: The image cannot be read.
    """
    y = read_rgb(path)[None]
    return SeverityPicture(path.stem, _samples(y), _plane(_severity(model, y)))


def photograph_severities(
    model: SAVL, paths: Sequence[Path], count: int, on_progress: OnProgress
) -> tuple[SeverityPicture, ...]:
    """Compute severity maps of at most ``count`` of the photographs; none for a deterministic code."""
    if model.config.degradation_code != "variational" or not paths:
        return ()
    chosen, pictures = evenly_spaced(paths, count), []
    on_progress("severity maps of photographs", 0, len(chosen))
    for place, (path, name) in enumerate(zip(chosen, distinct_names(chosen), strict=True)):
        pictures.append(replace(photograph_severity(model, path), name=name))
        on_progress("severity maps of photographs", place + 1, len(chosen))
    return tuple(pictures)


def masked_severity(models: Sequence[SAVL], path: Path, seed: tuple[int, int]) -> list[SeverityPicture]:
    """Degrade one image through a mask by the published pipeline and compute its severity maps.

    Args:
        models: Networks with a variational field, all of one scale, on any device.
        path: A high-resolution image; if a side exceeds `MASKED_SIDE`, its centre is used.
        seed: Seed as in `savl.evaluation.severity.severity_agreement`, and the position of the image in its list. Draws
            and correlation are then the same for images that are not cropped.

    Returns:
        One picture per network, with mask and correlation.

    Raises:
        ImageFileError: The image cannot be read.
        DegradationUnavailable: kornia is not installed.
    """
    config = DegradationConfig()
    uneven = replace(config, spatial=replace(config.spatial, probability=1.0))
    scale = models[0].config.scale
    degraded = Degradation(uneven, scale)(read_centre(path, MASKED_SIDE, scale)[None], seed)
    pictures = []
    for model in models:
        severity = _severity(model, degraded.y)
        correlation = rank_correlation(severity[0], degraded.degradation_mask[0])
        mask = _plane(degraded.degradation_mask)
        pictures.append(SeverityPicture(path.stem, _samples(degraded.y), _plane(severity), mask, correlation))
    return pictures


def mask_agreements(
    models: Sequence[SAVL], paths: Sequence[Path], *, pictures: int, seed: int, on_progress: OnProgress
) -> tuple[list[MaskAgreement | None], tuple[SeverityPicture, ...]]:
    """Compare the severity maps of all networks with the masks of the same degraded photographs.

    Args:
        models: Networks of one scale.
        paths: High-resolution images.
        pictures: Largest number of pictures of the first network that are returned.
        seed: Seed of masks and degradations.
        on_progress: Called after every photograph.

    Returns:
        One agreement per network (None for a deterministic code), and pictures of the first network.

    Raises:
        ImageFileError: An image cannot be read.
        DegradationUnavailable: kornia is not installed.
    """
    variational = [model for model in models if model.config.degradation_code == "variational"]
    if not variational:
        return [None] * len(models), ()
    names = distinct_names(paths)
    correlations: list[dict[str, float]] = [{} for _ in variational]
    shown: list[SeverityPicture] = []
    on_progress("severity maps and masks", 0, len(paths))
    for place, path in enumerate(paths):
        found = masked_severity(variational, path, (seed, place))
        for picture, by_name in zip(found, correlations, strict=True):
            assert picture.correlation is not None
            by_name[names[place]] = picture.correlation
        if variational[0] is models[0] and place < pictures:
            shown.append(replace(found[0], name=names[place]))
        on_progress("severity maps and masks", place + 1, len(paths))
    agreements = iter(
        MaskAgreement(statistics.fmean(each.values()), statistics.median(each.values()), each) for each in correlations
    )
    return [next(agreements) if model in variational else None for model in models], tuple(shown)


def restore(
    models: Sequence[SAVL], paths: Sequence[Path], *, seed: int, on_progress: OnProgress
) -> list[Restoration]:  # fmt: skip
    """Degrade photographs identically for all networks, upscale them, and compare the results with the originals.

    Args:
        models: Networks of one scale, on any device.
        paths: High-resolution images, at least one.
        seed: Seed of the degradation; the draws of an image also depend on its position in the list.
        on_progress: Called after every photograph.

    Returns:
        One entry per network.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: An image is too small to be scored.
        DegradationUnavailable: kornia is not installed.
    """
    scale = models[0].config.scale
    degradation = Degradation(DegradationConfig(), scale)
    upscalers = [Upscaler(model, device=model.rgb_mean.device) for model in models]
    scores: list[list[Fidelity]] = []
    on_progress("upscaling", 0, len(paths))
    for place, path in enumerate(paths):
        x = read_centre(path, RESTORED_SIDE, scale)
        y = degradation(x[None], (seed, place)).y
        candidates = [bicubic_upscale(y, scale)[0], *(upscaler(y).sr[0] for upscaler in upscalers)]
        scores.append([fidelity(candidate, x, crop=scale) for candidate in candidates])
        on_progress("upscaling", place + 1, len(paths))
    bicubic, *networks = (Fidelity.mean(column) for column in zip(*scores, strict=True))
    return [Restoration(len(paths), mean, bicubic) for mean in networks]


def _severity(model: SAVL, y: Tensor) -> Tensor:
    _, variance = measure_fields(model, y)
    assert variance is not None
    return severity_map(variance)


def _samples(y: Tensor) -> NDArray[np.uint8]:
    """Convert ``(1, 3, h, w)`` in [0, 1] to 8 bits, ``(h, w, 3)``."""
    samples: NDArray[np.uint8] = (_reduced(y)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return samples


def _plane(values: Tensor) -> NDArray[np.float32]:
    """Convert ``(1, h, w)`` to ``(h, w)``."""
    plane: NDArray[np.float32] = _reduced(values[:, None])[0, 0].numpy()
    return plane


def _reduced(image: Tensor) -> Tensor:
    """Average ``(1, C, h, w)`` over squares of whole pixels until no side exceeds `SHOWN_SIDE`."""
    factor = -(-max(image.shape[2:]) // SHOWN_SIDE)
    if factor == 1:
        return image
    padded = F.pad(image, (0, -image.shape[3] % factor, 0, -image.shape[2] % factor), mode="replicate")
    return F.avg_pool2d(padded, factor)
