"""The amortized estimator g_psi: y → (mu, logvar), and the degradation field built from its output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.network.config import SAVLConfig
from savl.network.layers import ChannelsLastConv2d, without_autocast

LOGVAR_LIMIT = 8.0
"""Bound of |logvar|: exp(logvar) then stays finite in every dtype that the network runs in."""
HIGH_PASS_GAIN = 8.0
"""Factor after the high-pass filter, which leaves about a tenth of a photograph's contrast."""
INITIAL_MEAN_STD = 0.1
"""Standard deviation of the initial weights that compute mu: large enough that samples of r differ between pixels."""
STRENGTH_RADIUS = 2
"""Pixels on each side over which `RestorationStrength` averages."""
_STRENGTH_WIDTH = 16
_INITIAL_STRENGTH_LOGIT = 3.0


class AmortizedEstimator(nn.Module):
    """Infer the degradation field of every pixel from its neighbourhood, in one forward pass.

    The estimator is a stack of 3×3 convolutions of stride 1, some dilated, with a receptive field of
    ``config.receptive_field`` pixels. It has no normalisation layers, so away from the border the field of a crop
    equals the crop of the field. Before training, the means differ from pixel to pixel and the variances are those of
    the prior.
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        width = config.estimator_width
        self.high_pass = config.estimator_high_pass
        self.variational = config.degradation_code == "variational"
        layers: list[nn.Module] = [ChannelsLastConv2d(3, width, 3), nn.LeakyReLU(0.1)]
        for dilation in config.estimator_dilations:
            layers += [ChannelsLastConv2d(width, width, 3, dilation), nn.LeakyReLU(0.1)]
        self.body = nn.Sequential(*layers)
        self.head = ChannelsLastConv2d(width, (2 if self.variational else 1) * config.latent, 1)
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight[: config.latent], std=INITIAL_MEAN_STD)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Estimate the posterior.

        Args:
            y: ``(B, 3, h, w)`` low-resolution image with the mean colour subtracted.

        Returns:
            mu ``(B, R, h, w)`` and logvar ``(B, R, h, w)``; logvar is None for a deterministic code.
        """
        if self.high_pass:
            y = HIGH_PASS_GAIN * (y - _binomial_average(y))
        x = y.permute(0, 2, 3, 1)
        for layer in self.body:
            if isinstance(layer, ChannelsLastConv2d):  # each applies the activation after it
                x = layer(x, activation="leaky_relu", slope=0.1)
        features: Tensor = self.head(x).permute(0, 3, 1, 2)
        if not self.variational:
            return features, None
        mu, logvar = features.chunk(2, dim=1)
        return mu, logvar.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)


class RestorationStrength(nn.Module):
    """Compute how strongly each pixel is restored from the degradation field.

    The strength scales the difference between the network's output and bicubic interpolation (`SAVL.reconstruct`). It
    is a function of the field at each pixel, averaged over 5×5 pixels in logits, so that it varies smoothly.

    The field is an input only: no gradient of the strength reaches the estimator. Before training, the strength is
    sigmoid(3) = 0.95 everywhere.
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        inputs = (2 if config.degradation_code == "variational" else 1) * config.latent
        self.expand = nn.Conv2d(inputs, _STRENGTH_WIDTH, 1)
        self.contract = nn.Conv2d(_STRENGTH_WIDTH, 1, 1)
        nn.init.zeros_(self.contract.weight)
        nn.init.constant_(self.contract.bias, _INITIAL_STRENGTH_LOGIT)  # type: ignore[arg-type]

    def forward(self, mu: Tensor, logvar: Tensor | None) -> Tensor:
        """Compute the strength.

        Args:
            mu: ``(B, R, h, w)``, mean of the field.
            logvar: ``(B, R, h, w)``, its log-variance; None for a deterministic code.

        Returns:
            ``(B, h, w)`` in (0, 1), float32, also under autocast and in a bfloat16 network; float64 for a float64
            field.
        """
        field = (mu if logvar is None else torch.cat((mu, logvar), dim=1)).detach()
        dtype = torch.float64 if field.dtype == torch.float64 else torch.float32
        with without_autocast(field):
            hidden = F.gelu(_conv_in(dtype, self.expand, field))
            logits = _binomial_average(_conv_in(dtype, self.contract, hidden))
            return logits.sigmoid().squeeze(1)


def _conv_in(dtype: torch.dtype, layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1×1 convolution in a dtype that may be wider than that of its weights."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.conv2d(x.to(dtype), layer.weight.to(dtype), bias)


def _binomial_average(y: Tensor) -> Tensor:
    """Return the 5×5 binomial average of every pixel, with replicated borders.

    It is computed with additions, because autocast would run a convolution in half precision, and the estimator needs a
    small difference of large values.
    """
    y = F.pad(y, (2, 2, 2, 2), mode="replicate")
    for axis in (2, 3):
        length = y.shape[axis] - 4
        a, b, c, d, e = (y.narrow(axis, start, length) for start in range(5))
        y = (a + e + 4.0 * (b + d) + 6.0 * c) / 16.0
    return y


@dataclass(frozen=True, eq=False)
class DegradationField:
    """A Gaussian for every low-resolution pixel, or a plain code for the deterministic ablation.

    Shapes: mu, logvar and sample are ``(B, R, h, w)``; kl, severity, variance and strength are ``(B, h, w)``. A
    deterministic code has a mean only: logvar, kl, severity and variance are None, and sample is mu.
    """

    mu: Tensor
    """Posterior mean; encodes the type of degradation."""
    logvar: Tensor | None = None
    """Posterior log-variance; encodes how severe the degradation is."""
    sample: Tensor | None = None
    """Reparameterized sample r (mu itself if no seed was given)."""
    kl: Tensor | None = None
    """KL(q(r | y) ‖ N(0, I)) in nats per pixel."""
    severity: Tensor | None = None
    """Severity map s in [0, 2], normalised over the whole image."""
    variance: Tensor | None = None
    """Per-pixel variance v, the mean of exp(logvar) over channels."""
    strength: Tensor | None = None
    """How strongly each pixel is restored, in (0, 1); None if the network has no `RestorationStrength`."""

    @classmethod
    def from_posterior(
        cls,
        mu: Tensor,
        logvar: Tensor | None,
        seed: int | None = None,
        *,
        kernels: ops.KernelSettings | None = None,
    ) -> DegradationField:
        """Build the field from the output of the estimator.

        Args:
            mu: ``(B, R, h, w)``.
            logvar: ``(B, R, h, w)``, or None for a deterministic code.
            seed: Seed of the sample, 0 ≤ seed < 2**64; None for ``sample = mu``.
            kernels: Kernels to use; None follows `savl.use_fused_kernels`.
        """
        if logvar is None:
            return cls(mu=mu, sample=mu)
        posterior = ops.gaussian_posterior(mu, logvar, seed=seed, kernels=kernels)
        return cls(mu, logvar, posterior.sample, posterior.kl, posterior.severity, posterior.variance)
