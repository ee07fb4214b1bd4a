"""OCAB: overlapping cross-attention block of HAT (Chen et al., 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from savl import ops
from savl.network.config import SAVLConfig
from savl.network.layers import MLP, LayerNorm, relative_bias_table
from savl.ops import KernelSettings


class OCAB(nn.Module):
    """x += attention(queries of a window, keys of the larger window around it);  x += MLP(LN(x))."""

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        channels = config.channels
        self.window = config.window
        self.key_window = config.key_window
        self.kernels: KernelSettings | None = None
        self.norm_attention = LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias_table = relative_bias_table(config.window, config.key_window, config.heads)
        self.proj = nn.Linear(channels, channels)
        self.norm_mlp = LayerNorm(channels)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` → ``(B, H, W, C)``, H and W multiples of the window."""
        channels = x.shape[-1]
        q, kv = self.qkv(self.norm_attention(x)).split((channels, 2 * channels), dim=-1)
        attended = ops.overlapping_window_attention(
            q, kv, self.bias_table, None, window=self.window, key_window=self.key_window, kernels=self.kernels
        )
        x = x + self.proj(attended)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out
