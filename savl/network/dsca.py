"""DSCA, the degradation-guided spatial–channel attention of SAVL.

`savl.network.rhag` applies one DSCA before each HAB (hybrid attention block) and before each OCAB (overlapping
cross-attention block) of HAT.
"""

from __future__ import annotations

from torch import Tensor, nn

from savl import ops
from savl.network.config import SAVLConfig
from savl.network.layers import ChannelsLastLinear, LayerNorm, must_be_called, relative_bias_table
from savl.ops import KernelSettings


class Guidance(nn.Module):
    """Compute the channel modulation of DSCA from the posterior mean mu of the degradation field.

    The outputs of a linear layer of mu are a scale gamma and, with ``config.modulation_shift``, a shift beta for each
    pixel and channel. `savl.ops.guided_projection` computes it.
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        outputs = 2 if config.modulation_shift else 1
        self.project = ChannelsLastLinear(config.latent, outputs * config.channels)
        nn.init.zeros_(self.project.weight)  # gamma = beta = 0: a new DSCA does not modulate
        nn.init.zeros_(self.project.bias)


class DSCA(nn.Module):
    """Apply window attention weighted by severity, then modulate its channels by the degradation.

    LN is layer normalisation, mu the posterior mean of the degradation field, and s the severity map:

    spatial path:  attended = proj(window_attention(qkv(LN(x)), s))
    channel path:  out = x + (1 + gamma(mu)) · attended + beta(mu)
    """

    def __init__(self, config: SAVLConfig, shift: int) -> None:
        super().__init__()
        channels = config.channels
        self.window = config.window
        self.shift = shift
        self.spatial_modulation = config.spatial_modulation
        self.kernels: KernelSettings | None = None
        self.norm = LayerNorm(channels)
        self.qkv = ChannelsLastLinear(channels, 3 * channels)
        self.bias_table = relative_bias_table(config.window, config.window, config.heads)
        self.proj = ChannelsLastLinear(channels, channels)
        self.guidance = Guidance(config) if config.channel_modulation else None

    def forward(self, x: Tensor, mu: Tensor, severity: Tensor | None) -> Tensor:
        """Apply the spatial path, then the channel path.

        Args:
            x: ``(B, H, W, C)`` features, H and W multiples of the window.
            mu: ``(B, H, W, R)`` posterior mean.
            severity: ``(B, H, W)`` severity map, or None for a network with a deterministic degradation code, which
                has no variance.

        Returns:
            ``(B, H, W, C)`` features.
        """
        attended = ops.window_attention(
            self.qkv(x, self.norm),
            self.bias_table,
            severity if self.spatial_modulation else None,
            window=self.window,
            shift=self.shift,
            kernels=self.kernels,
        )
        if self.guidance is None:
            out: Tensor = self.proj(attended, residual=x)
            return out
        proj, guidance = self.proj, self.guidance.project
        if must_be_called(proj, guidance):
            gamma, *shift = guidance(mu).split(x.shape[-1], dim=-1)
            modulated: Tensor = proj(attended, residual=x, gamma=gamma, beta=shift[0] if shift else None)
            return modulated
        return ops.guided_projection(
            attended, proj.weight, proj.bias, x, mu, guidance.weight, guidance.bias, kernels=self.kernels
        )
