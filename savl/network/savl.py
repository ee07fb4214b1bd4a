"""The SAVL network: conv → DA-RHAGs → conv + long skip → pixel-shuffle → conv, guided by the degradation field."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.bicubic import bicubic_upscale
from savl.network.config import SAVLConfig
from savl.network.dsca import Guidance
from savl.network.estimator import AmortizedEstimator, DegradationField, RestorationStrength
from savl.network.layers import ChannelsLastConv2d, LayerNorm, next_multiple, reflect_pad_to_size, without_autocast
from savl.network.rhag import DARHAG
from savl.network.upscaling import UpscalingNetwork, scale_difference
from savl.ops import KernelSettings


class SAVL(UpscalingNetwork):
    """Real-world super-resolution guided by a per-pixel Gaussian degradation field (SAVL, ICLR 2026).

    With ``config.degradation_code == "none"`` this is the Hybrid Attention Transformer (HAT; Chen et al., 2023).
    """

    rgb_mean: Tensor

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels: KernelSettings | None = None
        channels = config.channels
        self.register_buffer("rgb_mean", torch.tensor(config.rgb_mean).view(1, 3, 1, 1), persistent=False)
        self.estimator = AmortizedEstimator(config) if config.degradation_code != "none" else None
        self.conv_first = ChannelsLastConv2d(3, channels, 3)
        self.norm_first = LayerNorm(channels)
        drop_paths = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        ends = list(accumulate(config.depths))
        self.groups = nn.ModuleList(
            DARHAG(config, drop_paths[end - depth : end]) for end, depth in zip(ends, config.depths, strict=True)
        )
        self.norm_last = LayerNorm(channels)
        self.conv_last = ChannelsLastConv2d(channels, channels, 3)
        self.upsampler = build_upsampler(config)
        zero_initialised = {module.project for module in self.modules() if isinstance(module, Guidance)}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in zero_initialised:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if config.image_residual:  # an untrained network is then exactly bicubic interpolation
            nn.init.zeros_(self.upsampler.to_image.weight)
            nn.init.zeros_(self.upsampler.to_image.bias)  # type: ignore[arg-type]
        # It is built last, so that a seed gives the rest of the network the same weights with and without it.
        self.strength = RestorationStrength(config) if config.restoration_strength else None

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.config.scale

    @property
    def size_multiple(self) -> int:
        """Side of the attention windows in LR pixels."""
        return self.config.window

    @property
    def field_radius(self) -> int:
        """Number of pixels around a pixel that its degradation field depends on; 0 without a field."""
        return self.config.receptive_field // 2 if self.has_field else 0

    @property
    def has_field(self) -> bool:
        """Whether the network infers a degradation field, variational or deterministic."""
        return self.estimator is not None

    @property
    def has_severity(self) -> bool:
        """Whether the field has a variance, from which severity is computed."""
        return self.config.degradation_code == "variational"

    @property
    def learns_strength(self) -> bool:
        """Whether the network infers a restoration strength for every pixel."""
        return self.strength is not None

    @overload
    def forward(
        self, lr: Tensor, return_field: Literal[False] = False, strength: float | Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, lr: Tensor, return_field: Literal[True], strength: float | Tensor | None = None
    ) -> tuple[Tensor, DegradationField | None]: ...

    def forward(
        self, lr: Tensor, return_field: bool = False, strength: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, DegradationField | None]:
        """Upscale a batch of images.

        Args:
            lr: ``(B, 3, h, w)`` in [0, 1], dtype of the network, any h and w from 1 pixel up.
            return_field: Also return the degradation field.
            strength: How strongly the images are restored, as for `reconstruct`. None: the strength that the network
                has learned for each pixel, or 1 if it has learned none.

        Returns:
            ``(B, 3, scale·h, scale·w)``, nominally in [0, 1] but not clamped. With ``return_field``, a pair of it and
            the `DegradationField`; the latter is None for a network with ``degradation_code="none"``.

        Raises:
            TypeError: ``lr`` is not a floating tensor, or outside autocast has another dtype than the network; or
                ``strength`` is of another type.
            ValueError: ``lr`` is not ``(B, 3, h, w)`` with h, w ≥ 1, or ``strength`` is out of range.
        """
        check_image("lr", lr)
        own = self.rgb_mean.dtype
        if lr.dtype != own and not torch.is_autocast_enabled(lr.device.type):
            raise TypeError(f"lr must have the dtype of the network, {own}, got {lr.dtype}; cast it")
        field = self.estimate(lr)
        # None is not passed on, because training replaces `reconstruct` by a function without ``strength``.
        sr = self.reconstruct(lr, field) if strength is None else self.reconstruct(lr, field, strength)
        return (sr, field) if return_field else sr

    def estimate(self, lr: Tensor, seed: int | None = None) -> DegradationField | None:
        """Infer the degradation field of an image.

        Args:
            lr: ``(B, 3, h, w)`` in [0, 1].
            seed: Seed of ``field.sample``; None makes the sample the mean.

        Returns:
            The field at LR size, with its severity normalised over this image, and a strength if the network has
            ``restoration_strength``; None for ``degradation_code="none"``.
        """
        if self.estimator is None:
            return None
        mu, logvar = self.estimator(lr - self.rgb_mean)
        field = DegradationField.from_posterior(mu, logvar, seed, kernels=self.kernels)
        return field if self.strength is None else replace(field, strength=self.strength(mu, logvar))

    def reconstruct(self, lr: Tensor, field: DegradationField | None, strength: float | Tensor | None = None) -> Tensor:
        """Upscale an image whose degradation field is known.

        The result is ``bicubic + strength · (network − bicubic)``, where bicubic is the bicubically upscaled input.

        Args:
            lr: ``(B, 3, h, w)`` in [0, 1].
            field: From `estimate`, or any field of the same size: mu ``(B, R, h, w)``, severity and strength
                ``(B, h, w)`` or None. None for a network without a degradation code, and only there.
            strength: A number in [0, 1], or a floating tensor ``(B, h, w)`` with values in [0, 1], which is
                interpolated bilinearly to the size of the result. 0 is bicubic interpolation, 1 the network's output.
                None: ``field.strength``, and 1 without it.

        Returns:
            ``(B, 3, scale·h, scale·w)``, not clamped.

        Raises:
            TypeError: ``strength`` is neither a number, a floating tensor nor None.
            ValueError: ``field`` is missing, not expected, or of another size than ``lr``; or ``strength`` is out of
                range or of another shape.
        """
        self._check_field(lr, field)
        if strength is None:
            strength = None if field is None else field.strength
        else:
            check_strength(lr, strength)
            if not isinstance(strength, Tensor) and strength == 1:
                strength = None
        height, width = lr.shape[-2:]
        window = self.config.window
        size = next_multiple(height, window), next_multiple(width, window)
        mu = severity = None
        if field is not None:
            # Converted to channels last once, because every DSCA reads it.
            mu = reflect_pad_to_size(field.mu, *size).permute(0, 2, 3, 1).contiguous()
            severity = None if field.severity is None else reflect_pad_to_size(field.severity, *size)

        padded = reflect_pad_to_size(lr - self.rgb_mean, *size)
        # In float32 also under autocast, and with it all sums of residuals, whose rounding would otherwise add up.
        with without_autocast(lr):
            shallow = self.conv_first(padded.permute(0, 2, 3, 1))
        features = self.norm_first(shallow)
        for group in self.groups:
            features = group(features, mu, severity)
        features = self.conv_last(features, self.norm_last, residual=shallow)

        scale = self.config.scale
        sr: Tensor = self.upsampler(features)[..., : scale * height, : scale * width]
        if strength is None and not self.config.image_residual:
            return sr + self.rgb_mean
        bicubic = bicubic_upscale(lr, scale)
        difference = sr if self.config.image_residual else sr + self.rgb_mean - bicubic
        if strength is None:
            return bicubic + difference
        return scale_difference(bicubic, difference, strength)

    def _check_field(self, lr: Tensor, field: DegradationField | None) -> None:
        code = self.config.degradation_code
        if (field is None) != (code == "none"):
            wanted = "None" if code == "none" else "a DegradationField (SAVL.estimate makes one)"
            raise ValueError(f"field must be {wanted} for degradation_code={code!r}, got {type(field).__name__}")
        if field is None:
            return
        batch, _, height, width = lr.shape
        expected = (batch, self.config.latent, height, width)
        if tuple(field.mu.shape) != expected:
            raise ValueError(f"field.mu must have shape {expected} to fit lr, got {tuple(field.mu.shape)}")
        for name, map_ in (("severity", field.severity), ("strength", field.strength)):
            if map_ is not None and tuple(map_.shape) != (batch, height, width):
                raise ValueError(
                    f"field.{name} must have shape {(batch, height, width)} to fit lr, got {tuple(map_.shape)}"
                )


def check_image(name: str, image: object) -> None:
    """Check that an argument is a batch of RGB images.

    Raises:
        TypeError: Not a floating tensor.
        ValueError: Not ``(B, 3, h, w)`` with h, w ≥ 1.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        came = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{name} must be a floating torch.Tensor (B, 3, h, w) in [0, 1], got {came}")
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:]:
        raise ValueError(f"{name} must have shape (B, 3, h, w) with h and w at least 1 pixel, got {tuple(image.shape)}")


