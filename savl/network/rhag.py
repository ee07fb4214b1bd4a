"""DA-RHAG: the degradation-aware residual hybrid attention group, [DSCA → HAB] × depth → DSCA → OCAB → conv."""

from __future__ import annotations

from torch import Tensor, nn

from savl.network.config import SAVLConfig
from savl.network.dsca import DSCA
from savl.network.hab import HAB
from savl.network.layers import ChannelsLastConv2d
from savl.network.ocab import OCAB


class DARHAG(nn.Module):
    """A residual group. Without a degradation code the DSCA stages are absent and this is HAT's RHAG.

    HABs shift their windows in every second block, as in Swin. Each DSCA uses the partition its block does not, so
    that every [DSCA → block] pair has seen both.
    """

    def __init__(self, config: SAVLConfig, drop_paths: list[float]) -> None:
        super().__init__()
        half = config.window // 2
        depth = len(drop_paths)
        hab_shifts = [half * (index % 2) for index in range(depth)]
        self.habs = nn.ModuleList(
            HAB(config, shift, drop_path) for shift, drop_path in zip(hab_shifts, drop_paths, strict=True)
        )
        self.ocab = OCAB(config)  # never shifted
        self.dscas = nn.ModuleList()
        if config.degradation_code != "none":
            self.dscas.extend(DSCA(config, half - shift) for shift in (*hab_shifts, 0))
        self.conv = ChannelsLastConv2d(config.channels, config.channels, 3, padding=1)

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
        out: Tensor = residual + self.conv(x)
        return out
