"""The light degradation: bicubic, noise, JPEG."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from savl.degradation import LightDegradation, bicubic_downsample

NONE = LightDegradation(noise_probability=0, jpeg_probability=0)


def test_bicubic_downsample_agrees_with_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
    x = torch.from_numpy(pixels).float()[None, None].expand(1, 3, -1, -1) / 255
    expected = Image.fromarray(pixels.astype(np.float32)).resize((12, 16), Image.Resampling.BICUBIC)
    ours = bicubic_downsample(x, 4)[0, 0].numpy() * 255
    np.testing.assert_allclose(ours, np.clip(np.asarray(expected), 0, 255), atol=1e-2)


def test_without_noise_and_jpeg_only_rounding_is_left() -> None:
    z = torch.rand(2, 3, 16, 16)
    y = NONE(z, np.random.default_rng(0))
    assert torch.equal(y * 255, (y * 255).round())
    assert (y - z).abs().max() <= 0.5 / 255 + 1e-6


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    noisy = LightDegradation(noise_probability=1, noise_sigma=(5, 5), jpeg_probability=0)
    z = torch.full((1, 3, 128, 128), 0.5)
    assert (noisy(z, np.random.default_rng(0)) - z).std().item() * 255 == pytest.approx(5, rel=0.05)


def test_jpeg_loses_more_at_low_quality() -> None:
    z = torch.rand(4, 3, 32, 32)

    def loss(quality: int) -> float:
        jpeg = LightDegradation(noise_probability=0, jpeg_probability=1, jpeg_quality=(quality, quality))
        return (jpeg(z, np.random.default_rng(0)) - z).abs().mean().item()

    assert loss(30) > loss(70) > loss(98) > 0


def test_probabilities_are_kept_over_many_images() -> None:
    z = torch.full((400, 3, 8, 8), 128 / 255)
    noisy = LightDegradation(noise_probability=0.3, noise_sigma=(6, 6), jpeg_probability=0)
    changed = (noisy(z, np.random.default_rng(0)) != z).flatten(1).any(dim=1).float().mean().item()
    assert changed == pytest.approx(0.3, abs=0.07)  # three standard deviations of 400 draws


@pytest.mark.parametrize(
    ("setting", "value"),
    [("noise_probability", 1.5), ("jpeg_probability", -0.1), ("noise_sigma", (3, 1)), ("jpeg_quality", (0, 50))],
)
def test_settings_out_of_range_are_named(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        LightDegradation(**{setting: value})  # type: ignore[arg-type]
