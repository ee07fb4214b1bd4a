"""The camera recipe: blur, sampling, sharpening and noise of both images, and what is drawn for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig
from savl.degradation.config import CameraConfig, JpegConfig, SpatialConfig, load_degradation_config
from savl.degradation.pipeline import UNSHARP_SIGMA, Degraded, _photograph
from savl.degradation.recipe import Camera, draw_recipe

PLAIN = CameraConfig(probability=1.0, sigma=(0.6, 0.6), sharpening=(0.0, 0.0), axis_ratio=(1.0, 1.0), noise=(0.0, 0.0))
SIDE = 128


def degrade(x: Tensor, camera: CameraConfig = PLAIN, seed: int = 0, scale: int = 4) -> Degraded:
    return Degradation(DegradationConfig(camera=camera), scale)(x, seed)


def grating(periods: int, across: bool = False) -> Tensor:
    """``(1, 3, SIDE, SIDE)`` in [0, 1]: a cosine of so many periods, along x or along y."""
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * periods * torch.arange(SIDE) / SIDE)
    image = wave.expand(1, 3, SIDE, SIDE)
    return (image.transpose(2, 3) if across else image).contiguous()


def contrast(image: Tensor, periods: int, across: bool = False) -> float:
    """Return the amplitude of a cosine, divided by that of `grating`."""
    line = image[0, 0].mean(dim=1 if across else 0)
    return (torch.fft.rfft(line)[periods].abs() / len(line) * 2 / 0.4).item()


def deviation(image: Tensor) -> float:
    """Return the standard deviation of a point's image along one axis, in its pixels."""
    line = image[0, 0].double().sum(dim=0)
    position = torch.arange(len(line))
    mean = (line * position).sum() / line.sum()
    return ((line * (position - mean).square()).sum() / line.sum()).sqrt().item()


