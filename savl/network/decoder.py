"""The conditional likelihood decoder p_theta(y | z, r), used in training only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savl.network.config import SAVLConfig


class LikelihoodDecoder(nn.Module):
    """Rebuild the low-resolution image from clean content and a sample of the degradation field.

    The content code z already is a clean image of the right size; the decoder adds what the degradation did to it.
    Given all of the content, r has no reason to carry any: that is what keeps the field free of it (SAVL-LM).
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        width = config.decoder_width
        layers: list[nn.Module] = [nn.Conv2d(3 + config.latent, width, 3, padding=1), nn.LeakyReLU(0.1)]
        for _ in range(config.decoder_depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)]
        layers.append(nn.Conv2d(width, 3, 3, padding=1))
        self.body = nn.Sequential(*layers)

    def forward(self, z: Tensor, r: Tensor) -> Tensor:
        """Location of the likelihood of y.

        Args:
            z: ``(B, 3, h, w)`` content code D(x) in [0, 1].
            r: ``(B, R, h, w)`` sample of the degradation field.

        Returns:
            ``(B, 3, h, w)``: mean of the Gaussian, or location of the Laplacian, over y.
        """
        residual: Tensor = self.body(torch.cat((z, r), dim=1))
        return z + residual
