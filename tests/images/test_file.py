"""Pixels of image files: every format, number of bands and bit depth is read as it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from savl.images.format import FORMATS, JPEG, PNG, TIFF, WEBP, ImageFormat, format_of_suffix
from savl.images.read import read_image
from savl.images.write import write_image

LOSSLESS = [(PNG, np.uint8), (PNG, np.uint16), (TIFF, np.uint8), (TIFF, np.uint16), (WEBP, np.uint8)]


def noise(bands: int, dtype: type, shape: tuple[int, int] = (13, 21)) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(bands).integers(0, top, (*shape, bands), dtype=dtype, endpoint=True)


def named(case: tuple[ImageFormat, type]) -> str:
    return f"{case[0].name}-{np.dtype(case[1])}"


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("case", LOSSLESS, ids=named)
def test_lossless_formats_return_every_band_layout_unchanged(
    tmp_path: Path, case: tuple[ImageFormat, type], bands: int
) -> None:
    image_format, dtype = case
    pixels = noise(bands, dtype)
    if bands in (2, 4):
        # WebP may change colours of transparent pixels; alpha 1 is enough to keep them.
        pixels[..., -1] = np.maximum(pixels[..., -1], 1)
    path = tmp_path / "picture"
    write_image(path, pixels, image_format=image_format, quality=100)
    back = read_image(path)
    assert back.format is image_format
    assert back.pixels.dtype == dtype
    expected = pixels
    if image_format is WEBP and bands < 3:
        expected = pixels[..., [0, 0, 0] if bands == 1 else [0, 0, 0, 1]]
    np.testing.assert_array_equal(back.pixels, expected)


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("image_format", [JPEG, WEBP], ids=lambda f: f.name)
def test_lossy_formats_return_nearly_the_same(tmp_path: Path, image_format: ImageFormat, bands: int) -> None:
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64, 1).repeat(bands, 2).astype(np.uint8)
    path = tmp_path / "picture"
    write_image(path, ramp, image_format=image_format, quality=95)
    back = read_image(path).pixels
    assert back.shape[2] == (3 if image_format is WEBP else bands)
    assert np.abs(back.astype(int) - ramp).max() <= 6


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("value", [0, 255])
def test_white_stays_white_and_black_black_in_a_file(tmp_path: Path, image_format: ImageFormat, value: int) -> None:
    path = tmp_path / "picture"
    write_image(path, np.full((24, 24, 3), value, np.uint8), image_format=image_format, quality=90)
    assert (read_image(path).pixels == value).all()


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_depth_is_the_sample_type_and_not_the_values(tmp_path: Path, ending: str) -> None:
    image_format = format_of_suffix(Path(f"x.{ending}"))
    assert image_format is not None
    dim = np.full((8, 8, 3), 200, image_format.sample_dtype(np.dtype(np.uint16)))
    path = tmp_path / f"dim.{ending}"
    write_image(path, dim, image_format=image_format, quality=100)
    expected = np.uint16 if image_format.holds_16_bit else np.uint8
    assert read_image(path).pixels.dtype == expected


def test_palette_files_become_rgb(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(3, np.uint8)).quantize(7)
    picture.save(tmp_path / "palette.png")
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png").pixels, expected)


def test_a_transparent_palette_entry_becomes_alpha(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(3, np.uint8)).quantize(7)
    picture.save(tmp_path / "palette.png", transparency=2)
    pixels = read_image(tmp_path / "palette.png").pixels
    assert pixels.shape[2] == 4
    np.testing.assert_array_equal(pixels[..., 3] == 0, np.asarray(picture) == 2)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_one_bit_files_become_eight_bit_gray(tmp_path: Path, ending: str) -> None:
    bits = noise(1, np.uint8)[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / f"bits.{ending}")
    pixels = read_image(tmp_path / f"bits.{ending}").pixels
    np.testing.assert_array_equal(pixels[..., 0], bits * 255)


def test_a_white_is_zero_tiff_reads_right_way_round(tmp_path: Path) -> None:
    import pyvips

    gray = noise(1, np.uint8)
    pyvips.Image.new_from_array(gray).tiffsave(str(tmp_path / "inverted.tif"), miniswhite=True)
    np.testing.assert_array_equal(read_image(tmp_path / "inverted.tif").pixels, gray)


def test_premultiplied_tiff_comes_back_straight(tmp_path: Path) -> None:
    import pyvips

    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[...] = (200, 40, 0, 128)
    image = pyvips.Image.new_from_array(pixels, interpretation="srgb")
    image.tiffsave(str(tmp_path / "premultiplied.tif"), premultiply=True)
    back = read_image(tmp_path / "premultiplied.tif").pixels
    assert np.abs(back.astype(int) - pixels).max() <= 2


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_becomes_srgb_with_white_paper_white(tmp_path: Path, ending: str) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:] = (0, 255, 255, 0)  # magenta and yellow inks are red
    Image.fromarray(inks, mode="CMYK").save(tmp_path / f"inks.{ending}", quality=100)
    picture = read_image(tmp_path / f"inks.{ending}")
    assert picture.pixels.shape == (16, 16, 3)
    assert (picture.pixels[:, :4] >= 253).all()
    red, green, blue = picture.pixels[8, 14].astype(int)
    assert red > 180
    assert max(green, blue) < 90
    assert picture.metadata.icc is not None, "the sRGB profile it was converted to must be named"


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_single_pixel_is_a_picture(tmp_path: Path, image_format: ImageFormat) -> None:
    write_image(tmp_path / "dot", np.full((1, 1, 3), 255, np.uint8), image_format=image_format)
    assert read_image(tmp_path / "dot").pixels.tolist() == [[[255, 255, 255]]]


def test_the_content_decides_the_format_and_not_the_name(tmp_path: Path) -> None:
    write_image(tmp_path / "really_png.jpg", noise(3, np.uint8), image_format=PNG)
    assert read_image(tmp_path / "really_png.jpg").format is PNG


@pytest.mark.parametrize("name", ["a[1].png", "b.png[page=2]", "ünï codé.png", "%s $HOME.png", "-o.png"])
def test_unusual_file_names_are_supported(tmp_path: Path, name: str) -> None:
    pixels = noise(3, np.uint8)
    write_image(tmp_path / name, pixels, image_format=PNG)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read_image(tmp_path / name).pixels, pixels)


def test_reading_sees_a_changed_file_and_not_a_cached_one(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    for value in (10, 20):
        write_image(path, np.full((8, 8, 3), value, np.uint8), image_format=PNG, overwrite=True)
        assert (read_image(path).pixels == value).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "image_format"),
    [
        ((4, 4, 4), np.uint8, JPEG),
        ((4, 4, 3), np.uint16, JPEG),
        ((4, 4, 3), np.uint16, WEBP),
        ((4, 4, 5), np.uint8, PNG),
        ((4, 4, 3), np.float32, PNG),
    ],
)
def test_samples_a_format_cannot_hold_are_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: type, image_format: ImageFormat
) -> None:
    with pytest.raises(ValueError, match="pixels: "):
        write_image(tmp_path / "x", np.zeros(shape, dtype), image_format=image_format)
    assert list(tmp_path.iterdir()) == []
