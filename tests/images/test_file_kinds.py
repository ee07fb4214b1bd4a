"""Every kind of JPEG, PNG and WebP samples is converted correctly or refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from savl.images.errors import UnsupportedImage
from savl.images.read import read_image

RED = (200, 40, 30)


def encoded(image: Image.Image, ending: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, ending, **options)
    return buffer.getvalue()


def ramps() -> Image.Image:
    rows, columns = np.mgrid[0:32, 0:48]
    return Image.fromarray(np.stack([rows * 8, columns * 5, 255 - rows * 8], -1).astype(np.uint8))


JPEG_OPTIONS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "RGB": {"keep_rgb": True},
    "restart markers": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("name", JPEG_OPTIONS)
def test_jpeg_colours_are_those_of_another_decoder(name: str) -> None:
    content = encoded(ramps(), "JPEG", quality=95, **JPEG_OPTIONS[name])
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(read_image(content).pixels - expected).max() <= 3


def test_gray_jpeg_stays_gray() -> None:
    pixels = read_image(encoded(Image.new("L", (9, 7), 90), "JPEG")).pixels
    assert pixels.shape == (7, 9, 1)
    assert (pixels == 90).all()


@pytest.mark.parametrize("ending", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("profile", "note"),
    [
        (None, "it has no CMYK profile; a generic one was used"),
        (b"not a profile" * 20, "its CMYK profile is damaged; a generic one was used"),
        ("cmyk", None),
    ],
    ids=["no", "broken", "own"],
)
def test_the_use_of_a_generic_cmyk_profile_is_noted(ending: str, profile: bytes | str | None, note: str | None) -> None:
    import pyvips

    if isinstance(profile, str):
        profile = bytes(pyvips.Operation.call("profile_load", profile))
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = read_image(encoded(inks, ending, **({} if profile is None else {"icc_profile": profile})))
    assert picture.notes == (() if note is None else (note,))
    red, green, blue = (int(sample) for sample in picture.pixels[8, 8])
    assert red > 180
    assert max(green, blue) < 90
    assert picture.metadata.icc is not None
    assert picture.metadata.icc[16:20] == b"RGB "


FRAMES = {
    "12-bit": (0xC1, 12),
    "lossless": (0xC3, 8),
    "hierarchical": (0xC5, 8),
    "arithmetic-coded lossless": (0xCB, 8),
    "JPEG-LS": (0xF7, 8),
}


@pytest.mark.parametrize("name", FRAMES)
def test_jpeg_kinds_that_cannot_be_decoded_are_reported(name: str) -> None:
    marker, bits = FRAMES[name]
    content = bytearray(encoded(Image.new("RGB", (16, 16), RED), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 1], content[frame + 4] = marker, bits
    with pytest.raises(UnsupportedImage, match=f"is a JPEG file of a kind that savl cannot read: {name}$"):
        read_image(bytes(content))


def png(width: int, depth: int, colour_type: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of one row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0))
    parts = [chunk(name, data) for name, data in chunks]
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_gray_png_of_any_depth_has_its_transparent_value(depth: int) -> None:
    top = 2**depth - 1
    row = {1: b"\x40", 2: b"\x30", 4: b"\x0f", 8: b"\0\xff", 16: b"\0\0\xff\xff"}[depth]
    peak = 65535 if depth == 16 else 255
    pixels = read_image(png(2, depth, 0, row, (b"tRNS", struct.pack(">H", top)))).pixels
    assert pixels.tolist() == [[[0, peak], [peak, 0]]]
    assert pixels.dtype == (np.uint16 if depth == 16 else np.uint8)


@pytest.mark.parametrize("depth", [8, 16])
def test_rgb_png_has_its_transparent_colour(depth: int) -> None:
    code = ">B" if depth == 8 else ">H"
    row = b"".join(struct.pack(code, value) for value in (*RED, 1, 2, 3))
    pixels = read_image(png(2, depth, 2, row, (b"tRNS", struct.pack(">3H", *RED)))).pixels
    peak = 2**depth - 1
    assert pixels.tolist() == [[[*RED, 0], [1, 2, 3, peak]]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_of_any_depth_become_rgba(depth: int) -> None:
    row = {1: b"\x40", 2: b"\x10", 4: b"\x01", 8: b"\0\1"}[depth]
    content = png(2, depth, 3, row, (b"PLTE", bytes([9, 8, 7, *RED])), (b"tRNS", bytes([0, 128])))
    assert read_image(content).pixels.tolist() == [[[9, 8, 7, 0], [*RED, 128]]]


@pytest.mark.parametrize(("colour_type", "bands"), [(4, 2), (6, 4)])
def test_16_bit_png_keeps_its_alpha(colour_type: int, bands: int) -> None:
    values = [1000, 20000, 30000, 40000][:bands]
    assert read_image(png(1, 16, colour_type, struct.pack(f">{bands}H", *values))).pixels.tolist() == [[values]]


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 90}], ids=["lossless", "lossy"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_colours_are_those_of_another_decoder(options: dict[str, object], mode: str) -> None:
    image = ramps()
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.tile(np.arange(1, 49, dtype=np.uint8) * 5, (32, 1))))
    content = encoded(image, "WEBP", **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert(mode)).astype(int)
    assert np.abs(read_image(content).pixels - expected).max() <= 2
