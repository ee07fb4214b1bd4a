"""Settings of the network: one frozen dataclass, and the configurations that have a name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from savl.settings import check_types

DegradationCode = Literal["variational", "deterministic", "none"]
Upsampler = Literal["pixelshuffle", "pixelshuffledirect"]


@dataclass(frozen=True)
class SAVLConfig:
    """Settings of a SAVL network. Ablations and plain HAT are settings, too.

    Raises:
        TypeError: A setting has another type than its default (an int may stand for a float).
        ValueError: A setting is out of its range. Both messages name the setting, its value, and what is accepted.
    """

    scale: int = 4
    """Upscaling factor: 2, 3, 4 or 8."""
    channels: int = 144
    """Feature channels C, a multiple of ``heads``."""
    depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    """Number of HABs in each DA-RHAG; the length of the tuple is the number of groups."""
    heads: int = 6
    """Attention heads, the same number in all attention layers."""
    window: int = 16
    """Side of the attention windows in LR pixels, even."""
    overlap: float = 0.5
    """Side of OCAB's key windows is ``window · (1 + overlap)`` pixels."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLPs as a multiple of ``channels``."""
    cab_compress: int = 24
    """CAB has C / cab_compress channels between its two convolutions."""
    cab_squeeze: int = 24
    """CAB's channel attention has C / cab_squeeze channels in its hidden layer."""
    cab_scale: float = 0.01
    """Weight of the CAB branch in a HAB."""
    cab_neighbourhood: int = 0
    """Side of the neighbourhood that CAB averages over, in attention windows; odd, or 0 for the whole image as in HAT.
    With 0, the result for a tile differs from that for the whole image, and large images differ in their statistics
    from the patches used in training (Chu et al., 2022, arXiv:2112.04491)."""
    drop_path: float = 0.1
    """Drop probability of the last HAB in training (stochastic depth); it grows linearly from 0 at the first HAB."""
    upsampler: Upsampler = "pixelshuffle"
    """``pixelshuffle``: convolutions at ×2 and ×4 (paper, HAT). ``pixelshuffledirect``: one convolution at LR size
    and one pixel shuffle, several times cheaper on a CPU (SwinIR's lightweight head)."""
    upsample_features: int = 64
    """Channels inside the ``pixelshuffle`` upsampler."""
    image_residual: bool = False
    """Add the bicubically upscaled input to the output, so that the network learns the difference. This is not in the
    paper; it lets small networks converge in short trainings."""
    rgb_mean: tuple[float, float, float] = (0.4488, 0.4371, 0.4040)
    """Mean colour, subtracted from the input and added to the output (means of DIV2K, as in HAT)."""
    degradation_code: DegradationCode = "variational"
    """``variational``: SAVL's Gaussian field. ``deterministic``: the ablation with a plain code without variance;
    severity is then 1. ``none``: no estimator and no DSCA, which is the HAT architecture."""
    spatial_modulation: bool = True
    """Weight DSCA's attention logits by severity. False is the paper's ablation of the spatial path."""
    channel_modulation: bool = True
    """Modulate DSCA's channels by the field's mean. False is the paper's ablation of the channel path."""
    modulation_shift: bool = False
    """Add a beta to DSCA's channel path, next to gamma."""
    latent: int = 64
    """Channels R of the degradation field."""
    estimator_width: int = 64
    """Channels inside the amortized estimator."""
    estimator_dilations: tuple[int, ...] = (1, 1, 2, 4, 2)
    """Dilation of each 3×3 convolution after the estimator's first. Receptive field: 3 + 2 · sum, and 4 more for the
    high-pass filter, at most 41 pixels."""
    estimator_high_pass: bool = True
    """Subtract the 5×5 average around each pixel before the estimator. The difference keeps noise and blur, and removes
    brightness and colour, which are content."""
    restoration_strength: bool = False
    """Learn how strongly each pixel is restored: a strength in (0, 1), computed from the degradation field, scales the
    difference between the output and bicubic interpolation. This is not in the paper."""
    decoder_width: int = 64
    """Channels inside the training-only likelihood decoder."""
    decoder_depth: int = 4
    """3×3 convolutions inside the likelihood decoder, at least 2."""

    def __post_init__(self) -> None:
        check_types(self)
        positive = (
            "channels heads window mlp_ratio cab_compress cab_squeeze upsample_features latent estimator_width "
            "decoder_width"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.scale not in (2, 3, 4, 8):
            raise ValueError(f"scale must be 2, 3, 4 or 8, got {self.scale!r}")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must be groups of at least one block, got {self.depths!r}")
        if self.channels % self.heads != 0:
            raise ValueError(f"channels must be a multiple of heads={self.heads}, got {self.channels}")
        if self.window % 2 != 0:
            raise ValueError(f"window must be even (blocks shift by half of it), got {self.window}")
        if self.key_window < self.window or (self.key_window - self.window) % 2 != 0:
            raise ValueError(
                f"overlap must make window·(1 + overlap) exceed window={self.window} by an even number of pixels "
                f">= 0, got overlap={self.overlap!r}"
            )
        if min(self.channels // self.cab_compress, self.channels // self.cab_squeeze) < 1:
            raise ValueError(
                f"cab_compress and cab_squeeze must be at most channels={self.channels}, "
                f"got {self.cab_compress} and {self.cab_squeeze}"
            )
        if self.cab_neighbourhood != 0 and (self.cab_neighbourhood < 0 or self.cab_neighbourhood % 2 == 0):
            raise ValueError(
                f"cab_neighbourhood must be an odd number of windows, or 0 for the whole image, "
                f"got {self.cab_neighbourhood!r}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must satisfy 0 <= drop_path < 1, got {self.drop_path!r}")
        if len(self.rgb_mean) != 3:
            raise ValueError(f"rgb_mean must have three values, got {self.rgb_mean!r}")
        if min(self.estimator_dilations, default=1) < 1:
            raise ValueError(f"estimator_dilations must be at least 1, got {self.estimator_dilations!r}")
        if self.receptive_field > 41:
            raise ValueError(
                f"estimator_dilations must keep the receptive field within 41 pixels (the field is local), "
                f"got {self.estimator_dilations!r} which sees {self.receptive_field}"
            )
        if self.restoration_strength and self.degradation_code == "none":
            raise ValueError(
                "restoration_strength needs a degradation field, which degradation_code='none' does not have; "
                "set degradation_code to 'variational' or 'deterministic', or restoration_strength to False"
            )
        if self.decoder_depth < 2:
            raise ValueError(f"decoder_depth must be at least 2, got {self.decoder_depth!r}")

    @property
    def key_window(self) -> int:
        """Side of OCAB's key windows in pixels."""
        # Rounding first: an overlap computed as pixels / window may come back as 14.999999999999998 pixels.
        return self.window + int(round(self.overlap * self.window, 6))

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the neighbourhood from which the field at one pixel is inferred."""
        return 3 + 2 * sum(self.estimator_dilations) + (4 if self.estimator_high_pass else 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types, ready for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAVLConfig:
        """Build a configuration from plain types (JSON, TOML).

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A name is not a setting, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; a SAVLConfig has {sorted(known)}")
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)


CONFIGS: dict[str, SAVLConfig] = {
    "savl-base": SAVLConfig(cab_neighbourhood=5),
    "savl-tiny": SAVLConfig(
        channels=48,
        depths=(3, 3),
        heads=2,
        window=8,
        cab_compress=4,
        cab_squeeze=8,
        cab_scale=0.1,
        cab_neighbourhood=5,
        drop_path=0.0,
        upsampler="pixelshuffledirect",
        image_residual=True,
        modulation_shift=True,
        restoration_strength=True,
        estimator_width=24,
        estimator_dilations=(1, 2, 4, 4, 2, 1),
        decoder_width=32,
        decoder_depth=3,
    ),
    "hat-s": SAVLConfig(degradation_code="none"),
    "hat": SAVLConfig(channels=180, cab_compress=3, cab_squeeze=30, degradation_code="none"),
    "hat-l": SAVLConfig(channels=180, depths=(6,) * 12, cab_compress=3, cab_squeeze=30, degradation_code="none"),
}
"""Configurations by name. Those of HAT are the published architectures; Real_HAT_GAN has that of ``hat``."""
