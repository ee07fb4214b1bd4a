"""Features of images for the analysis: statistics of the degradation field, and descriptors of the image content."""

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

TILE = 512
"""Side in pixels of the tiles in which a field is computed. A float32 tensor of 128 channels takes 134 MB per tile."""
CELLS = 4
"""Number of cells along each side of a crop. `describe_content` describes each cell separately."""
_LUMA = (0.299, 0.587, 0.114)
_FLOOR = 1e-6
"""Added to a mean squared gradient before the logarithm. Rounding to 8 bits causes gradients of about this size."""


@dataclass(frozen=True, eq=False)
class Features:
    """Statistics of the degradation fields of n images, computed over the pixels of each image."""

    mean: NDArray[np.float32]
    """``(n, R)``: spatial mean of the posterior mean mu (R channels). Probes and estimators use it as the feature."""
    variance: NDArray[np.float32] | None
    """``(n,)``: spatial mean of the posterior variance; None for a deterministic code."""
    kl: NDArray[np.float32] | None
    """``(n,)``: spatial mean of the KL divergence from the prior, in nats per pixel; None for a deterministic code."""

    @property
    def severity(self) -> NDArray[np.float32] | None:
        """``(n,)``: severity of each image, the variance of the prior (1) minus `variance`; None without a variance.

        More degraded images have a higher value. The severity map s(u) cannot rank images: it is normalised within one
        image, so its mean is the same for all images.
        """
        return None if self.variance is None else np.float32(1) - self.variance

    def __len__(self) -> int:
        return len(self.mean)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Concatenate the features of groups of images. `parts` must not be empty."""

        def concatenated(name: str) -> NDArray[np.float32] | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        mean = concatenated("mean")
        assert mean is not None
        return cls(mean, concatenated("variance"), concatenated("kl"))


@torch.inference_mode()
def measure_fields(model: SAVL, y: Tensor, *, tile: int = TILE) -> tuple[Features, Tensor | None]:
    """Compute the statistics of the degradation fields of a batch of images.

    The field is computed tile by tile, so the memory for activations does not grow with the size of the images. Each
    tile is read with a margin of half the receptive field, so that the result does not depend on the tile size.

    Args:
        model: A network with a degradation field, on any device.
        y: Images ``(B, 3, h, w)``, float32 in [0, 1].
        tile: Side of the tiles, in pixels.

    Returns:
        The statistics, and the posterior variance of every pixel ``(B, h, w)`` on the CPU (None for a deterministic
        code).

    Raises:
        ValueError: The network has no degradation field.
    """
    check_has_field(model)
    device = model.rgb_mean.device
    image = whole(y)
    margin = model.config.receptive_field // 2
    total = torch.zeros(y.shape[0], model.config.latent, dtype=torch.float64)
    variance: Tensor | None = None
    kl = torch.zeros(y.shape[0], dtype=torch.float64)
    for core in split(image, tile):
        context = core.grown(margin, image)
        field = model.estimate(context.crop(y, image).to(device).contiguous())
        assert field is not None
        total += core.crop(field.mu, context).sum(dim=(2, 3), dtype=torch.float64).cpu()
        if field.variance is not None and field.kl is not None:
            if variance is None:
                variance = torch.empty(y.shape[0], *y.shape[2:])
            core.crop(variance, image).copy_(core.crop(field.variance, context))
            kl += core.crop(field.kl, context).sum(dim=(1, 2), dtype=torch.float64).cpu()
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

    Args:
        model: The network.
        name: Name of the network in the error message.

    Raises:
        ValueError: The network has no degradation field.
    """
    if model.config.degradation_code == "none":
        raise ValueError(
            f"{name} has no degradation field to analyze, because its degradation_code is 'none'; use a network whose "
            "degradation_code is 'variational' or 'deterministic'"
        )


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().numpy()
    return array


@dataclass(frozen=True, eq=False)
class ContentComponents:
    """Principal components of the content descriptors of n crops."""

    values: NDArray[np.float32]
    """``(n, d)``: d components of each crop."""
    explained: float
    """Fraction of the descriptors' variance that the components explain, in [0, 1]."""


def describe_content(z: Tensor) -> Tensor:
    """Compute descriptors of the colours and the texture of clean crops.

    Each crop is divided into 4×4 cells. The colour of a cell is described by its mean (3 numbers). The texture is
    described by the logarithms of the mean squared horizontal and vertical gradients of the luma (2 numbers). Texture
    is included because an estimator can mistake it for noise, even one that ignores colour and brightness.

    Args:
        z: Crops ``(K, 3, h, w)`` in [0, 1], with sides of at least 5 pixels.

    Returns:
        Descriptors ``(K, 80)`` of the dtype of `z`: 48 numbers for the colours, followed by 32 for the texture.
    """
    luma = torch.einsum("c,bchw->bhw", z.new_tensor(_LUMA), z)[:, None]
    colours = F.adaptive_avg_pool2d(z, CELLS)
    energies = [F.adaptive_avg_pool2d(luma.diff(dim=axis).square(), CELLS) for axis in (3, 2)]
    texture = (torch.cat(energies, dim=1) + _FLOOR).log()
    return torch.cat((colours.flatten(1), texture.flatten(1)), dim=1)


def principal_components(descriptors: Sequence[Tensor], components: int) -> ContentComponents:
    """Compute the principal components of the content descriptors of all crops.

    The colours and the texture are scaled to the same total variance before, so that they have the same weight.

    Args:
        descriptors: Results of `describe_content`, with at least 2 rows in total.
        components: Maximum number of components. n crops have at most n − 1 components.
    """
    rows = torch.cat(list(descriptors)).double()
    rows = rows - rows.mean(dim=0)
    colours = 3 * CELLS**2
    for group in (rows[:, :colours], rows[:, colours:]):
        group /= group.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = min(components, len(rows) - 1)
    # The sign of a component is arbitrary. The entry of largest magnitude is made positive, so that all machines agree.
    values = u[:, :kept] * s[:kept]
    values = values * values.gather(0, values.abs().argmax(dim=0, keepdim=True)).sign()
    energy = s.square()
    explained = float(energy[:kept].sum() / energy.sum().clamp(min=1e-12))
    return ContentComponents(values.float().numpy(), explained)
