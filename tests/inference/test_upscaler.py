"""The upscaler: tiles, severity of the whole image, flat areas, and running out of memory."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import savl
from savl.inference.tiling import CPU_BUDGET, PAGED_CPU_BUDGET, bytes_per_pixel, default_tile
from savl.inference.upscaler import FLAT_RADIUS, restore_flat_areas
from savl.network import CONFIGS, SAVL, DegradationField, SAVLConfig
from savl.out_of_memory import is_out_of_memory

CONFIG = SAVLConfig(
    channels=12,
    depths=(1,),
    heads=2,
    window=4,
    cab_compress=3,
    cab_squeeze=3,
    upsampler="pixelshuffledirect",
    latent=6,
    estimator_width=8,
    estimator_dilations=(1, 2),
)


def make_model(config: SAVLConfig = CONFIG) -> SAVL:
    """Build a network with all parameters away from zero, so that none of its parts is trivial."""
    torch.manual_seed(3)
    model = SAVL(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if model.estimator is not None:
            model.estimator.head.weight.mul_(8)  # variances that differ over the image
    return model.eval()


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.fixture(scope="module")
def model() -> SAVL:
    return make_model()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 45, 71, generator=torch.Generator().manual_seed(0))


def test_untiled_is_the_network_itself(model: SAVL, image: Tensor) -> None:
    out = savl.Upscaler(model, tile=0)(image)
    with torch.no_grad():
        sr, field = model(image, return_field=True)
    assert field is not None
    assert field.severity is not None
    torch.testing.assert_close(out.sr, sr.clamp(0, 1))
    torch.testing.assert_close(out.severity, field.severity)


@pytest.mark.parametrize(("tile", "tile_pad"), [(16, 8), (17, 9), (24, 16), (32, 8)])
def test_tiled_equals_untiled_to_50_db_and_leaves_no_seam(model: SAVL, image: Tensor, tile: int, tile_pad: int) -> None:
    untiled = savl.Upscaler(model, tile=0)(image).sr
    tiled = savl.Upscaler(model, tile=tile, tile_pad=tile_pad)(image).sr
    assert psnr(tiled, untiled) >= 50
    # A seam would be a step in the difference image; all steps must be far below one 8-bit level.
    difference = tiled - untiled
    assert difference.diff(dim=-1).abs().max() < 1 / 255
    assert difference.diff(dim=-2).abs().max() < 1 / 255


def test_shipped_network_tiled_equals_untiled_to_half_a_level() -> None:
    model = savl.load("savl-tiny")
    y, x = torch.meshgrid(torch.linspace(0, 9, 150), torch.linspace(0, 14, 200), indexing="ij")
    rings = torch.stack((torch.sin(x * y), torch.cos(x + y * y), torch.sin(3 * x))) * 0.4 + 0.5
    image = (rings + 0.03 * torch.randn(3, 150, 200, generator=torch.Generator().manual_seed(1))).clamp(0, 1)[None]
    untiled = savl.Upscaler(model, tile=0)(image).sr
    tiled = savl.Upscaler(model, tile=64)(image).sr
    assert (tiled - untiled).abs().max() < 0.5 / 255, "a tile must not be seen in 8 bits"


@pytest.mark.parametrize("tile", [4, 16, 40])
def test_severity_does_not_depend_on_the_tiles(model: SAVL, image: Tensor, tile: int) -> None:
    whole = savl.Upscaler(model, tile=0)(image).severity
    tiled = savl.Upscaler(model, tile=tile)(image).severity
    assert whole.std() > 0.01, "a constant map would prove nothing"
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)


def test_every_tile_receives_the_field_and_severity_of_the_whole_image(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.estimate(image)
    assert expected is not None
    assert expected.severity is not None
    seen: list[DegradationField] = []
    original = SAVL.reconstruct

    def spy(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        assert field is not None
        seen.append(field)
        return original(self, lr, field)

    monkeypatch.setattr(SAVL, "reconstruct", spy)
    savl.Upscaler(model, tile=16, tile_pad=8)(image)
    assert len(seen) == 3 * 5
    # The first tile begins at the corner of the image.
    first = seen[0]
    assert first.severity is not None
    height, width = first.mu.shape[-2:]
    torch.testing.assert_close(first.mu, expected.mu[..., :height, :width], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.severity, expected.severity[..., :height, :width], atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), tile=st.integers(1, 30), tile_pad=st.integers(0, 9))
def test_any_size_and_any_tile_gives_an_image_of_four_times_the_size(
    height: int, width: int, tile: int, tile_pad: int
) -> None:
    out = savl.Upscaler(make_model(), tile=tile, tile_pad=tile_pad)(torch.rand(1, 3, height, width))
    assert out.sr.shape == (1, 3, 4 * height, 4 * width)
    assert out.severity.shape == (1, height, width)
    assert bool(torch.isfinite(out.sr).all())


def test_progress_counts_every_tile_once(model: SAVL, image: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    savl.Upscaler(model, tile=16)(image, on_tile=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 15) for n in range(1, 16)]


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_tile_and_redoes_it(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    untiled = savl.Upscaler(model, tile=0)(image).sr
    original = SAVL.reconstruct
    largest = 40 * 40
    refused: list[int] = []

    def small_machine(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        if lr.shape[-1] * lr.shape[-2] > largest:
            refused.append(lr.shape[-1] * lr.shape[-2])
            raise failure
        return original(self, lr, field)

    monkeypatch.setattr(SAVL, "reconstruct", small_machine)
    out = savl.Upscaler(model, tile=40, tile_pad=8)(image)
    assert refused, "the tile was never too large, the test proves nothing"
    assert len(refused) <= 2, "a size known to fail was tried again"
    assert psnr(out.sr, untiled) >= 50


def test_out_of_memory_in_the_estimator_measures_smaller_parts(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = savl.Upscaler(model, tile=0)(image).severity
    original = SAVL.estimate

    def small_machine(self: SAVL, lr: Tensor, seed: int | None = None) -> DegradationField | None:
        if lr.shape[-1] * lr.shape[-2] > 2000:
            raise MemoryError
        return original(self, lr, seed)

    monkeypatch.setattr(SAVL, "estimate", small_machine)
    torch.testing.assert_close(savl.Upscaler(model, tile=24, tile_pad=4)(image).severity, expected, atol=1e-4, rtol=0)


def test_memory_too_small_for_any_tile_is_an_error_with_advice(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(SAVL, "reconstruct", refuse)
    with pytest.raises(RuntimeError, match="out of memory even for a tile of 4 LR pixels"):
        savl.Upscaler(model)(image)


def test_other_errors_are_not_treated_as_out_of_memory(
    model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(SAVL, "reconstruct", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        savl.Upscaler(model, tile=16)(image)
    assert not is_out_of_memory(RuntimeError("a bug"))


@pytest.mark.parametrize("code", ["deterministic", "none"])
def test_networks_without_variances_report_severity_one(code: str, image: Tensor) -> None:
    config = SAVLConfig.from_dict({**CONFIG.to_dict(), "degradation_code": code})
    out = savl.Upscaler(make_model(config), tile=24)(image)
    assert torch.equal(out.severity, torch.ones(1, 45, 71))


def test_bfloat16_stays_close_to_float32(model: SAVL, image: Tensor) -> None:
    wide = savl.Upscaler(model)(image).sr
    narrow = savl.Upscaler(model, dtype=torch.bfloat16)(image)
    assert narrow.sr.dtype == torch.float32
    assert psnr(narrow.sr, wide) > 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": -1}, "tile must be >= 0"),
        ({"tile_pad": -1}, "tile_pad must be >= 0"),
        ({"tile": 1.5}, "tile must be an int .* got float 1.5"),
        ({"tile_pad": "32"}, "tile_pad must be an int .* got str '32'"),
        ({"dtype": torch.float16}, "overflow in float16"),
        ({"dtype": torch.int8}, "dtype must be"),
    ],
)
def test_bad_settings_are_reported(model: SAVL, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        savl.Upscaler(model, **arguments)  # type: ignore[arg-type]


def test_an_object_that_is_not_a_network_is_refused_by_its_type() -> None:
    with pytest.raises(TypeError, match=r"model must be a savl.SAVL or another network .* got str"):
        savl.Upscaler("savl-tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kept", [False, True])
def test_default_tile_fits_its_budget(batch: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.inference.process_settings._keeps_freed_memory", kept)
    budget = CPU_BUDGET if kept else PAGED_CPU_BUDGET
    for config in CONFIGS.values():
        side = default_tile(bytes_per_pixel(config), config.window, torch.device("cpu"), batch)
        assert side % config.window == 0
        assert side >= 4 * config.window
        assert side == 4 * config.window or batch * side**2 * bytes_per_pixel(config) <= budget


def test_the_given_network_is_not_modified(image: Tensor) -> None:
    model = make_model().double().train()
    out = savl.Upscaler(model)(image)
    assert model.training
    assert model.conv_first.weight.dtype == torch.float64
    torch.testing.assert_close(out.sr, savl.Upscaler(make_model())(image).sr)


def test_threads_may_share_an_upscaler(model: SAVL, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = savl.Upscaler(model, tile=24, tile_pad=4)
    original = SAVL.reconstruct

    def refuse_large_tiles(self: SAVL, lr: Tensor, field: DegradationField | None) -> Tensor:
        if lr.shape[-1] > 24:
            raise MemoryError
        return original(self, lr, field)

    monkeypatch.setattr(SAVL, "reconstruct", refuse_large_tiles)
    expected = upscaler(image).sr
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(upscaler, [image] * 8):
            torch.testing.assert_close(out.sr, expected)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "Invalid buffer size: 12.00 GiB",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_every_out_of_memory_message_is_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


def test_a_flat_area_gets_its_exact_colour_and_the_rest_is_left_alone() -> None:
    lr = torch.rand(2, 3, 20, 24)
    lr[1, :, :, 10:] = torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    sr = torch.rand(2, 3, 80, 96)
    before = sr.clone()
    restore_flat_areas(sr, lr)
    first = 10 + FLAT_RADIUS  # the first column whose whole neighbourhood is flat
    assert torch.equal(sr[0], before[0])
    assert torch.equal(sr[1, ..., : 4 * first], before[1, ..., : 4 * first])
    assert torch.equal(sr[1, ..., 4 * first :], lr[1, ..., first:].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("value", [0, 1, 77, 128, 254, 255])
def test_the_shipped_network_keeps_a_flat_picture_exactly(value: int) -> None:
    picture = np.full((21, 30, 3), (value, 255 - value, value // 2), np.uint8)
    out = savl.upscale(picture)
    assert np.array_equal(out, np.broadcast_to(picture[0, 0], (84, 120, 3)))


def test_the_shipped_network_keeps_white_paper_white_around_a_drawing() -> None:
    picture = np.full((48, 48, 3), 255, np.uint8)
    picture[20:28, 20:28] = (200, 30, 40)
    out = savl.upscale(picture)
    paper = np.ones(out.shape[:2], bool)
    paper[4 * 15 : 4 * 33, 4 * 15 : 4 * 33] = False
    assert (out[paper] == 255).all()
    assert out[4 * 22 : 4 * 26, 4 * 22 : 4 * 26].reshape(-1, 3).mean(axis=0) == pytest.approx((200, 30, 40), abs=6)
