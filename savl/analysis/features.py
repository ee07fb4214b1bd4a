"""Features of images: statistics of the degradation field over the pixels, and descriptors of clean content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from savl import ops
from savl.inference.tiling import split, whole
from savl.network import SAVL

BLOCK = 512
"""Side in pixels of the parts that a field is computed in; 128 channels of one part take 134 MB."""
CELLS = 4
"""Cells along each side of a crop in which its content is described."""
_LUMA = (0.299, 0.587, 0.114)
_FLOOR = 1e-6
"""Added to the energy of gradients before the logarithm, about the energy of rounding to 8 bits."""


@dataclass(frozen=True, eq=False)
class Features:
    """Statistics of the fields of n images, over their pixels."""

    mean: NDArray[np.float32]
    """``(n, R)``: spatial mean of mu, the feature of the probes and the estimators."""
    variance: NDArray[np.float32] | None
    """``(n,)``: spatial mean of the variance v; None for a deterministic code."""
    kl: NDArray[np.float32] | None
    """``(n,)``: mean KL divergence from the prior in nats per pixel; None for a deterministic code."""

    @property
    def severity(self) -> NDArray[np.float32] | None:
        """``(n,)``: 1 − v̄, how far the variance lies below that of the prior; higher for more degraded images.

        The severity *map* is normalised within one image, so its mean is the same for all images and cannot rank them.
        """
        return None if self.variance is None else np.float32(1) - self.variance

    def __len__(self) -> int:
        return len(self.mean)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Concatenate the features of at least one group of images."""

        def joined(name: str) -> NDArray[np.float32] | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        mean = joined("mean")
        assert mean is not None
        return cls(mean, joined("variance"), joined("kl"))


@torch.inference_mode()
def measure_fields(model: SAVL, y: Tensor, *, block: int = BLOCK) -> tuple[Features, Tensor | None]:
    """Compute the statistics of the fields of a batch of images, in memory that does not grow with their size.

    Fields are computed part by part, each with a halo as wide as the receptive field requires, and accumulated.

    Args:
        model: A network with a field, on any device.
        y: ``(B, 3, h, w)`` float32 in [0, 1].
        block: Side of the parts in pixels.

    Returns:
        The statistics, and the variance of every pixel ``(B, h, w)`` on the CPU (None for a deterministic code).

    Raises:
        ValueError: The network has no field.
    """
    check_has_field(model)
    device = model.rgb_mean.device
    image = whole(y)
    halo = model.config.receptive_field // 2
    total = torch.zeros(y.shape[0], model.config.latent, dtype=torch.float64)
    variance: Tensor | None = None
    kl = torch.zeros(y.shape[0], dtype=torch.float64)
    for part in split(image, block):
        around = part.grown(halo, image)
        field = model.estimate(around.crop(y, image).to(device).contiguous())
        assert field is not None
        total += part.crop(field.mu, around).sum(dim=(2, 3), dtype=torch.float64).cpu()
        if field.variance is not None and field.kl is not None:
            if variance is None:
                variance = torch.empty(y.shape[0], *y.shape[2:])
            part.crop(variance, image).copy_(part.crop(field.variance, around))
            kl += part.crop(field.kl, around).sum(dim=(1, 2), dtype=torch.float64).cpu()
    pixels = image.pixels
    mean = _array(total / pixels)
    if variance is None:
        return Features(mean, None, None), None
    return Features(mean, _array(variance.mean(dim=(1, 2), dtype=torch.float64)), _array(kl / pixels)), variance


def severity_map(variance: Tensor) -> Tensor:
    """Return severity maps in [0, 2] for the variances ``(B, h, w)`` of whole images."""
    return ops.normalise_severity(variance, *ops.variance_statistics(variance))


def check_has_field(model: SAVL, name: str = "model") -> None:
    """Check that a network has a degradation field.

    Raises:
        ValueError: The network has none; the message begins with the name.
    """
    if model.config.degradation_code == "none":
        raise ValueError(
            f"{name} has no degradation field to analyze (degradation_code 'none', as HAT); "
            "weights with a 'variational' or 'deterministic' code are accepted"
        )


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().numpy()
    return array


@dataclass(frozen=True, eq=False)
class ContentComponents:
    """Principal components of the content descriptors of n crops."""

    values: NDArray[np.float32]
    """``(n, d)``."""
    explained: float
    """Share of the descriptors' variance that the components explain, in [0, 1]."""


def describe_content(z: Tensor) -> Tensor:
    """Describe the colours and the texture of clean crops.

    Each cell has its mean colour (3 numbers) and the logarithms of the mean squared horizontal and vertical gradients
    of the luma (2 numbers). Texture is included because an estimator that does not see brightness may still mistake
    texture for noise.

    Args:
        z: ``(K, 3, h, w)`` in [0, 1], sides of at least 5 pixels.

    Returns:
        ``(K, 80)`` float32: 48 numbers for the colours and 32 for the texture.
    """
    luma = torch.einsum("c,bchw->bhw", z.new_tensor(_LUMA), z)[:, None]
    colours = F.adaptive_avg_pool2d(z, CELLS)
    energies = [F.adaptive_avg_pool2d(luma.diff(dim=axis).square(), CELLS) for axis in (3, 2)]
    texture = (torch.cat(energies, dim=1) + _FLOOR).log()
    return torch.cat((colours.flatten(1), texture.flatten(1)), dim=1)


def principal_components(descriptors: Sequence[Tensor], components: int) -> ContentComponents:
    """Compute principal components of the descriptors of all crops; colours and texture have the same weight.

    Args:
        descriptors: Results of `describe_content`, at least 2 rows in total.
        components: Largest number of components; fewer if there are fewer crops.
    """
    rows = torch.cat(list(descriptors)).double()
    rows = rows - rows.mean(dim=0)
    colours = 3 * CELLS**2
    for block in (rows[:, :colours], rows[:, colours:]):
        block /= block.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = min(components, len(rows) - 1)
    # The sign of a component is arbitrary: the largest entry is made positive, so that all machines agree.
    values = u[:, :kept] * s[:kept]
    values = values * values.gather(0, values.abs().argmax(dim=0, keepdim=True)).sign()
    energy = s.square()
    explained = float(energy[:kept].sum() / energy.sum().clamp(min=1e-12))
    return ContentComponents(values.float().numpy(), explained)
