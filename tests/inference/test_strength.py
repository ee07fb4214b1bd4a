"""The restoration strength of upscaled images: tiles, numbers by hand, files, and networks that have learned none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import savl
from savl.bicubic import bicubic_upscale
from savl.images.read import read_image
from savl.images.result_mark import read_mark
from savl.inference.enlarge import check_strength
from savl.network import SAVL


@pytest.fixture
def make_model(small_config: Callable[..., Any]) -> Callable[..., SAVL]:
    def make(**changes: Any) -> SAVL:
        """Build a network whose strength differs much from pixel to pixel."""
        torch.manual_seed(3)
        learned = changes.get("degradation_code") != "none"
        settings = {"depths": (1,), "upsampler": "pixelshuffledirect", "restoration_strength": learned} | changes
        model = SAVL(small_config(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            if model.strength is not None:
                model.strength.expand.weight.mul_(8)
                model.strength.contract.weight.mul_(60)
                model.strength.contract.bias.zero_()
        return model.eval()

    return make


@pytest.fixture
def image() -> Tensor:
    """Noise that grows from left to right, so that the field differs."""
    noise = torch.rand(1, 3, 30, 46, generator=torch.Generator().manual_seed(0))
    return 0.5 + (noise - 0.5) * torch.linspace(0.1, 1, 46)


def bicubic(lr: Tensor) -> Tensor:
    return bicubic_upscale(lr, 4).clamp(0, 1)


# Tiles


@pytest.mark.parametrize("code", ["variational", "deterministic"])
def test_untiled_is_the_network_itself(make_model: Callable[..., SAVL], image: Tensor, code: str) -> None:
    model = make_model(degradation_code=code)
    out = savl.Upscaler(model, tile=0)(image)
    with torch.no_grad():
        sr, field = model(image, return_field=True)
    assert field.strength.std() > 0.05, "a constant strength proves little"
    torch.testing.assert_close(out.sr, sr.clamp(0, 1))
    torch.testing.assert_close(out.strength, field.strength)


@pytest.mark.parametrize("strength", ["auto", 0.4])
@pytest.mark.parametrize("tile", [8, 17])
def test_tiles_leave_no_seam(make_model: Callable[..., SAVL], image: Tensor, tile: int, strength: Any) -> None:
    model = make_model()
    untiled = savl.Upscaler(model, tile=0, strength=strength)(image)
    tiled = savl.Upscaler(model, tile=tile, tile_pad=8, strength=strength)(image)
    torch.testing.assert_close(tiled.strength, untiled.strength, rtol=0, atol=1e-5)
    difference = tiled.sr - untiled.sr
    assert difference.diff(dim=-1).abs().max() < 1 / 255
    assert difference.diff(dim=-2).abs().max() < 1 / 255


def test_images_of_a_batch_have_a_strength_each(make_model: Callable[..., SAVL], image: Tensor) -> None:
    upscaler = savl.Upscaler(make_model(), tile=24)
    batch = torch.cat((image, 1 - image, image.flip(3)))
    out = upscaler(batch)
    for index in range(3):
        alone = upscaler(batch[index : index + 1])
        torch.testing.assert_close(out.strength[index], alone.strength[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(out.sr[index], alone.sr[0], rtol=0, atol=1e-5)


def test_the_strength_is_measured_in_parts_if_memory_is_short(
    make_model: Callable[..., SAVL], image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler = savl.Upscaler(make_model(degradation_code="deterministic"), tile=24, tile_pad=4)
    expected, original = upscaler(image).strength, SAVL.estimate

    def small_machine(self: SAVL, lr: Tensor, seed: int | None = None) -> Any:
        if lr.shape[-1] * lr.shape[-2] > 1000:
            raise MemoryError
        return original(self, lr, seed)

    monkeypatch.setattr(SAVL, "estimate", small_machine)
    torch.testing.assert_close(upscaler(image).strength, expected, rtol=0, atol=1e-5)


# By hand


@pytest.mark.parametrize("changes", [{}, {"degradation_code": "none"}, {"image_residual": True}], ids=str)
@pytest.mark.parametrize("tile", [0, 24])
def test_by_hand_the_strength_is_monotone_and_continuous(
    make_model: Callable[..., SAVL], image: Tensor, changes: dict[str, Any], tile: int
) -> None:
    upscaler = savl.Upscaler(make_model(**changes), tile=tile, tile_pad=8)
    numbers = (0.0, 1e-4, 0.25, 0.5, 0.75, 0.9999, 1.0)
    outs = [upscaler(image, strength=number) for number in numbers]
    assert torch.equal(outs[0].sr, bicubic(image))
    for number, out in zip(numbers, outs, strict=True):
        assert torch.equal(out.strength, torch.full((1, 30, 46), number))
        assert torch.equal(out.severity, outs[-1].severity)
    distances = [float((out.sr - outs[0].sr).square().mean()) for out in outs]
    assert distances == sorted(set(distances)), "the distance from bicubic interpolation must grow"
    for near, end in ((outs[1], outs[0]), (outs[-2], outs[-1])):
        assert float((near.sr - end.sr).abs().max()) < 1e-3, "a change of 1e-4 is seen"


def test_1_is_the_full_network_bit_by_bit(make_model: Callable[..., SAVL], image: Tensor) -> None:
    plain = make_model(restoration_strength=False)
    model = make_model()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("strength.")})
    expected = savl.Upscaler(plain, tile=24)(image)
    assert torch.equal(expected.strength, torch.ones(1, 30, 46)), "auto is 1 for a network without a strength"
    assert torch.equal(savl.Upscaler(model, tile=24, strength=1)(image).sr, expected.sr)
    auto = savl.Upscaler(model, tile=24)(image)
    assert not torch.equal(auto.sr, expected.sr)


def test_a_call_overrides_the_strength_of_the_upscaler(make_model: Callable[..., SAVL], image: Tensor) -> None:
    model = make_model()
    by_hand, auto = savl.Upscaler(model, strength=0.3), savl.Upscaler(model)
    assert torch.equal(by_hand(image).sr, auto(image, strength=0.3).sr)
    assert torch.equal(by_hand(image, strength="auto").sr, auto(image).sr)


def test_0_needs_no_tile_and_reports_its_progress(
    make_model: Callable[..., SAVL], image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAVL, "reconstruct", None)
    calls: list[tuple[int, int]] = []
    savl.Upscaler(make_model(), tile=16)(image, strength=0, on_tile=lambda *count: calls.append(count))
    assert calls == [(1, 1)]


@pytest.mark.parametrize("strength", [0, 0.5, "auto"])
def test_flat_areas_keep_their_colour(make_model: Callable[..., SAVL], strength: Any) -> None:
    lr = torch.full((1, 3, 20, 20), 200 / 255)
    assert (savl.Upscaler(make_model(), strength=strength)(lr).sr == 200 / 255).all()


def test_bfloat16_blends_in_float32(make_model: Callable[..., SAVL], image: Tensor) -> None:
    upscaler = savl.Upscaler(make_model(), dtype=torch.bfloat16)
    error = upscaler(image, strength=1e-3).sr - bicubic(image)
    assert error.abs().max() < 5e-3, "bicubic interpolation was rounded to bfloat16"


# Files, arrays and other people's networks


@dataclass
class Nearest:
    """Network behind the small interface."""

    scale: int = 4

    def __call__(self, lr: Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Any:
        @dataclass
        class Result:
            sr: Tensor
            severity: Tensor

        sr = torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest")
        return Result(sr, torch.ones(1, *lr.shape[2:]))


PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)


def test_any_network_blends_with_bicubic_interpolation() -> None:
    lr = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255
    interpolated = bicubic(lr)[0].permute(1, 2, 0).numpy()
    nearest = PIXELS.repeat(4, axis=0).repeat(4, axis=1) / 255
    floating = (PIXELS / 255).astype(np.float32)
    for strength in (0, 0.3, 1):
        out = savl.upscale(floating, model=Nearest(), strength=strength)
        unclipped = (1 - strength) * bicubic_upscale(lr, 4)[0].permute(1, 2, 0).numpy() + strength * nearest
        np.testing.assert_allclose(out, unclipped.clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(savl.upscale(floating, model=Nearest(), strength=0), interpolated, atol=1e-6)
    for strength in (None, "auto"):
        np.testing.assert_allclose(savl.upscale(floating, model=Nearest(), strength=strength), nearest, atol=1e-6)


def test_an_upscaler_keeps_its_strength_unless_another_is_given(make_model: Callable[..., SAVL]) -> None:
    model = make_model()
    half = savl.Upscaler(model, strength=0.5)
    expected = savl.upscale(PIXELS, model=model, strength=0.5)
    np.testing.assert_array_equal(savl.upscale(PIXELS, model=half), expected)
    np.testing.assert_array_equal(savl.upscale(PIXELS, model=half, strength=0.5), expected)
    np.testing.assert_array_equal(
        savl.upscale(PIXELS, model=half, strength="auto"), savl.upscale(PIXELS, model=savl.Upscaler(model))
    )


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_images_of_all_kinds_are_bicubic_at_0(make_model: Callable[..., SAVL], bands: int, dtype: Any) -> None:
    peak = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    pixels = (np.random.default_rng(0).random((9, 11, bands)) * peak).astype(dtype)
    if bands in (2, 4):
        pixels[..., -1] = peak
    out = savl.upscale(pixels, model=make_model(), strength=0)
    expected = bicubic(torch.from_numpy(pixels / peak).float().permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    assert out.dtype == dtype
    np.testing.assert_allclose(out / peak, expected, atol=1e-6 if dtype is np.float32 else 0.51 / peak)


def test_files_are_written_with_the_map(make_model: Callable[..., SAVL], tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    model = make_model()
    done = savl.upscale_file(
        tmp_path / "a.png", tmp_path / "b.png", model=model, strength=0.5, strength_map=tmp_path / "map.png"
    )
    assert done.notes == ()
    np.testing.assert_array_equal(
        read_image(tmp_path / "b.png").pixels, savl.upscale(PIXELS, model=model, strength=0.5)
    )
    assert read_mark(tmp_path / "map.png") == "strength map"
    drawn = read_image(tmp_path / "map.png").pixels
    assert (drawn[12:20, 12:20] == (32, 144, 140)).all(), "the colour of 0.5 between 0 and 1"
    done = savl.upscale_file(tmp_path / "a.png", tmp_path / "c.png", model=Nearest(), strength_map=tmp_path / "m.png")
    assert done.notes == ("the strength map is 1 everywhere: the whole image is fully restored",)
    with pytest.raises(ValueError, match="strength_map and severity_map must be two files"):
        savl.upscale_file(
            tmp_path / "a.png",
            tmp_path / "d.png",
            model=model,
            severity_map=tmp_path / "x.png",
            strength_map=tmp_path / "x.png",
        )


# Bad values


@pytest.mark.parametrize(
    ("strength", "error", "got"),
    [
        (1.5, ValueError, "1.5"),
        (-1, ValueError, "-1"),
        (math.nan, ValueError, "nan"),
        ("strong", ValueError, "'strong'"),
        ("0.5", ValueError, "'0.5'"),
        (True, TypeError, "bool True"),
        ([0.5], TypeError, r"list \[0.5\]"),
    ],
)
def test_a_bad_strength_is_refused_everywhere(
    make_model: Callable[..., SAVL], strength: Any, error: type[Exception], got: str
) -> None:
    model, message = make_model(), rf"strength must be 'auto' or a number from 0 to 1, got {got}"
    upscaler = savl.Upscaler(model)
    for call in (
        lambda: savl.Upscaler(model, strength=strength),
        lambda: upscaler(torch.rand(1, 3, 4, 4), strength=strength),
        lambda: savl.upscale(PIXELS, model=upscaler, strength=strength),
        lambda: savl.upscale(PIXELS, model=model, strength=strength),
    ):
        with pytest.raises(error, match=message):
            call()


def test_numbers_of_all_kinds_are_taken() -> None:
    assert [check_strength(each) for each in (0, 1, 0.5, np.float32(0.5), np.float64(1))] == [0, 1, 0.5, 0.5, 1]
