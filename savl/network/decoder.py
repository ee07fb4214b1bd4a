"""The conditional likelihood decoder p_theta(y | z, r), used in training only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from savl.network.config import SAVLConfig

INITIAL_LOG_SCALE = math.log(8 / 255)
"""Logarithm of the scale that an untrained decoder predicts."""
LOG_SCALE_LIMITS = (math.log(0.25 / 255), 0.0)
"""Range of the logarithm of the scale. Its lower end is the mean error of rounding to 8 bits, a quarter of a step."""


class LikelihoodDecoder(nn.Module):
    """Rebuild the low-resolution image from clean content and a sample of the degradation field.

    The content code z is a clean image of the right size, and the decoder adds the effect of the degradation. Because
    z holds all of the content, r need not encode any; this keeps the field independent of content (SAVL-LM).
    """

    def __init__(self, config: SAVLConfig, learned_scale: bool = False) -> None:
        """Build a decoder that initially returns z.

        Args:
            config: Gives the number of channels and layers.
            learned_scale: Whether to predict the scale of the likelihood for every pixel and channel. A field that
                encodes only how strong the noise at a pixel is then also raises the likelihood; with a fixed scale, a
                field must encode the noise itself.
        """
        super().__init__()
        self.learned_scale = learned_scale
        width = config.decoder_width
        layers: list[nn.Module] = [nn.Conv2d(3 + config.latent, width, 3, padding=1), nn.LeakyReLU(0.1)]
        for _ in range(config.decoder_depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)]
        last = nn.Conv2d(width, 6 if learned_scale else 3, 3, padding=1)
        # Zero weights, so that an untrained decoder returns z. With random ones, training first suppresses the random
        # output, and with it the influence of r: the field then collapses to the prior.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers, last)

    def forward(self, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the parameters of the likelihood of y.

        Args:
            z: ``(B, 3, h, w)`` content code D(x) in [0, 1].
            r: ``(B, R, h, w)`` sample of the degradation field.

        Returns:
            The location ``(B, 3, h, w)``: mean of the Gaussian or median of the Laplacian. And the logarithm of the
            scale ``(B, 3, h, w)``: standard deviation or mean absolute deviation; None if the scale is fixed.
        """
        out: Tensor = self.body(torch.cat((z, r), dim=1))
        if not self.learned_scale:
            return z + out, None
        return z + out[:, :3], (out[:, 3:] + INITIAL_LOG_SCALE).clamp(*LOG_SCALE_LIMITS)
