"""What is kept of the degradation field of an image: its mean over the pixels, and three numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl import ops
from savl.inference.tiling import split, whole
from savl.network import SAVL

BLOCK = 512
"""Side in pixels of the parts that a field is computed in; 128 channels of it take 134 MB."""


@dataclass(frozen=True, eq=False)
class Features:
    """Statistics of the fields of n images, over their pixels."""

    mean: NDArray[np.float32]
    """``(n, R)``: spatial mean of mu. The feature that probes and estimators see."""
    variance: NDArray[np.float32] | None
    """``(n,)``: mean of the variance v; None for a deterministic code."""
    kl: NDArray[np.float32] | None
    """``(n,)``: mean divergence from the prior, nats per pixel; None for a deterministic code."""

    @property
    def severity(self) -> NDArray[np.float32] | None:
        """``(n,)``: 1 − v̄, how far the variance lies below the prior's, higher for images degraded more.

        The severity *map* compares the pixels of one image and has the same mean for all images, so it cannot rank
        them; this number can.
        """
        return None if self.variance is None else np.float32(1) - self.variance

    def __len__(self) -> int:
        return len(self.mean)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """The features of several groups of images, at least one, one after the other."""

        def joined(name: str) -> NDArray[np.float32] | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        mean = joined("mean")
        assert mean is not None
        return cls(mean, joined("variance"), joined("kl"))


@torch.inference_mode()
def measure_fields(model: SAVL, y: Tensor, *, block: int = BLOCK) -> tuple[Features, Tensor | None]:
    """Statistics of the fields of a batch of images, in memory that does not grow with their size.

    A field is computed part by part, each with a halo as wide as the estimator sees, and added up; no part is kept.

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
    """``(B, h, w)`` variances of whole images to their severity maps in [0, 2]."""
    return ops.normalise_severity(variance, *ops.variance_statistics(variance))


def check_has_field(model: SAVL, name: str = "model") -> None:
    """Refuse a network without a degradation field.

    Raises:
        ValueError: That; the message begins with the name.
    """
    if model.config.degradation_code == "none":
        raise ValueError(
            f"{name} has no degradation field to analyze (degradation_code 'none', as HAT); "
            "weights with a 'variational' or 'deterministic' code are accepted"
        )


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().numpy()
    return array
