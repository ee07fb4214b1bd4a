"""PIL images of every mode: correct samples, orientation and transparency, or an error that names the mode."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from savl.images.errors import UnreadableImage
from savl.images.pixels import as_pixels
from savl.images.read import read_image

COLOURS = np.array([[200, 40, 30], [0, 255, 0], [10, 20, 250]], np.uint8)
INDICES = np.array([[0, 1, 2, 1], [2, 2, 0, 1]], np.uint8)


def palette_image(alphas: list[int] | None = None) -> Image.Image:
    image = Image.fromarray(INDICES)
    image = Image.frombytes("P", image.size, image.tobytes())
    if alphas is None:
        image.putpalette(COLOURS.tobytes())
    else:
        image.putpalette(np.column_stack([COLOURS, alphas]).astype(np.uint8).tobytes(), "RGBA")
    return image


def expected(alphas: list[int]) -> NDArray[np.uint8]:
    return np.column_stack([COLOURS, alphas]).astype(np.uint8)[INDICES]


def saved(image: Image.Image, file_format: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(buffer)


# Palettes


def test_a_palette_without_alpha_is_rgb() -> None:
    np.testing.assert_array_equal(as_pixels(palette_image()), COLOURS[INDICES])


def test_a_palette_with_alpha_is_rgba() -> None:
    np.testing.assert_array_equal(as_pixels(palette_image([255, 0, 128])), expected([255, 0, 128]))


@pytest.mark.parametrize("when", ["in a PNG", "set before loading", "set after loading"])
@pytest.mark.parametrize(
    ("transparency", "alphas"),
    [(1, [255, 0, 255]), (0, [0, 255, 255]), (b"\x05\x80", [5, 128, 255]), (b"\xff\x00\x07", [255, 0, 7])],
)
def test_transparency_of_a_palette_becomes_alpha(transparency: int | bytes, alphas: list[int], when: str) -> None:
    image = palette_image()
    if when == "in a PNG":
        image = saved(image, "PNG", transparency=transparency)
    else:
        if when == "set after loading":
            image.load()
        image.info["transparency"] = transparency
    before = dict(image.info)
    np.testing.assert_array_equal(as_pixels(image), expected(alphas))
    assert image.info == before, "the caller's image was changed"
    assert image.mode == "P"


@pytest.mark.parametrize(
    ("transparency", "alphas"), [(200, [255, 255, 255]), (b"\x05" * 300, [5, 5, 5]), (b"", [255, 255, 255])]
)
def test_transparency_beyond_the_palette_is_taken_as_far_as_it_goes(
    transparency: int | bytes, alphas: list[int]
) -> None:
    image = palette_image()
    image.info["transparency"] = transparency
    np.testing.assert_array_equal(as_pixels(image), expected(alphas))
    if isinstance(transparency, int):
        np.testing.assert_array_equal(as_pixels(saved(image, "GIF", transparency=200))[..., :3], COLOURS[INDICES])


def test_indices_beyond_the_palette_are_black() -> None:
    image = palette_image()
    image.putpixel((0, 0), 77)
    assert as_pixels(image)[0, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(as_pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16", "RGBA", "LA", "YCbCr"])
@pytest.mark.parametrize("transparency", ["x", (1, 2), 1.5, None, [3]])
def test_a_transparency_that_means_nothing_is_ignored(transparency: Any, mode: str) -> None:
    image = Image.new(mode, (3, 2))
    plain = as_pixels(image)
    image.info["transparency"] = transparency
    pixels = as_pixels(image)
    np.testing.assert_array_equal(pixels[..., : plain.shape[2]], plain)
    assert pixels.shape == plain.shape or (pixels[..., -1] == 255).all()


def test_a_palette_beside_an_alpha_band_is_rgba() -> None:
    image = Image.new("PA", (3, 1))
    image.putpalette(COLOURS.tobytes())
    image.putdata([(0, 10), (1, 200), (2, 0)])
    np.testing.assert_array_equal(as_pixels(image)[0], np.column_stack([COLOURS, [10, 200, 0]]))


# One transparent colour


def test_one_transparent_colour_becomes_alpha() -> None:
    rgb = Image.fromarray(COLOURS[INDICES])
    np.testing.assert_array_equal(as_pixels(saved(rgb, "PNG", transparency=(0, 255, 0))), expected([255, 0, 255]))
    gray = saved(Image.fromarray(INDICES), "PNG", transparency=2)
    np.testing.assert_array_equal(as_pixels(gray), np.stack([INDICES, np.where(INDICES == 2, 0, 255)], axis=2))
    deep = INDICES.astype(np.uint16) * 300
    pixels = as_pixels(saved(Image.fromarray(deep), "PNG", transparency=300))
    np.testing.assert_array_equal(pixels, np.stack([deep, np.where(deep == 300, 0, 65535)], axis=2))
    assert pixels.dtype == np.uint16
    bits = saved(Image.fromarray(INDICES == 1), "PNG", transparency=1)
    assert bits.mode == "1"
    white = np.where(INDICES == 1, 255, 0)
    np.testing.assert_array_equal(as_pixels(bits), np.stack([white, 255 - white], axis=2))


def png(samples: NDArray[Any], bits: int, key: list[int]) -> bytes:
    """Return a gray or RGB PNG file of any bit depth with one transparent colour, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, bands = samples.shape
    single = (samples.reshape(height, -1)[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1)
    rows = np.packbits(single.astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if bands == 3 else 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", struct.pack(f">{bands}H", *key))
        + chunk(b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_gray_of_few_bits_is_found(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (16, 21, 1))
    for key in {0, 1, 2**bits // 2, 2**bits - 1}:
        content = png(codes, bits, [key])
        wanted = np.concatenate([codes * (255 // (2**bits - 1)), np.where(codes == key, 0, 255)], axis=2)
        np.testing.assert_array_equal(read_image(content).pixels, wanted)
        image = Image.open(io.BytesIO(content))
        np.testing.assert_array_equal(as_pixels(image), wanted)
        np.testing.assert_array_equal(as_pixels(image), wanted, "taken twice")


def test_the_transparent_colour_of_16_bits_is_found_among_the_8_that_pillow_keeps() -> None:
    codes = np.random.default_rng(0).integers(0, 2**16, (16, 21, 3))
    key = codes[3, 5].tolist()
    image = Image.open(io.BytesIO(png(codes, 16, key)))
    wanted = np.concatenate([codes >> 8, np.where((codes == key).all(axis=2, keepdims=True), 0, 255)], axis=2)
    assert wanted[..., 3].min() == 0
    np.testing.assert_array_equal(as_pixels(image), wanted)
    np.testing.assert_array_equal(as_pixels(image), wanted, "taken twice")


def test_a_key_of_8_bits_is_not_spread() -> None:
    for samples, key in ((INDICES, 2), (INDICES * 17, 17), (INDICES * 85, 170)):
        image = saved(Image.fromarray(samples), "PNG", transparency=key)
        np.testing.assert_array_equal(as_pixels(image)[..., 1], np.where(samples == key, 0, 255))
    made = Image.fromarray(INDICES * 85)
    made.info["transparency"] = 1
    assert (as_pixels(made)[..., 1] == 255).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: palette_image([255, 0, 128]).save(path),
        lambda path: palette_image().save(path, transparency=b"\x05\x80"),
        lambda path: Image.fromarray(COLOURS[INDICES]).save(path, transparency=(0, 255, 0)),
        lambda path: Image.fromarray(INDICES.astype(np.uint16) * 300).save(path, transparency=300),
        lambda path: Image.fromarray(INDICES).save(path, transparency=2),
        lambda path: Image.fromarray(INDICES == 1).save(path),
        lambda path: palette_image().save(path, bits=2),
    ],
)
def test_an_opened_file_gives_the_same_result_as_its_path(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        by_pil = as_pixels(image)
    by_path = read_image(tmp_path / "x.png").pixels
    assert by_pil.dtype == by_path.dtype
    np.testing.assert_array_equal(by_pil, by_path)


# Other modes

SIMPLE: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "L": ((77,), [77]),
    "LA": ((77, 9), [77, 9]),
    "RGB": ((200, 40, 30), [200, 40, 30]),
    "RGBA": ((200, 40, 30, 9), [200, 40, 30, 9]),
    "RGBX": ((200, 40, 30, 9), [200, 40, 30]),
    "1": ((255,), [255]),
    "La": ((64, 128), [128, 128]),
    "RGBa": ((100, 20, 0, 128), [199, 40, 0, 128]),  # value · 255 / 128, rounded down as Pillow does
    "YCbCr": ((82, 90, 240), [239, 15, 15]),  # BT.601, full range: Y + 1.402 Cr, Y − .344 Cb − .714 Cr, Y + 1.772 Cb
    "I;16": ((40_000,), [40_000]),
    "I;16L": ((40_000,), [40_000]),
    "I;16B": ((40_000,), [40_000]),
}


@pytest.mark.parametrize("mode", SIMPLE)
def test_modes_give_the_picture_they_hold(mode: str) -> None:
    colour, wanted = SIMPLE[mode]
    pixels = as_pixels(Image.new(mode, (3, 2), colour if len(colour) > 1 else colour[0]))
    assert pixels.shape == (2, 3, len(wanted))
    assert pixels.dtype == (np.uint16 if mode.startswith("I;16") else np.uint8)
    np.testing.assert_allclose(pixels[1, 2].astype(int), wanted, atol=1 if mode in ("La", "RGBa", "YCbCr") else 0)


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "HSV", "I", "F"])
def test_other_modes_are_refused_by_their_name(mode: str) -> None:
    with pytest.raises(TypeError, match=rf"^image: PIL mode {mode}; accepted modes are .* For {mode}: .*"):
        as_pixels(Image.new(mode, (3, 2)))


# Orientation


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return what a viewer shows, by the EXIF standard's table of positions of the first row and column."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "I;16", "P", "1"])
def test_exif_orientation_is_applied_as_it_is_to_paths(kind: str, orientation: int, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    image, stored = {
        "RGB": lambda: (Image.fromarray(samples[..., :3]), samples[..., :3]),
        "RGBA": lambda: (Image.fromarray(samples), samples),
        "L": lambda: (Image.fromarray(samples[..., 0]), samples[..., :1]),
        "I;16": lambda: (Image.fromarray(samples[..., 0].astype(np.uint16) * 257), samples[..., :1] * np.uint16(257)),
        "P": lambda: (palette_image(), COLOURS[INDICES]),
        "1": lambda: (Image.fromarray(samples[..., 0] > 99), np.where(samples[..., :1] > 99, 255, 0)),
    }[kind]()
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path, compression in ((tmp_path / "x.png", None), (tmp_path / "x.tif", None), (tmp_path / "y.tif", "tiff_lzw")):
        image.save(path, exif=exif, compression=compression)
        opened = Image.open(path)
        np.testing.assert_array_equal(as_pixels(opened), turned(stored, orientation))
        np.testing.assert_array_equal(as_pixels(opened), turned(stored, orientation), "taken twice, turned twice")
        assert opened.filename in (path, str(path)), "the caller's image was changed"
        if path.suffix == ".png":
            np.testing.assert_array_equal(read_image(path).pixels, turned(stored, orientation))
    in_memory = image.copy()
    in_memory.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(as_pixels(in_memory), turned(stored, orientation))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    image = Image.fromarray(COLOURS[INDICES])
    image.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(as_pixels(image), COLOURS[INDICES])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0nonsense", b"\0" * 40])
def test_a_damaged_exif_block_is_ignored(exif: bytes) -> None:
    image = saved(Image.fromarray(COLOURS[INDICES]), "PNG")
    image.load()
    image.info["exif"] = exif
    np.testing.assert_array_equal(as_pixels(image), COLOURS[INDICES])


# Lazy, closed and many-framed images


def test_the_current_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for file_format in ("TIFF", "GIF"):
        opened = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
        for number in (2, 0, 1):
            opened.seek(number)
            np.testing.assert_array_equal(as_pixels(opened)[..., :3], np.asarray(frames[number]))


def test_a_closed_image_is_refused_with_the_reason(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as never_read:
        pass
    read = Image.open(tmp_path / "x.png")
    read.load()
    read.close()
    for image in (never_read, read):
        with pytest.raises(ValueError, match="image: the PIL image is closed"):
            as_pixels(image)


def test_an_image_whose_file_is_cut_off_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, quality=95)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImage, match=r"x\.jpg: .*truncated"):
        as_pixels(Image.open(path))
    with pytest.raises(UnreadableImage, match=r"<PIL image>: .*truncated"):
        as_pixels(Image.open(io.BytesIO(content[: len(content) // 2])))
