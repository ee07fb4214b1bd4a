"""The pipeline: what each operation does to images, and what holds for the whole."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import pyvips
import torch
import torch.nn.functional as F
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig, DegradationUnavailable
from savl.degradation.blur_kernels import GaussianBlurKernel, SincBlurKernel
from savl.degradation.config import ResizeConfig, SpatialConfig, StageConfig
from savl.degradation.masks import draw_mask
from savl.degradation.recipe import Noise, draw_recipe

Apply = Callable[..., Tensor]

SPATIAL = DegradationConfig(spatial=SpatialConfig(probability=1.0))
KEEP = ResizeConfig(0.0, 0.0, 1.0)


def flat(*levels: float, side: int = 128) -> Tensor:
    """Bands of equal width, gray of these levels, from left to right."""
    bands = torch.tensor(levels).repeat_interleave(side // len(levels))
    return bands.expand(1, 3, side, side).contiguous()


def bands(x: Tensor, count: int) -> list[Tensor]:
    return list(x.chunk(count, dim=-1))


def psnr(one: Tensor, other: Tensor) -> float:
    return -10 * math.log10((one - other).square().mean().item())


@pytest.mark.parametrize("config", [DegradationConfig(), SPATIAL], ids=["uniform", "spatial"])
def test_results_are_low_resolution_8_bit_images_with_their_mask(photo: Tensor, config: DegradationConfig) -> None:
    x = torch.cat([photo[:, :, :64, :96], photo[:, :, 100:164, 100:196]])
    for seed in range(5):
        degraded = Degradation(config)(x, seed)
        assert degraded.y.shape == (2, 3, 16, 24)
        assert degraded.degradation_mask.shape == (2, 16, 24)
        assert degraded.y.dtype == degraded.degradation_mask.dtype == torch.float32
        for values in (degraded.y, degraded.degradation_mask):
            assert values.min() >= 0
            assert values.max() <= 1
        assert torch.equal(degraded.y, (degraded.y * 255).round() / 255)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_other_scales_give_other_sizes(photo: Tensor, scale: int) -> None:
    degraded = Degradation(DegradationConfig(), scale)(photo[:, :, :48, :60], 0)
    assert degraded.y.shape == (1, 3, 48 // scale, 60 // scale)


def test_equal_seeds_give_equal_images_and_different_seeds_different_ones(photo: Tensor) -> None:
    degradation, x = Degradation(SPATIAL), photo[:, :, :64, :64]
    first = degradation(x, (3, 4))
    again = Degradation(SPATIAL)(x, (3, 4))
    assert first.recipe == again.recipe
    assert torch.equal(first.y, again.y)
    assert torch.equal(first.degradation_mask, again.degradation_mask)
    for seed in (3, (4, 3)):
        other = degradation(x, seed)
        assert not torch.equal(first.y, other.y)
        assert not torch.equal(first.degradation_mask, other.degradation_mask)


@pytest.mark.parametrize("config", [DegradationConfig(), SPATIAL], ids=["uniform", "spatial"])
def test_images_of_one_recipe_share_all_but_the_noise(photo: Tensor, config: DegradationConfig) -> None:
    x = photo[:, :, :64, :64].repeat(6, 1, 1, 1)
    noisy = 0
    for seed in range(8):
        degraded = Degradation(config)(x, seed, images_per_recipe=3)
        assert degraded.recipe == draw_recipe(config, 2, np.random.default_rng(seed)).repeated(3)
        severity = degraded.degradation_mask.unflatten(0, (2, 3))
        assert torch.equal(severity, severity[:, :1].expand_as(severity))
        for first, second, _ in degraded.y.unflatten(0, (2, 3)):
            noisy += not torch.equal(first, second)
    assert noisy > 8


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (2, "x must hold a multiple of images_per_recipe=2 images, got 3"),
        (0, "images_per_recipe must be an integer of at least 1, got 0"),
        (3.0, "images_per_recipe must be an integer of at least 1, got 3.0"),
        (True, "images_per_recipe must be an integer of at least 1, got True"),
    ],
)
def test_images_per_recipe_must_divide_the_number_of_images(photo: Tensor, count: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degradation(DegradationConfig())(photo[:, :, :64, :64].repeat(3, 1, 1, 1), 0, images_per_recipe=count)  # type: ignore[arg-type]


def test_global_random_states_are_neither_read_nor_changed(photo: Tensor) -> None:
    degradation, x = Degradation(SPATIAL), photo[:, :, :64, :64]
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1]
        results.append(degradation(x, 0).y)
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
    assert torch.equal(*results)


def test_the_input_is_not_modified(photo: Tensor) -> None:
    x = photo[:, :, :64, :64].clone()
    before = x.clone()
    for seed in range(5):
        Degradation(DegradationConfig(strength=(0.0, 1.0)))(x, seed)
    assert torch.equal(x, before)


@pytest.mark.parametrize("sigma", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_the_deviation_of_the_recipe(alone: Apply, sigma: float, gray: bool) -> None:
    x = flat(128 / 255, side=256)
    added = 255 * (alone(x, noise=Noise("gaussian", sigma, gray)) - x)
    rounding = 1 / 12  # variance of rounding to whole levels
    assert added.std().item() == pytest.approx(math.sqrt(sigma**2 + rounding), rel=0.02)
    assert abs(added.mean().item()) < 5 * sigma / 256
    neighbours = (added[..., 1:] * added[..., :-1]).mean() / added.square().mean()
    assert abs(neighbours.item()) < 0.02


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_gray_noise_is_equal_across_channels_and_other_noise_independent(alone: Apply, kind: str) -> None:
    levels = torch.tensor([0.3, 0.5, 0.6]).view(1, 3, 1, 1)
    x = ((levels + 0.2 * torch.rand(1, 1, 128, 128)) * 255).round() / 255
    amount = 8.0 if kind == "gaussian" else 0.5
    shared, own = (255 * (alone(x, noise=Noise(kind, amount, gray)) - x)[0] for gray in (True, False))
    assert shared.std() > 2
    assert (shared - shared[:1]).abs().max() <= 1 + 1e-3, "rounded apart at most"
    correlation = torch.corrcoef(own.flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.04


def test_shot_noise_grows_in_variance_with_brightness(alone: Apply) -> None:
    levels = [round(255 * level) / 255 for level in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6)]
    x = flat(*levels, side=256)
    amount = 8 * 6 / 255  # a photon more is 6 levels more, which rounding does not change
    added = alone(x, noise=Noise("poisson", amount, False)) - x
    for level, band in zip(levels, bands(added, 8), strict=True):
        # Eight levels: eight photons at full brightness.
        assert band.var().item() == pytest.approx(amount**2 * level / 8, rel=0.05)
        assert abs(band.mean().item()) < 0.003


def test_shot_noise_of_an_image_with_all_levels_counts_256_photons(alone: Apply) -> None:
    x = (torch.arange(256.0) / 255).expand(1, 3, 200, 256).contiguous()
    added = (alone(x, noise=Noise("poisson", 1.0, False)) - x)[..., 100:150]
    assert added.var().item() == pytest.approx(125 / 255 / 256, rel=0.05)


def test_a_black_image_has_no_shot_noise(alone: Apply) -> None:
    assert torch.count_nonzero(alone(flat(0.0), noise=Noise("poisson", 3.0, False))) == 0


def test_a_blur_is_the_convolution_with_its_kernel(alone: Apply) -> None:
    x = torch.zeros(1, 3, 41, 51)
    x[:, :, 20, 25] = 1.0
    kernel = GaussianBlurKernel("aniso", 21, (2.0, 0.8), 0.4, 1.0)
    y = alone(x, blur=kernel)[0, :, 10:31, 15:36]
    assert (y - kernel.values()).abs().max() <= 0.5 / 255 + 1e-6


def test_a_blur_does_not_change_uniform_images_or_borders(alone: Apply) -> None:
    x = flat(100 / 255, side=32)
    for kernel in (GaussianBlurKernel("plateau_iso", 21, (3.0, 3.0), 0.0, 1.0), SincBlurKernel(21, math.pi / 3)):
        assert torch.equal(alone(x, blur=kernel), x)
        assert torch.equal(alone(x[..., :5], blur=kernel), x[..., :5]), "narrower than the kernel"


def test_jpeg_loses_more_at_lower_quality(alone: Apply, photo: Tensor) -> None:
    scores = [psnr(alone(photo, quality=quality), photo) for quality in (95.0, 80.0, 60.0, 45.0, 30.0, 10.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 41
    assert 26 < scores[-1] < 30


@pytest.mark.parametrize("quality", [30, 45, 60, 75, 90, 95])
def test_jpeg_is_close_to_what_libjpeg_makes(alone: Apply, photo: Tensor, quality: int) -> None:
    pixels = (255 * photo[0]).byte().permute(1, 2, 0).contiguous().numpy()
    image = pyvips.Image.new_from_memory(pixels.data, 384, 384, 3, "uchar")
    encoded = image.jpegsave_buffer(Q=quality, subsample_mode="on")
    decoded = torch.from_numpy(pyvips.Image.new_from_buffer(encoded, "").numpy()).permute(2, 0, 1)[None] / 255
    ours = alone(photo, quality=float(quality))
    assert psnr(ours, decoded) > 40
    # Its rounding is soft, and what it loses a little less.
    assert 0 < psnr(ours, photo) - psnr(decoded, photo) < 1.5


def test_the_final_jpeg_comes_before_or_after_the_final_resize(photo: Tensor) -> None:
    orders = set()
    for seed in range(12):
        degradation = Degradation(DegradationConfig())
        sides: list[tuple[int, int]] = []
        compress = degradation._jpeg

        def spy(x: Tensor, quality: Tensor, sides: list[tuple[int, int]] = sides, compress: Apply = compress) -> Tensor:
            sides.append((x.shape[2], x.shape[3]))
            return compress(x, quality)

        degradation._jpeg = spy
        recipe = degradation(photo[:, :, :128, :192], seed).recipe
        assert recipe.first is not None
        assert recipe.second is not None
        first, second = recipe.first.resize.factor, recipe.second.resize.factor
        low = (32, 48)
        after_second = (round(32 * second), round(48 * second))
        assert sides == [(round(128 * first), round(192 * first)), low if recipe.jpeg_last[0] else after_second]
        orders.add(recipe.jpeg_last[0])
    assert orders == {True, False}


@pytest.mark.parametrize("spatial", [0.0, 1.0])
def test_strength_0_only_resizes_with_the_method_of_the_recipe(photo: Tensor, spatial: float) -> None:
    config = DegradationConfig(
        first=StageConfig(resize=KEEP),
        second=StageConfig(resize=KEEP),
        strength=(0.0, 0.0),
        spatial=SpatialConfig(probability=spatial),
    )
    methods = set()
    for seed in range(24):
        degraded = Degradation(config)(photo[:, :, :128, :128], seed)
        assert degraded.recipe.second is not None
        method = degraded.recipe.second.resize.method
        plain = F.interpolate(photo[:, :, :128, :128], size=(32, 32), mode=method).clamp(0, 1)
        assert (degraded.y - plain).abs().max() <= 0.5 / 255 + 1e-5
        assert torch.count_nonzero(degraded.degradation_mask) == 0
        methods.add(method)
    assert methods == {"area", "bilinear", "bicubic"}


def test_a_higher_strength_increases_the_distance_from_the_clean_image(photo: Tensor) -> None:
    x = photo[:, :, :192, :192]
    clean = F.interpolate(x, scale_factor=0.25, mode="area")
    distances = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        degradation = Degradation(DegradationConfig(strength=(strength, strength)))
        distances.append(sum((degradation(x, seed).y - clean).abs().mean().item() for seed in range(8)))
    assert distances == sorted(distances)


def test_the_severity_of_a_uniform_image_is_its_strength(photo: Tensor) -> None:
    x = photo[:, :, :64, :64].expand(3, -1, -1, -1)
    degraded = Degradation(DegradationConfig(strength=(0.2, 0.9)))(x, 0)
    for severity, strength in zip(degraded.degradation_mask, degraded.recipe.strength, strict=True):
        torch.testing.assert_close(severity, torch.full((16, 16), strength))


def test_the_severity_of_a_spatial_image_is_its_strength_times_the_mask(photo: Tensor) -> None:
    config = replace(SPATIAL, strength=(0.2, 0.9), spatial=SpatialConfig(probability=0.5))
    x = photo[:, :, :64, :96].expand(6, -1, -1, -1)
    degraded = Degradation(config)(x, 7)
    assert set(degraded.recipe.spatial) == {True, False}
    random = np.random.default_rng(7)
    recipe = draw_recipe(config, 6, random)
    for index, (spatial, strength) in enumerate(zip(recipe.spatial, recipe.strength, strict=True)):
        mask = draw_mask(config.spatial, 64, 96, random) if spatial else torch.ones(1, 64, 96)
        small = F.avg_pool2d(mask, 4)[0]
        torch.testing.assert_close(degraded.degradation_mask[index], strength * small)


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_noise_follows_the_mask(alone: Apply, kind: str) -> None:
    x = ((110 + torch.arange(240) % 16) / 255).expand(1, 3, 240, 240)  # 16 levels: 16 photons
    mask = flat(0.0, 0.25, 0.5, 0.75, 1.0, side=240)[:, :1]
    noise = Noise(kind, 20.0 if kind == "gaussian" else 0.4, False)
    deviations = [band.std().item() for band in bands(255 * (alone(x, noise=noise, mask=mask) - x), 5)]
    assert deviations[0] < 0.5, "rounding alone"
    for deviation, amount in zip(deviations[1:], (0.25, 0.5, 0.75, 1.0), strict=True):
        assert deviation == pytest.approx(amount * deviations[-1], rel=0.05)


@pytest.mark.parametrize(
    "operation",
    [{"blur": GaussianBlurKernel("iso", 21, (3.0, 3.0), 0.0, 1.0)}, {"quality": 10.0}],
    ids=["blur", "jpeg"],
)
def test_blur_and_jpeg_follow_the_mask(alone: Apply, photo: Tensor, operation: dict[str, object]) -> None:
    mask = flat(0.0, 0.5, 1.0, side=384)[:, :1]
    whole = alone(photo, **operation)
    parts = zip(bands(photo, 3), bands(whole, 3), bands(alone(photo, mask=mask, **operation), 3), strict=True)
    for amount, (before, after, between) in zip((0.0, 0.5, 1.0), parts, strict=True):
        assert (between - torch.lerp(before, after, amount)).abs().max() <= 1.01 / 255


def test_a_mask_of_ones_has_no_effect_and_a_mask_of_zeros_only_resizes(photo: Tensor) -> None:
    x = photo[:, :, :96, :96].expand(4, -1, -1, -1)
    degradation = Degradation(DegradationConfig())
    for seed in range(4):
        recipe = draw_recipe(degradation.config, 4, np.random.default_rng(seed))
        uniform, ones, zeros = (
            degradation.apply(x, recipe, mask, torch.Generator().manual_seed(seed))
            for mask in (None, torch.ones(4, 1, 96, 96), torch.zeros(4, 1, 96, 96))
        )
        assert torch.equal(uniform, ones)
        assert recipe.first is not None
        assert recipe.second is not None
        resized = x
        for side, factor, method in (
            (96, recipe.first.resize.factor, recipe.first.resize.method),
            (24, recipe.second.resize.factor, recipe.second.resize.method),
            (24, 1.0, recipe.method),
        ):
            size = (round(side * factor),) * 2
            if size != resized.shape[2:]:
                resized = F.interpolate(resized, size=size, mode=method)
            resized = resized.clamp(0, 1)
        assert (zeros - resized).abs().max() < 0.03, "but for the overshoot of the resizes"
        assert (zeros - resized).abs().mean() <= 0.5 / 255


def test_each_image_of_a_group_is_degraded_by_its_own_part_of_the_recipe(photo: Tensor) -> None:
    x = photo[:, :, :64, :64].expand(6, -1, -1, -1)
    y = Degradation(DegradationConfig())(x, 0).y
    assert all(not torch.equal(y[one], y[other]) for one in range(6) for other in range(one))


@pytest.mark.parametrize("config", [DegradationConfig(), SPATIAL], ids=["uniform", "spatial"])
@pytest.mark.parametrize("size", [(8, 8), (4, 4), (4, 40)])
def test_tiny_images_work(config: DegradationConfig, size: tuple[int, int]) -> None:
    x = torch.rand(3, 3, *size)
    degradation = Degradation(config)
    for seed in range(15):
        degraded = degradation(x, seed)
        assert degraded.y.shape == (3, 3, size[0] // 4, size[1] // 4)
        assert torch.isfinite(degraded.y).all()
        assert torch.isfinite(degraded.degradation_mask).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 8, 8), r"x must be float32 \(B, 3, H, W\) in \[0, 1\], got torch.float32 \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"got torch.float32 \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8 \(1, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), r"got torch.float64"),
        (torch.zeros(1, 3, 8, 10), r"x must have sides that are multiples of scale=4, got \(1, 3, 8, 10\)"),
        (torch.zeros(1, 3, 7, 8), r"multiples of scale=4, got \(1, 3, 7, 8\)"),
        (torch.zeros(1, 3, 0, 8), r"got \(1, 3, 0, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
    ],
)
def test_other_shapes_and_types_are_refused_with_the_given_value(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degradation(DegradationConfig())(x, 0)


@pytest.mark.parametrize("scale", [0, -4, 2.0, True])
def test_a_scale_that_is_not_a_positive_integer_is_refused(scale: int) -> None:
    with pytest.raises(ValueError, match=f"scale must be an integer of at least 1, got {scale!r}"):
        Degradation(DegradationConfig(), scale)


@pytest.mark.parametrize("module", ["kornia", "kornia.enhance", "kornia.filters"])
def test_without_kornia_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DegradationUnavailable, match=r"needs kornia.*pip install 'savl\[train\]' brings it"):
        Degradation(DegradationConfig())


def test_former_names_still_work_with_a_warning(photo: Tensor) -> None:
    x = photo[:, :, :16, :16].repeat(2, 1, 1, 1)
    with pytest.warns(DeprecationWarning, match="alike is now called images_per_recipe"):
        degraded = Degradation(SPATIAL)(x, 0, alike=2)
    assert torch.equal(degraded.y, Degradation(SPATIAL)(x, 0, images_per_recipe=2).y)
    with pytest.warns(DeprecationWarning, match="severity is now called degradation_mask"):
        assert degraded.severity is degraded.degradation_mask
