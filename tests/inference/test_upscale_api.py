"""`savl.upscale`: accepted inputs, outputs, and properties of images that must not change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import savl
from savl.images.errors import UnreadableImage
from savl.images.format import PNG
from savl.images.planes import fill_transparent
from savl.images.write import write_image
from savl.inference.device import best_device, checked_device
from savl.inference.enlarge import enlarge, output_size
from savl.inference.upscale_image import as_upscaler, upscale


@dataclass
class Result:
    sr: torch.Tensor
    severity: torch.Tensor


@dataclass
class FakeUpscaler:
    """Substitute for a network of the given scale that stores its inputs."""

    mode: str = "nearest"
    scale: int = 4
    tint: tuple[float, float, float] = (0, 0, 0)
    seen: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, lr: torch.Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Result:
        self.seen.append(lr)
        if on_tile is not None:
            on_tile(1, 1)
        options: dict[str, Any] = {} if self.mode == "nearest" else {"antialias": True}
        sr = F.interpolate(lr, scale_factor=self.scale, mode=self.mode, **options)
        sr = sr + torch.tensor(self.tint).view(1, 3, 1, 1)
        return Result(sr.clamp(0, 1), torch.ones(lr.shape[0], *lr.shape[-2:]))


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.random(shape).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bands", [1, 3])
def test_arrays_come_back_with_their_dtype_bands_and_values(bands: int, dtype: Any) -> None:
    image = noise(5, 7, bands, dtype=dtype)
    out = upscale(image, model=FakeUpscaler())
    assert out.dtype == dtype
    assert out.shape == (20, 28, bands)
    tolerance = 0 if np.dtype(dtype).kind == "u" else 1e-6
    np.testing.assert_allclose(out[::4, ::4].astype(float), image.astype(float), atol=tolerance)


def test_a_flat_gray_array_comes_back_flat() -> None:
    image = noise(5, 7)
    out = upscale(image, model=FakeUpscaler())
    assert out.shape == (20, 28)
    np.testing.assert_array_equal(out[::4, ::4], image)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_tensors_are_channels_first_and_come_back_channels_last(bands: int) -> None:
    image = noise(bands, 5, 7)
    assert upscale(torch.from_numpy(image), model=FakeUpscaler()).shape == (20, 28, bands)
    as_float = upscale(torch.from_numpy(image).float() / 255, model=FakeUpscaler())
    assert as_float.dtype == np.float32
    if bands in (1, 3):
        np.testing.assert_allclose(as_float[::4, ::4] * 255, image.transpose(1, 2, 0), atol=1e-3)


def test_bfloat16_tensors_come_back_as_float32() -> None:
    assert upscale(torch.rand(3, 4, 4).bfloat16(), model=FakeUpscaler()).dtype == np.float32


@pytest.mark.parametrize(
    ("mode", "bands"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1), ("YCbCr", 3), ("RGBa", 4)]
)
def test_pil_images_of_every_common_mode_are_taken(mode: str, bands: int) -> None:
    picture = Image.fromarray(noise(5, 7, 3)).convert("RGBA").convert("RGB" if mode in "PYCbCr" else "RGBA")
    out = upscale(picture.convert(mode), model=FakeUpscaler())
    assert out.shape == (20, 28, bands)
    assert out.dtype == np.uint8


def test_sixteen_bit_pil_images_stay_sixteen_bit() -> None:
    image = noise(5, 7, dtype=np.uint16)
    out = upscale(Image.fromarray(image), model=FakeUpscaler())
    np.testing.assert_array_equal(out[::4, ::4, 0], image)


@pytest.mark.parametrize("make_path", [str, Path])
def test_paths_are_read(tmp_path: Path, make_path: Callable[[Path], Any]) -> None:
    image = noise(5, 7, 3, dtype=np.uint16)
    write_image(tmp_path / "x.png", image, image_format=PNG)
    out = upscale(make_path(tmp_path / "x.png"), model=FakeUpscaler())
    np.testing.assert_array_equal(out[::4, ::4], image)


def test_an_unreadable_path_raises_the_typed_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImage):
        upscale(tmp_path / "x.png", model=FakeUpscaler())


@pytest.mark.parametrize("layout", ["reversed", "transposed", "big-endian", "read-only"])
def test_any_memory_layout_is_taken(layout: str) -> None:
    image = noise(6, 6, 3, dtype=np.uint16)
    given = {
        "reversed": image[::-1, :, ::-1],
        "transposed": image.transpose(1, 0, 2),
        "big-endian": image.astype(">u2"),
        "read-only": image.copy(),
    }[layout]
    given.flags.writeable = layout != "read-only"
    out = upscale(given, model=FakeUpscaler())
    np.testing.assert_array_equal(out[::4, ::4], given)
    assert out.dtype == np.uint16


def test_the_callers_array_is_left_alone() -> None:
    for dtype in (np.uint8, np.float32):
        image = noise(6, 6, 1, dtype=dtype)
        before = image.copy()
        upscale(image, model=FakeUpscaler(), scale=3)
        np.testing.assert_array_equal(image, before)


def test_float_values_a_little_outside_reach_the_network_clamped() -> None:
    fake = FakeUpscaler()
    upscale(np.array([[-0.0005, 1.0005]]), model=fake)
    assert (fake.seen[0].min(), fake.seen[0].max()) == (0, 1)


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"shape \(4, 4, 5\)"),
        (np.zeros((3, 4, 40), np.uint8), ValueError, "channels last"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "no pixels"),
        (np.zeros((4, 4, 3), np.int32), TypeError, "dtype int32"),
        (np.zeros((4, 4, 3), bool), TypeError, "dtype bool"),
        (np.full((4, 4, 3), 255.0), ValueError, "divide 8-bit values by 255"),
        (np.full((4, 4, 3), np.nan), ValueError, r"lie in \[0, 1\]"),
        (torch.zeros(1, 3, 4, 4), ValueError, "call the model itself"),
        (torch.zeros(40, 4, 3), ValueError, "channels first"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "dtype int64"),
        (torch.zeros(3, 4, 4, dtype=torch.float8_e5m2), TypeError, "dtype float8_e5m2"),
        (torch.zeros(3, 4, 4).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (torch.zeros(3, 4, 4, device="meta"), TypeError, "meta tensor"),
        (Image.new("CMYK", (4, 4)), TypeError, "CMYK"),
        (Image.new("F", (4, 4)), TypeError, "PIL mode F"),
        ([[1, 2], [3, 4]], TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_images_are_refused_with_the_given_and_the_accepted_values(
    image: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        upscale(image, model=FakeUpscaler())
    assert str(caught.value).startswith("image: ")
    assert "accepted" in str(caught.value) or "must lie" in str(caught.value) or "no pixels" in str(caught.value)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        upscale(noise(4, 4), model=FakeUpscaler(), scale=scale)


@pytest.mark.parametrize("scale", ["2", [2], 2j])
def test_a_scale_that_is_no_number_is_refused_by_name(scale: Any) -> None:
    with pytest.raises(TypeError, match="scale must be a finite number above 0, got"):
        upscale(noise(4, 4), model=FakeUpscaler(), scale=scale)


@pytest.mark.parametrize("scale", [200_000, 1e308, np.float32(1e38)])
def test_a_scale_that_no_memory_could_hold_is_refused_before_the_network_runs(scale: float) -> None:
    fake = FakeUpscaler()
    with pytest.raises(ValueError, match=r"scale .* would make .* pixels of 4 x 4; at most \d+ are accepted"):
        upscale(noise(4, 4), model=fake, scale=scale)
    assert fake.seen == []


def test_an_integer_scale_beyond_all_floats_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be a finite number"):
        upscale(noise(4, 4), model=FakeUpscaler(), scale=10**400)


def test_a_path_with_a_nul_character_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="image: the path .* has a NUL character"):
        upscale("a\0b.png", model=FakeUpscaler())


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_float16_is_refused_with_the_reason(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype must be .* overflow in float16"):
        as_upscaler("savl-tiny", dtype=dtype)


@pytest.mark.parametrize("settings", [{"tile": "64"}, {"tile": 1.5}, {"tile_pad": None}])
def test_tiles_that_are_no_whole_numbers_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be"):
        as_upscaler(savl.build("savl-tiny"), **settings)


@pytest.mark.parametrize("model", ["zzz", "zzz\0", "x" * 300, Path("zzz.pth")])
def test_an_unknown_model_is_refused_under_the_name_of_its_argument(model: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="model must be shipped weights .* or an existing file, got"):
        as_upscaler(model)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == checked_device("auto") == torch.device(best)


def test_unknown_devices_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="device 'tpu'"):
        checked_device("tpu")
    with pytest.raises(ValueError, match="sees"):
        checked_device("cuda:99")
    with pytest.raises(ValueError, match="int8"):
        as_upscaler("savl-tiny", dtype="int8")


def test_settings_of_a_given_upscaler_are_not_silently_ignored() -> None:
    with pytest.raises(ValueError, match="belong to the Upscaler"):
        upscale(noise(4, 4), model=FakeUpscaler(), tile=64)
    with pytest.raises(TypeError, match="model: object"):
        upscale(noise(4, 4), model=object())  # type: ignore[arg-type]


# White, gray, and other properties that must not change -----------------------------------------------


@pytest.mark.parametrize("scale", [None, 1, 1.7, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_white_stays_white(bands: int, dtype: Any, scale: float | None) -> None:
    white = np.full((9, 9, bands), np.iinfo(dtype).max, dtype)
    out = upscale(white, model=FakeUpscaler("bicubic"), scale=scale)
    assert (out == np.iinfo(dtype).max).all()


@pytest.mark.parametrize("value", [0, 1, 77, 128, 254])
def test_a_flat_colour_stays_that_colour(value: int) -> None:
    flat = np.full((9, 9, 3), value, np.uint8)
    for scale in (None, 2.3):
        assert (upscale(flat, model=FakeUpscaler("bicubic"), scale=scale) == value).all()


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("bands", [3, 4])
def test_gray_rgb_gains_no_tint_from_a_tinting_network(bands: int, scale: float | None) -> None:
    gray = noise(9, 9, 1).repeat(bands, 2)
    out = upscale(gray, model=FakeUpscaler(tint=(0.05, -0.03, 0.01)), scale=scale)
    np.testing.assert_array_equal(out[..., 0], out[..., 1])
    np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_gray_reaches_the_network_as_three_equal_channels_and_is_averaged() -> None:
    fake = FakeUpscaler(tint=(0.03, 0, -0.03))
    gray = np.full((5, 5), 100, np.uint8)
    assert (upscale(gray, model=fake) == 100).all()
    assert fake.seen[0].shape == (1, 3, 5, 5)
    assert fake.seen[0].dtype == torch.float32
    assert torch.equal(fake.seen[0][:, 0], fake.seen[0][:, 2])


def test_values_are_rounded_and_not_cut_off() -> None:
    fake = FakeUpscaler(tint=(0.6 / 255, 0.4 / 255, -0.4 / 255))
    colour = np.full((3, 3, 3), 100, np.uint8) + np.arange(3, dtype=np.uint8)
    assert (upscale(colour, model=fake) == [101, 101, 102]).all()


def test_a_network_that_gives_nan_is_an_error_and_not_a_black_picture() -> None:
    with pytest.raises(RuntimeError, match="NaN"):
        upscale(noise(4, 4, 3), model=FakeUpscaler(tint=(float("nan"), 0, 0)))


# Size -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    bands=st.integers(1, 4),
    scale=st.one_of(st.none(), st.floats(0.05, 9), st.sampled_from([1.0, 3.0, 1 / 3])),
    native=st.integers(1, 4),
)
def test_any_size_and_scale_gives_the_rounded_size(
    height: int, width: int, bands: int, scale: float | None, native: int
) -> None:
    out = upscale(noise(height, width, bands), model=FakeUpscaler(scale=native), scale=scale)
    factor = native if scale is None else scale
    assert out.shape == (max(1, round(height * factor)), max(1, round(width * factor)), bands)


def test_output_size_never_reaches_zero() -> None:
    assert output_size(1, 1000, 0.001) == (1, 1)


def test_a_scale_resamples_before_quantising() -> None:
    # A ramp of a fifth of a level per pixel. If it were resampled after quantising, steps of whole levels would remain.
    ramp = (np.linspace(100, 110, 50).round()[None].repeat(50, 0)).astype(np.uint8)
    fine = upscale(ramp.astype(np.float32) / 255, model=FakeUpscaler("bicubic"), scale=2)
    coarse = upscale(ramp, model=FakeUpscaler("bicubic"), scale=2)
    assert np.abs(fine * 255 - coarse).max() <= 0.5 + 1e-3


def test_tiles_are_reported() -> None:
    calls: list[tuple[int, int]] = []
    upscale(noise(4, 4), model=FakeUpscaler(), on_tile=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 1)]


# Transparency -----------------------------------------------------------------------------------------


def disc(hidden: tuple[int, int, int], side: int = 24, dtype: Any = np.uint8) -> np.ndarray:
    """Return an opaque red disc with a soft edge, over transparent pixels of another colour."""
    rows, columns = np.mgrid[0:side, 0:side] - (side - 1) / 2
    alpha = np.clip(side / 3 - np.hypot(rows, columns) + 0.5, 0, 1)
    picture = np.empty((side, side, 4))
    picture[..., :3] = np.where(alpha[..., None] > 0, [255, 0, 0], hidden)
    picture[..., 3] = np.round(alpha * 255)
    picture[picture[..., 3] == 0, :3] = hidden
    return (picture * (np.iinfo(dtype).max // 255)).astype(dtype)


@pytest.mark.parametrize("scale", [None, 1, 1.7, 2, 5.5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("hidden", [(0, 255, 0), (0, 0, 0), (255, 255, 255)])
def test_colours_of_transparent_pixels_do_not_affect_visible_ones(
    hidden: tuple[int, int, int], dtype: Any, scale: float | None
) -> None:
    top = np.iinfo(dtype).max
    out = upscale(disc(hidden, dtype=dtype), model=FakeUpscaler("bicubic"), scale=scale)
    assert out[..., 0].min() >= top - 1, "the disc is red everywhere, seen or not"
    assert out[..., 1:3].max() <= 1
    assert out[0, 0, 3] == 0
    middle = out.shape[0] // 2
    assert out[middle, middle, 3] == top


def test_colours_of_transparent_pixels_make_no_difference() -> None:
    outs = [
        upscale(disc(hidden), model=FakeUpscaler("bicubic"), scale=scale)
        for scale in (None, 1.7)
        for hidden in ((0, 255, 0), (17, 4, 200))
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[2], outs[3])


def test_shrinking_weights_colours_by_their_opacity() -> None:
    # Every output pixel averages opaque red and nearly transparent blue; without alpha weights it would be purple.
    picture = np.zeros((8, 8, 4), np.float32)
    picture[:, ::2] = (1, 0, 0, 1)
    picture[:, 1::2] = (0, 0, 1, 0.1)
    out = upscale(picture, model=FakeUpscaler(scale=1), scale=0.5)
    inner = out[1:-1, 1:-1]
    np.testing.assert_allclose(inner[..., 3], 0.55, atol=0.02)
    np.testing.assert_allclose(inner[..., 0], 1 / 1.1, atol=0.03)
    np.testing.assert_allclose(inner[..., 2], 0.1 / 1.1, atol=0.03)


def test_translucent_colours_are_kept_as_they_are() -> None:
    glass = noise(8, 8, 4)
    glass[..., 3] = np.random.default_rng(1).integers(16, 256, (8, 8))
    out = upscale(glass, model=FakeUpscaler())
    np.testing.assert_array_equal(out[::4, ::4, :3], glass[..., :3])


def test_a_fully_transparent_picture_stays_so_and_shows_nothing() -> None:
    picture = noise(7, 5, 4)
    picture[..., 3] = 0
    assert (upscale(picture, model=FakeUpscaler("bicubic")) == 0).all()


def test_the_fill_continues_the_nearest_visible_colours() -> None:
    colour = torch.rand(1, 3, 33, 20)
    colour[..., :8] = torch.tensor([0.8, 0.2, 0.1]).view(3, 1, 1)
    colour[..., 12:] = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1)
    alpha = torch.ones(1, 1, 33, 20)
    alpha[..., 8:12] = 0
    filled = fill_transparent(colour, alpha)
    assert torch.equal(filled[..., :8], colour[..., :8])
    assert torch.equal(filled[..., 12:], colour[..., 12:])
    assert filled[0, 0, :, 8].min() > filled[0, 0, :, 11].max(), "redder on the red side"
    assert filled[0, 0, :, 8:12].min() >= 0.1 - 1e-5
    assert filled[0, 0, :, 8:12].max() <= 0.8 + 1e-5


def test_flattening_is_onto_the_background_and_drops_alpha() -> None:
    out = enlarge(disc((0, 255, 0)), FakeUpscaler("bicubic"), background=1.0).pixels
    assert out.shape[2] == 3
    assert (out[0, 0] == 255).all()
    assert (out[48, 48] == [255, 0, 0]).all()
    assert out[..., 0].min() >= 254


# Imports ----------------------------------------------------------------------------------------------


def test_importing_savl_loads_no_image_or_plot_library() -> None:
    code = (
        "import sys, savl; savl.upscale; "
        "print([name for name in ('pyvips', 'PIL', 'matplotlib', 'typer', 'rich') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(savl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
