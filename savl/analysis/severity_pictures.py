"""Severity maps to look at: over photographs, and beside the truth where images were degraded unevenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from savl.analysis.features import measure_fields, severity_map
from savl.degradation import Degradation, DegradationConfig
from savl.evaluation.severity import rank_correlation
from savl.images.folder import read_rgb
from savl.network import SAVL

LONGEST = 512
"""Sides in pixels above which photograph and map are made smaller for the page."""
LARGEST = 1024
"""Sides in pixels that photographs are cut to, around their centre, before they are degraded."""


@dataclass(frozen=True, eq=False)
class SeverityPicture:
    """A photograph and its severity map."""

    name: str
    photo: NDArray[np.uint8]
    """``(h, w, 3)``."""
    severity: NDArray[np.float32]
    """``(h, w)`` in [0, 2]."""
    truth: NDArray[np.float32] | None = None
    """``(h, w)`` in [0, 1]: how strongly each pixel was degraded, where that is known."""
    correlation: float | None = None
    """Spearman's, of the map with the truth, over all pixels."""


def photograph_severity(model: SAVL, path: Path) -> SeverityPicture:
    """The severity map of a photograph as it is, whatever its size.

    Args:
        model: A network with a variational field, on any device.
        path: The image.

    Raises:
        ImageFileError: It cannot be read.
    """
    y = read_rgb(path)[None]
    return SeverityPicture(path.stem, _samples(y), _plane(_severity(model, y)))


def uneven_severity(models: Sequence[SAVL], path: Path, seed: tuple[int, int]) -> list[SeverityPicture]:
    """Severity maps of one image that was degraded through a mask by the published pipeline.

    Args:
        models: Networks with a variational field and of one scale, on any device.
        path: A high-resolution image; what is more than `LARGEST` pixels wide or high is cut down to its middle.
        seed: That of `savl.evaluation.severity.severity_agreement` and the image's place in its list: draws and
            correlation are then the same, for images that are not cut.

    Returns:
        One a network, with truth and correlation.

    Raises:
        ImageFileError: The image cannot be read.
        DegradationUnavailable: kornia is not installed.
    """
    config = DegradationConfig()
    uneven = replace(config, spatial=replace(config.spatial, probability=1.0))
    scale = models[0].config.scale
    degraded = Degradation(uneven, scale)(read_middle(path, LARGEST, scale)[None], seed)
    pictures = []
    for model in models:
        severity = _severity(model, degraded.y)
        correlation = rank_correlation(severity[0], degraded.degradation_mask[0])
        truth = _plane(degraded.degradation_mask)
        pictures.append(SeverityPicture(path.stem, _samples(degraded.y), _plane(severity), truth, correlation))
    return pictures


def read_middle(path: Path, largest: int, multiple: int) -> Tensor:
    """Decode an image, cut to ``largest`` pixels around its centre and to multiples of ``multiple``.

    Returns:
        ``(3, H, W)`` float32 in [0, 1]. An image that is cut to multiples only loses its right and bottom edge.

    Raises:
        ImageFileError: It cannot be read.
    """
    x = read_rgb(path)
    height, width = (min(side, largest) // multiple * multiple for side in x.shape[1:])
    top, left = ((side - largest) // 2 if side > largest else 0 for side in x.shape[1:])
    return x[:, top : top + height, left : left + width]


def _severity(model: SAVL, y: Tensor) -> Tensor:
    _, variance = measure_fields(model, y)
    assert variance is not None
    return severity_map(variance)


def _samples(y: Tensor) -> NDArray[np.uint8]:
    """``(1, 3, h, w)`` in [0, 1] to 8 bits, ``(h, w, 3)``."""
    samples: NDArray[np.uint8] = (_shrunk(y)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return samples


def _plane(values: Tensor) -> NDArray[np.float32]:
    """``(1, h, w)`` to ``(h, w)``."""
    plane: NDArray[np.float32] = _shrunk(values[:, None])[0, 0].numpy()
    return plane


def _shrunk(image: Tensor) -> Tensor:
    """``(1, C, h, w)``, averaged over squares of whole pixels where it is larger than the page wants."""
    factor = -(-max(image.shape[2:]) // LONGEST)
    if factor == 1:
        return image
    padded = F.pad(image, (0, -image.shape[3] % factor, 0, -image.shape[2] % factor), mode="replicate")
    return F.avg_pool2d(padded, factor)
