"""Formats that savl reads but does not write: GIF, BMP, AVIF and HEIC."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from savl.images.errors import UnreadableImage, UnsupportedImage
from savl.images.format import AVIF, BMP, FORMATS, GIF, HEIC, READABLE_FORMATS, format_of_content, format_of_suffix
from savl.images.read import read_image, read_size

RED, BLUE = (200, 40, 30), (30, 60, 240)


def encoded(image: Image.Image, ending: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, ending, **options)
    return buffer.getvalue()


def ramps() -> Image.Image:
    rows, columns = np.mgrid[0:32, 0:47]
    return Image.fromarray(np.stack([rows * 8, columns * 5, 255 - rows * 8], -1).astype(np.uint8))


NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="needs Pillow with AVIF")


def test_formats_that_are_only_read_are_not_offered_for_writing() -> None:
    assert all(image_format.writable for image_format in FORMATS)
    assert not any(image_format.writable for image_format in set(READABLE_FORMATS) - set(FORMATS))
    for name, image_format in {"a.BMP": BMP, "a.gif": GIF, "a.avif": AVIF, "a.heic": HEIC, "a.heif": HEIC}.items():
        assert format_of_suffix(Path(name)) is None
        assert format_of_suffix(Path(name), READABLE_FORMATS) is image_format


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bmp_of_every_mode_is_read(mode: str) -> None:
    image = ramps().convert(mode)
    content = encoded(image, "BMP")
    picture = read_image(content)
    assert picture.format is BMP
    back = Image.open(io.BytesIO(content))
    expected = np.asarray(back.convert({"1": "L", "P": "RGB"}.get(mode, back.mode)))
    np.testing.assert_array_equal(picture.pixels.squeeze(), expected)
    assert read_size(content) == (47, 32)


def bmp(data: bytes, width: int, height: int, bits: int, compression: int = 0, palette: bytes = b"") -> bytes:
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


COLOURS = bytes([30, 40, 200, 0, 240, 60, 30, 0])  # blue first, as in BMP

VARIANTS = {
    "top-down": (bmp(bytes([1, 2, 3, 0, 4, 5, 6, 0]), 1, -2, 24), [[[3, 2, 1]], [[6, 5, 4]]]),
    "bottom-up": (bmp(bytes([1, 2, 3, 0, 4, 5, 6, 0]), 1, 2, 24), [[[6, 5, 4]], [[3, 2, 1]]]),
    "15 bits": (bmp(struct.pack("<HH", 31 << 10, 31), 2, 1, 16), [[[255, 0, 0], [0, 0, 255]]]),
    "4 bits": (bmp(b"\x01\0\0\0", 2, 1, 4, palette=COLOURS), [[[*RED], [*BLUE]]]),
    "run lengths": (bmp(bytes([2, 0, 1, 1, 0, 0, 0, 1]), 3, 1, 8, 1, COLOURS), [[[*RED], [*RED], [*BLUE]]]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bmp_variants_are_read(name: str) -> None:
    content, expected = VARIANTS[name]
    assert read_image(content).pixels.tolist() == expected


@pytest.mark.parametrize("part", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_truncated_bmp_is_an_error(mode: str, part: float) -> None:
    content = encoded(ramps().convert(mode), "BMP")
    with pytest.raises(UnreadableImage, match="truncated or corrupt BMP"):
        read_image(content[: int(len(content) * part)])


def test_a_bmp_that_holds_another_format_is_reported() -> None:
    with pytest.raises(UnsupportedImage, match="is a BMP file compressed by PNG"):
        read_image(bmp(b"\x89PNG", 1, 1, 0, 5))


def test_text_that_begins_like_a_bmp_is_no_image() -> None:
    with pytest.raises(UnreadableImage, match="not an image savl can read"):
        read_image(b"BMW and other makes of cars, in a text of more than a few words")


@pytest.mark.parametrize("transparent", [False, True])
def test_a_still_gif_is_read(transparent: bool) -> None:
    image = ramps().quantize(31)
    options = {"transparency": 3} if transparent else {}
    content = encoded(image, "GIF", **options)
    picture = read_image(content)
    assert picture.format is GIF
    mode = "RGBA" if transparent else "RGB"
    expected = np.asarray(Image.open(io.BytesIO(content)).convert(mode))
    seen = expected[..., -1] > 0 if transparent else np.ones(expected.shape[:2], bool)
    np.testing.assert_array_equal(picture.pixels[seen], expected[seen])
    if transparent:
        np.testing.assert_array_equal(picture.pixels[..., 3], expected[..., 3])


@pytest.mark.parametrize("ending", ["GIF", "WEBP"])
def test_an_animation_is_refused_and_its_frames_are_pages(ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    content = encoded(frames[0], ending, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(UnsupportedImage, match=r"holds 2 frames \(animated\).*--page picks one"):
        read_image(content)
    for page, colour in ((1, RED), (2, BLUE)):
        assert (read_image(content, page=page).pixels[..., :3] == colour).all()
    with pytest.raises(UnsupportedImage, match="has no page 3; it holds 2 pages"):
        read_image(content, page=3)


@pytest.mark.parametrize("ending", ["PNG", pytest.param("AVIF", marks=NEEDS_AVIF)])
def test_only_the_first_picture_of_an_animated_png_or_avif_is_read(ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    content = encoded(frames[0], ending, save_all=True, append_images=frames[1:], quality=100)
    for page in (None, 2):
        with pytest.raises(UnsupportedImage, match=r"holds 2 frames \(animated\).*--page 1 only"):
            read_image(content, page=page)
    first = read_image(content, page=1)
    assert first.notes == ()
    np.testing.assert_allclose(
        first.pixels.astype(int), np.broadcast_to(RED, (8, 8, 3)), atol=0 if ending == "PNG" else 4
    )
    with pytest.raises(UnsupportedImage, match="has no page 3; it holds 2 pages"):
        read_image(content, page=3)


def test_a_truncated_gif_is_an_error() -> None:
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)), "GIF")
    with pytest.raises(UnreadableImage, match="truncated or corrupt GIF"):
        read_image(content[: len(content) // 2])


@NEEDS_AVIF
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_avif_is_read(mode: str) -> None:
    image = ramps()
    if mode == "RGBA":
        image.putalpha(90)
    content = encoded(image, "AVIF", quality=100, subsampling="4:4:4")
    picture = read_image(content)
    assert picture.format is AVIF
    assert np.abs(picture.pixels.astype(int) - np.asarray(image)).max() <= 4
    with pytest.raises(UnreadableImage, match="truncated or corrupt AVIF"):
        read_image(content[: len(content) // 2])


@pytest.mark.parametrize("depth", [10, 12])
@pytest.mark.parametrize("value", [0, 65535])
def test_avif_of_more_than_8_bits_keeps_white_white(depth: int, value: int) -> None:
    import pyvips

    image = pyvips.Image.new_from_array(np.full((16, 16, 3), value, np.uint16)).copy(interpretation="rgb16")
    try:
        content = image.heifsave_buffer(compression="av1", bitdepth=depth, lossless=True)
    except pyvips.Error:
        pytest.skip("libvips cannot write AVIF of this depth")
    pixels = read_image(content).pixels
    assert pixels.dtype == np.uint16
    assert (pixels == value).all()


def heic() -> bytes:
    """Return an AVIF file whose boxes declare HEVC compression."""
    content = encoded(Image.new("RGB", (32, 24), RED), "AVIF")
    start = content.index(b"av1C") - 4
    size = int.from_bytes(content[start : start + 4], "big")
    settings = bytes([1, 1, *bytes(10), 30, 0xF0, 0, 0xFC, 0xFD, 0xF8, 0xF8, 0, 0, 0x0F, 0])
    box = struct.pack(">I", 8 + len(settings)) + b"hvcC" + settings
    grown = len(box) - size
    changed = bytearray(content[:start] + box + content[start + size :])
    for name in (b"meta", b"iprp", b"ipco"):
        place = changed.index(name) - 4
        struct.pack_into(">I", changed, place, int.from_bytes(changed[place : place + 4], "big") + grown)
    samples = content.index(b"mdat") + 4
    place = changed.index(struct.pack(">I", samples), changed.index(b"iloc"))
    struct.pack_into(">I", changed, place, samples + grown)
    return bytes(changed).replace(b"av01", b"hvc1").replace(b"avif", b"heic")


@NEEDS_AVIF
def test_heic_is_named_where_libvips_has_no_decoder_for_it() -> None:
    content = heic()
    assert format_of_content(content[:64]) is HEIC
    # If libvips has a decoder, it reports corrupt samples.
    with pytest.raises((UnsupportedImage, UnreadableImage), match=r"HEIC") as caught:
        read_image(content)
    if isinstance(caught.value, UnsupportedImage):
        assert "is HEIC, which this build of libvips cannot read" in str(caught.value)


def test_a_format_without_a_loader_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyvips

    monkeypatch.setattr(pyvips, "type_find", lambda *_: 0)
    with pytest.raises(UnsupportedImage, match="is AVIF, which this build of libvips cannot read"):
        read_image(b"\0\0\0\x18ftypavif" + bytes(60))
