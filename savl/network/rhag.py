"""DA-RHAG, the degradation-aware residual hybrid attention group: [DSCA → HAB] × depth → DSCA → OCAB → conv.

DSCA is in `savl.network.dsca`. The other blocks are those of HAT (Chen et al., "Activating More Pixels in Image
Super-Resolution Transformer", 2023): HAB with its CAB, and OCAB.
"""

from __future__ import annotations

from torch import Tensor, nn

from savl import ops
from savl.network.config import SAVLConfig
from savl.network.dsca import DSCA
from savl.network.layers import (
    MLP,
    ChannelsLastConv2d,
    ChannelsLastLinear,
    DropPath,
    LayerNorm,
    normalise_once,
    relative_bias_table,
)
from savl.ops import KernelSettings


class DARHAG(nn.Module):
    """Degradation-aware residual hybrid attention group.

    Every second HAB shifts its windows by half a window, as in Swin. Each DSCA uses the other partition than the block
    after it, so that every [DSCA → block] pair attends within both. With ``degradation_code="none"`` there are no DSCA
    stages, and this is HAT's RHAG.
    """

    def __init__(self, config: SAVLConfig, drop_paths: list[float]) -> None:
        super().__init__()
        half = config.window // 2
        depth = len(drop_paths)
        hab_shifts = [half * (index % 2) for index in range(depth)]
        self.habs = nn.ModuleList(
            HAB(config, shift, drop_path) for shift, drop_path in zip(hab_shifts, drop_paths, strict=True)
        )
        self.ocab = OCAB(config)  # its windows are never shifted
        self.dscas = nn.ModuleList()
        if config.degradation_code != "none":
            self.dscas.extend(DSCA(config, half - shift) for shift in (*hab_shifts, 0))
        self.conv = ChannelsLastConv2d(config.channels, config.channels, 3)

    def forward(self, x: Tensor, mu: Tensor | None, severity: Tensor | None) -> Tensor:
        """Refine the features.

        Args:
            x: ``(B, H, W, C)`` features, H and W multiples of the window.
            mu: ``(B, H, W, R)`` posterior mean; None without a degradation code.
            severity: ``(B, H, W)`` severity map or None.

        Returns:
            ``(B, H, W, C)``.
        """
        residual = x
        for index, block in enumerate((*self.habs, self.ocab)):
            if mu is not None:
                x = self.dscas[index](x, mu, severity)
            x = block(x)
        out: Tensor = self.conv(x, residual=residual)
        return out


class HAB(nn.Module):
    """Hybrid attention block: window attention beside channel attention, then an MLP.

    n = LN(x);  x = x + drop(attention(n)) + cab_scale · CAB(n);  x = x + drop(MLP(LN(x)))
    """

    def __init__(self, config: SAVLConfig, shift: int, drop_path: float) -> None:
        super().__init__()
        channels = config.channels
        self.window = config.window
        self.shift = shift
        self.kernels: KernelSettings | None = None
        self.norm_attention = LayerNorm(channels)
        self.qkv = ChannelsLastLinear(channels, 3 * channels)
        self.bias_table = relative_bias_table(config.window, config.window, config.heads)
        self.proj = ChannelsLastLinear(channels, channels)
        self.cab = CAB(config)
        self.norm_mlp = LayerNorm(channels)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, H, W, C)``; H and W are multiples of the window."""
        normed, norm = normalise_once(self.norm_attention, x)
        qkv = self.qkv(normed, norm)
        attended = ops.window_attention(
            qkv, self.bias_table, None, window=self.window, shift=self.shift, kernels=self.kernels
        )
        hidden, gate = self.cab(normed, norm)
        if self.drop_path.active:
            x = self.cab.expand(hidden, residual=x + self.drop_path(self.proj(attended)), gate=gate)
            out: Tensor = x + self.drop_path(self.mlp(x, self.norm_mlp, None))
            return out
        return self.mlp.after_attention(attended, self.proj, x, self.norm_mlp, self.cab.expand, hidden, gate)


class CAB(nn.Module):
    """Channel attention block: two 3×3 convolutions, then a gate per channel computed from averaged features.

    The average is taken over the whole input. With ``config.cab_neighbourhood`` = n > 0, each attention window has its
    own average, over the n × n windows around it that lie within the input.
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        self.kernels: KernelSettings | None = None
        self.scale = config.cab_scale
        self.window = config.window
        self.neighbourhood = config.cab_neighbourhood
        channels = config.channels
        compressed = channels // config.cab_compress
        squeezed = channels // config.cab_squeeze
        self.compress = ChannelsLastConv2d(channels, compressed, 3)
        self.expand = ChannelsLastConv2d(compressed, channels, 3)
        # On pooled features, linear layers are 1×1 convolutions.
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor, norm: LayerNorm | None) -> tuple[Tensor, Tensor]:
        """Compute the input of the second convolution and its gate.

        The block adds ``cab_scale · gate · expand(hidden)`` to its features together with other parts. The gate is
        known before ``expand`` is computed (`savl.ops.channel_gate`), so that gate and sum take no pass of their own.

        Args:
            x: ``(B, H, W, C)``, H and W multiples of the window.
            norm: Applied to ``x`` first, or None.

        Returns:
            ``GELU(compress(norm(x)))`` ``(B, H, W, C / cab_compress)``, and ``cab_scale · gate``
            ``(B, rows, columns, C)``, one for each window or one for all.
        """
        hidden: Tensor = self.compress(x, norm, activation="gelu")
        height, width = hidden.shape[1:3]
        gate = ops.channel_gate(
            hidden,
            self.expand.weight,
            self.expand.bias,  # type: ignore[arg-type]
            self.squeeze.weight,
            self.squeeze.bias,
            self.excite.weight,
            self.excite.bias,
            rows=height // self.window if self.neighbourhood else 1,
            columns=width // self.window if self.neighbourhood else 1,
            neighbourhood=self.neighbourhood or 1,
            scale=self.scale,
            kernels=self.kernels,
        )
        return hidden, gate


class OCAB(nn.Module):
    """Overlapping cross-attention block: queries of a window attend to keys of the larger window around it.

    x = x + attention(LN(x));  x = x + MLP(LN(x))
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        channels = config.channels
        self.window = config.window
        self.key_window = config.key_window
        self.kernels: KernelSettings | None = None
        self.norm_attention = LayerNorm(channels)
        self.qkv = ChannelsLastLinear(channels, 3 * channels)
        self.bias_table = relative_bias_table(config.window, config.key_window, config.heads)
        self.proj = ChannelsLastLinear(channels, channels)
        self.norm_mlp = LayerNorm(channels)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, H, W, C)``; H and W are multiples of the window."""
        channels = x.shape[-1]
        q, kv = self.qkv(x, self.norm_attention).split((channels, 2 * channels), dim=-1)
        attended = ops.overlapping_window_attention(
            q, kv, self.bias_table, None, window=self.window, key_window=self.key_window, kernels=self.kernels
        )
        return self.mlp.after_attention(attended, self.proj, x, self.norm_mlp)
