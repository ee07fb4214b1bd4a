"""The conditional likelihood decoder p_theta(y | z, r), used in training only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from savl.network.config import SAVLConfig

FRESH_LOG_SCALE = math.log(8 / 255)
"""What an untrained decoder takes for the logarithm of the scale."""
LOG_SCALE_LIMITS = (math.log(0.25 / 255), 0.0)
"""8-bit rounding alone deviates by a quarter of a step on average."""


class LikelihoodDecoder(nn.Module):
    """Rebuild the low-resolution image from clean content and a sample of the degradation field.

    The content code z already is a clean image of the right size; the decoder adds what the degradation did to it.
    Given all of the content, r has no reason to carry any: that is what keeps the field free of it (SAVL-LM).
    """

    def __init__(self, config: SAVLConfig, learned_scale: bool = False) -> None:
        """Build it.

        Args:
            config: Widths.
            learned_scale: Whether the scale of the likelihood is inferred as well, for every pixel and channel: then a
                field that knows how noisy a pixel is explains it better, and not only one that knows the noise itself.
        """
        super().__init__()
        self.learned_scale = learned_scale
        width = config.decoder_width
        layers: list[nn.Module] = [nn.Conv2d(3 + config.latent, width, 3, padding=1), nn.LeakyReLU(0.1)]
        for _ in range(config.decoder_depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)]
        last = nn.Conv2d(width, 6 if learned_scale else 3, 3, padding=1)
        # A fresh decoder says z. One that begins with noise of its own learns to be silent first, about r too, and the
        # field collapses before it was ever of use.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers, last)

    def forward(self, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """Parameters of the likelihood of y.

        Args:
            z: ``(B, 3, h, w)`` content code D(x) in [0, 1].
            r: ``(B, R, h, w)`` sample of the degradation field.

        Returns:
            Location ``(B, 3, h, w)``: mean of the Gaussian, or median of the Laplacian, over y. And the logarithm of
            its scale ``(B, 3, h, w)``: standard deviation, or mean absolute deviation; None where the scale is fixed.
        """
        out: Tensor = self.body(torch.cat((z, r), dim=1))
        if not self.learned_scale:
            return z + out, None
        return z + out[:, :3], (out[:, 3:] + FRESH_LOG_SCALE).clamp(*LOG_SCALE_LIMITS)