@pytest.mark.parametrize("pitch", [1, 2, 4])
def test_a_point_is_blurred_by_the_deviation_in_pixels_of_the_camera(pitch: int) -> None:
    x = torch.zeros(1, 3, 96, 96)
    x[:, :, 48, 48] = 1.0
    image = _photograph(x, [Camera((0.8, 0.8), 0.0, 0.0)], pitch)
    assert image.shape == (1, 3, 96 // pitch, 96 // pitch)
    assert deviation(image) == pytest.approx(0.8, rel=0.03)
    assert image[0, 0].sum().item() == pytest.approx(1 / pitch**2, rel=0.01)


@pytest.mark.parametrize("sigma", [0.5, 0.6, 0.9])
def test_both_images_have_the_same_blur_in_pixels_of_their_own(sigma: float) -> None:
    camera = replace(PLAIN, sigma=(sigma, sigma))
    for v in (0.125, 0.25, 0.375):
        for width in (SIDE, SIDE // 4):
            periods = round(v * width)
            degraded = degrade(grating(periods), camera)
            image = degraded.x if width == SIDE else degraded.y
            found = math.sqrt(-math.log(contrast(image, periods)) / 2) / (math.pi * v)
            assert found == pytest.approx(sigma, rel=0.03)


def test_sharpening_multiplies_the_contrast_of_both_images() -> None:
    camera = replace(PLAIN, sharpening=(1.0, 1.0))
    plain, sharp = degrade(grating(6)), degrade(grating(6), camera)
    for one, other in ((plain.y, sharp.y), (plain.x, sharp.x)):
        v = 6 / one.shape[-1]
        factor = 2 - math.exp(-2 * (math.pi * UNSHARP_SIGMA * v) ** 2)
        assert contrast(other, 6) / contrast(one, 6) == pytest.approx(factor, rel=0.02)


def test_the_axes_have_the_given_ratio() -> None:
    image = _photograph(grating(24), [Camera((1.2, 0.8), 0.0, 0.0)], 1)
    turned = _photograph(grating(24, across=True), [Camera((1.2, 0.8), 0.0, 0.0)], 1)
    ratio = math.log(contrast(turned, 24, across=True)) / math.log(contrast(image, 24))
    assert math.sqrt(ratio) == pytest.approx(0.8 / 1.2, rel=0.01)
    swapped = _photograph(grating(24, across=True), [Camera((1.2, 0.8), math.pi / 2, 0.0)], 1)
    assert contrast(swapped, 24, across=True) == pytest.approx(contrast(image, 24), rel=0.01)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_resolution_pixels_lie_at_the_centres_of_their_blocks(scale: int) -> None:
    side = 24 * scale
    ramp = (torch.arange(side) / (2 * side) + 0.25).expand(1, 3, side, side).contiguous()
    y = degrade(ramp, scale=scale).y
    centres = torch.nn.functional.avg_pool2d(ramp, scale)
    inner = slice(4, -4)
    assert (y - centres)[..., inner].abs().max() <= 0.5 / 255 + 1e-4


def test_a_uniform_image_stays_as_it_is() -> None:
    x = torch.full((1, 3, 32, 32), 100 / 255)
    degraded = degrade(x, replace(PLAIN, sharpening=(2.0, 2.0)))
    assert torch.equal(degraded.x, x)
    assert torch.equal(degraded.y, x[..., :8, :8])


def test_noise_and_jpeg_affect_the_low_resolution_image_only() -> None:
    x = torch.full((1, 3, 512, 512), 128 / 255)
    noisy = degrade(x, replace(PLAIN, noise=(3.0, 3.0)))
    assert (255 * noisy.y).std().item() == pytest.approx(math.sqrt(9 + 1 / 12), rel=0.03)
    assert noisy.x.std() == 0
    compressed = degrade(grating(8), replace(PLAIN, jpeg=JpegConfig(1.0, (30.0, 30.0))))
    assert compressed.recipe.quality == (30.0,)
    plain = degrade(grating(8))
    assert not torch.equal(compressed.y, plain.y)
    assert torch.equal(compressed.x, plain.x)


def test_images_and_targets_have_8_bits_and_the_whole_recipe_reaches_every_pixel(photo: Tensor) -> None:
    degraded = degrade(photo[:, :, :64, :96], CameraConfig(probability=1.0))
    assert degraded.y.shape == (1, 3, 16, 24)
    assert degraded.x.shape == (1, 3, 64, 96)
    for image in (degraded.y, degraded.x):
        assert torch.equal(image, (image * 255).round() / 255)
        assert image.min() >= 0
        assert image.max() <= 1
    assert torch.equal(degraded.degradation_mask, torch.ones(1, 16, 24))


def test_the_target_is_the_input_without_soft_target_and_for_other_recipes(photo: Tensor) -> None:
    x = photo[:, :, :64, :64]
    assert degrade(x, replace(PLAIN, soft_target=False)).x is x
    assert Degradation(DegradationConfig())(x, 0).x is x
    assert not torch.equal(degrade(x).x, x)
    assert torch.equal(degrade(x).y, degrade(x, replace(PLAIN, soft_target=False)).y)


def test_equal_seeds_give_equal_images_and_images_of_one_recipe_share_the_camera(photo: Tensor) -> None:
    degradation = Degradation(DegradationConfig(camera=CameraConfig(probability=1.0)))
    x = photo[:, :, :64, :64].repeat(4, 1, 1, 1)
    first, again = degradation(x, 3, images_per_recipe=2), degradation(x, 3, images_per_recipe=2)
    assert first.recipe == again.recipe
    assert torch.equal(first.y, again.y)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.x[0], first.x[1])
    assert not torch.equal(first.x[0], first.x[2])
    assert not torch.equal(first.y[0], first.y[1]), "different noise"
    assert not torch.equal(first.y, degradation(x, 4, images_per_recipe=2).y)


@pytest.mark.parametrize("single", [0.0, 0.5])
def test_recipes_stay_as_they_are_at_probability_0(single: float) -> None:
    before = DegradationConfig(single_operation=single, spatial=SpatialConfig(probability=0.5))
    after = replace(before, camera=CameraConfig(sigma=(1.0, 2.0)))
    for seed in range(20):
        recipes = [draw_recipe(config, 3, np.random.default_rng(seed)) for config in (before, after)]
        assert recipes[0] == recipes[1]
        assert recipes[0].camera is None


def test_a_group_is_photographed_with_the_given_probability() -> None:
    config = DegradationConfig(camera=CameraConfig(probability=0.3), single_operation=0.5)
    recipes = [draw_recipe(config, 2, np.random.default_rng(seed)) for seed in range(400)]
    photographed = [recipe for recipe in recipes if recipe.camera is not None]
    assert len(photographed) / 400 == pytest.approx(0.3, abs=0.07)
    assert not any(recipe.single for recipe in photographed)
    others = [recipe for recipe in recipes if recipe.camera is None]
    assert sum(recipe.single for recipe in others) / len(others) == pytest.approx(0.5, abs=0.1)


def test_the_parameters_are_drawn_from_their_ranges_and_sharpening_rises_with_blur() -> None:
    config = CameraConfig(probability=1.0, jpeg=JpegConfig(0.5, (80.0, 98.0)))
    recipe = draw_recipe(DegradationConfig(camera=config), 500, np.random.default_rng(0))
    assert recipe.camera is not None
    assert recipe.second is not None
    sigma = np.array([math.sqrt(math.prod(camera.sigma)) for camera in recipe.camera])
    ratio = np.array([min(camera.sigma) / max(camera.sigma) for camera in recipe.camera])
    amount = np.array([camera.sharpening for camera in recipe.camera])
    noise = np.array([each.amount for each in recipe.second.noise if each is not None])
    for values, (low, high) in (
        (sigma, config.sigma),
        (ratio, config.axis_ratio),
        (amount, config.sharpening),
        (noise, config.noise),
        (np.array([quality for quality in recipe.quality if quality is not None]), config.jpeg.quality),
    ):
        assert low - 1e-9 <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-9
    assert np.allclose((sigma - 0.57) / 0.21, amount / 2.4)
    assert 0.4 < sum(quality is None for quality in recipe.quality) / 500 < 0.6


@pytest.mark.parametrize("size", [(4, 4), (4, 40), (8, 8)])
def test_tiny_images_work(size: tuple[int, int]) -> None:
    degraded = degrade(torch.rand(2, 3, *size), CameraConfig(probability=1.0))
    assert degraded.y.shape == (2, 3, size[0] // 4, size[1] // 4)
    assert torch.isfinite(degraded.y).all()
    assert torch.isfinite(degraded.x).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 1.5}, r"camera.probability must lie in \[0, 1\], got 1.5"),
        ({"sigma": (-0.1, 1.0)}, r"camera.sigma must not be negative, got \(-0.1, 1.0\)"),
        ({"sharpening": (2.0, 1.0)}, r"camera.sharpening must be \(low, high\) with low <= high"),
        ({"noise": (-1.0, 1.0)}, "camera.noise must not be negative"),
        ({"axis_ratio": (0.0, 1.0)}, r"camera.axis_ratio must lie in \(0, 1\]"),
        ({"axis_ratio": (0.5, 1.5)}, r"camera.axis_ratio must lie in \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CameraConfig(**settings)  # type: ignore[arg-type]


def test_the_table_of_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "camera.toml"
    path.write_text(
        "[degradation.camera]\nprobability = 0.5\nsigma = [0.4, 0.5]\nsoft_target = false\n"
        "[degradation.camera.jpeg]\nprobability = 0.2\n"
    )
    camera = load_degradation_config(path).camera
    assert camera == CameraConfig(
        probability=0.5, sigma=(0.4, 0.5), soft_target=False, jpeg=JpegConfig(0.2, (80.0, 98.0))
    )


def test_blur_and_noise_are_known_amounts_and_jpeg_is_not() -> None:
    recipe = draw_recipe(DegradationConfig(camera=CameraConfig(probability=1.0)), 3, np.random.default_rng(0))
    assert recipe.camera is not None
    assert recipe.second is not None
    for amounts, camera, noise in zip(recipe.amounts(), recipe.camera, recipe.second.noise, strict=True):
        assert noise is not None
        assert amounts[:2] == pytest.approx([math.sqrt(math.prod(camera.sigma)), noise.amount])
        assert math.isnan(amounts[2])