def check_strength(lr: Tensor, strength: object) -> None:
    """Check that an argument is a strength for a batch of images: a number in [0, 1], or ``(B, h, w)``.

    The values of a tensor are not checked, because a GPU would have to wait for them.

    Raises:
        TypeError: Neither a number nor a floating tensor.
        ValueError: A number outside [0, 1], or a tensor of another shape.
    """
    accepted = "must be a number in [0, 1], a floating tensor (B, h, w) or None"
    if isinstance(strength, Tensor):
        shape = (lr.shape[0], *lr.shape[2:])
        if not strength.is_floating_point():
            raise TypeError(f"strength {accepted}, got a tensor of {strength.dtype}")
        if tuple(strength.shape) != shape:
            raise ValueError(f"strength must have shape {shape} to fit lr, got {tuple(strength.shape)}")
    elif isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(f"strength {accepted}, got {type(strength).__name__} {strength!r}")
    elif not 0 <= strength <= 1:
        raise ValueError(f"strength {accepted}, got {strength!r}")


class PixelShuffleUpsampler(nn.Module):
    """Upsample as HAT does: conv, then a conv and a pixel shuffle per step (×2 each, or one ×3), then conv."""

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        features = config.upsample_features
        factors = [3] if config.scale == 3 else [2] * (config.scale.bit_length() - 1)
        self.reduce = nn.Sequential(ChannelsLastConv2d(config.channels, features, 3))
        self.stages = nn.Sequential()
        for factor in factors:
            self.stages.append(ChannelsLastConv2d(features, factor**2 * features, 3))
            self.stages.append(nn.PixelShuffle(factor))
        self.to_image = ChannelsLastConv2d(features, 3, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, 3, scale·H, scale·W)``.

        If the convolution is fused, the last one is computed before the last pixel shuffle, so that the features at the
        size of the image, the largest tensor of the network, are never written.
        """
        x: Tensor = self.reduce[0](features, activation="leaky_relu", slope=0.01)
        fused = ops.fuses_convolution(x, self.to_image.kernels)
        *stages, last = self.stages
        for stage in stages:
            x = _shuffle(x, stage.upscale_factor) if isinstance(stage, nn.PixelShuffle) else stage(x)
        assert isinstance(last, nn.PixelShuffle)
        factor: int = last.upscale_factor
        if not fused:
            image: Tensor = self.to_image(_shuffle(x, factor)).permute(0, 3, 1, 2)
            return image
        assert self.to_image.bias is not None
        weight = weight_before_shuffle(self.to_image.weight, factor)
        bias = self.to_image.bias.repeat_interleave(factor**2)
        planes = ops.convolution(x, weight, bias, kernels=self.to_image.kernels).permute(0, 3, 1, 2)
        shuffled: Tensor = F.pixel_shuffle(planes, factor)
        return shuffled


def weight_before_shuffle(weight: Tensor, factor: int) -> Tensor:
    """Return the weight with which a 3×3 convolution before a pixel shuffle equals one after it.

    Pixel ``factor · Y + i`` of the shuffled image is in row Y, as channel i. Its neighbour at tap p is pixel
    ``factor · Y + i + p − 1``, which is channel ``(i + p − 1) mod factor`` of row ``Y + ⌊(i + p − 1) / factor⌋``.

    Args:
        weight: ``(O, C, 3, 3)``.
        factor: Factor of the pixel shuffle, at least 2.

    Returns:
        ``(factor² · O, factor² · C, 3, 3)``, zeros where no tap of the given convolution is.
    """
    outputs, channels = weight.shape[:2]
    span, around = 3 * factor, 2 * factor - 2
    # Window factor − 1 − i of the padded taps has tap p at place factor · (q + 1) + k, for the quotient q and the
    # remainder k of i + p − 1.
    windows = F.pad(weight, (around,) * 4).unfold(2, span, 1).unfold(3, span, 1).flip(2, 3)
    moved = windows.unflatten(5, (3, factor)).unflatten(4, (3, factor)).permute(0, 2, 3, 1, 5, 7, 4, 6)
    rearranged: Tensor = moved.reshape(factor**2 * outputs, factor**2 * channels, 3, 3)
    return rearranged


def _shuffle(x: Tensor, factor: int) -> Tensor:
    """Map ``(B, H, W, factor² · C)`` to ``(B, factor · H, factor · W, C)`` as `torch.nn.PixelShuffle` does."""
    batch, height, width, channels = x.shape
    parts = x.unflatten(3, (-1, factor, factor)).permute(0, 1, 4, 2, 5, 3)
    shuffled: Tensor = parts.reshape(batch, factor * height, factor * width, channels // factor**2)
    return shuffled


class DirectUpsampler(nn.Module):
    """Upsample with one convolution at LR size and one pixel shuffle, as SwinIR's lightweight head does.

    Nothing is computed at HR size.
    """

    def __init__(self, config: SAVLConfig) -> None:
        super().__init__()
        self.to_image = ChannelsLastConv2d(config.channels, 3 * config.scale**2, 3)
        self.shuffle = nn.PixelShuffle(config.scale)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, 3, scale·H, scale·W)``."""
        image: Tensor = self.shuffle(self.to_image(features).permute(0, 3, 1, 2))
        return image


def build_upsampler(config: SAVLConfig) -> PixelShuffleUpsampler | DirectUpsampler:
    """Build the upsampler that ``config.upsampler`` names."""
    return PixelShuffleUpsampler(config) if config.upsampler == "pixelshuffle" else DirectUpsampler(config)
