"""From features at LR size to an image at HR size."""

from __future__ import annotations

from torch import Tensor, nn

from savl.network.config import SAVLConfig


class PixelShuffleUpsampler(nn.Module):
    """conv → (conv, shuffle) per factor → conv, as in HAT: ×2 once, twice or thrice, or ×3 once."""

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        features = config.upsample_features
        factors = [3] if config.scale == 3 else [2] * (config.scale.bit_length() - 1)
        self.reduce = nn.Sequential(nn.Conv2d(config.channels, features, 3, padding=1), nn.LeakyReLU(0.01))
        self.stages = nn.Sequential()
        for factor in factors:
            self.stages.append(nn.Conv2d(features, factor**2 * features, 3, padding=1))
            self.stages.append(nn.PixelShuffle(factor))
        self.to_image = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, 3, scale·H, scale·W)``."""
        image: Tensor = self.to_image(self.stages(self.reduce(features)))
        return image


class DirectUpsampler(nn.Module):
    """One convolution at LR size and one shuffle (SwinIR's lightweight head): no work at HR size."""

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        self.to_image = nn.Conv2d(config.channels, 3 * config.scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(config.scale)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, 3, scale·H, scale·W)``."""
        image: Tensor = self.shuffle(self.to_image(features))
        return image


def build_upsampler(config: SAVLConfig) -> PixelShuffleUpsampler | DirectUpsampler:
    """The upsampler that ``config.upsampler`` names."""
    return PixelShuffleUpsampler(config) if config.upsampler == "pixelshuffle" else DirectUpsampler(config)
