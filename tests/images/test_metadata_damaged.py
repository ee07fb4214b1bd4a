"""Damaged metadata are left out; the image is read, and written files are valid."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image, TiffImagePlugin

from savl.images.format import FORMATS, JPEG, PNG, TIFF, WEBP, ImageFormat
from savl.images.jpeg_structure import encode_segment
from savl.images.metadata import losses, read_metadata, with_orientation
from savl.images.png_chunks import encode_chunk
from savl.images.read import read_image
from savl.images.result_mark import UPSCALED, read_mark
from savl.images.write import write_image

PIXELS = np.full((6, 8, 3), 90, np.uint8)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:exif="http://ns.adobe.com/exif/1.0/" exif:PixelXDimension="8"/>'
    b"</rdf:RDF></x:xmpmeta>"
)
RESOURCES = b"8BIM\x04\x04\0\0\0\0\0\x08\x1c\x02\x50\0\x03Ada" + b"8BIM\x04\x0c\0\0\0\0\0\x02xx"


def exif() -> Image.Exif:
    block = Image.Exif()
    block[0x010F], block[0x0112], block[0x011A], block[0x011B], block[0x0128] = "Maker", 6, 300.0, 300.0, 2
    block.get_ifd(0x8769).update({0x9214: (3, 4, 2, 2), 0xA002: 8, 0x927C: b"note" * 5, 0xA20E: 100.5, 0xA20F: 100.5})
    block.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 24.0)})
    return block


def rich_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "png")
    chunks = [
        (b"cICP", bytes([9, 16, 0, 1])),
        (b"eXIf", exif().tobytes()[6:]),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"zTXt", b"Title\0\0" + zlib.compress(b"words")),
        (b"bKGD", bytes(6)),
    ]
    return buffer.getvalue()[:33] + b"".join(encode_chunk(*chunk) for chunk in chunks) + buffer.getvalue()[33:]


def rich_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "jpeg")
    segments = [
        (0xE1, exif().tobytes()),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
        (0xE2, b"MPF\0MM\0*\0\0\0\x08" + struct.pack(">HHHIII", 1, 0xB002, 7, 16, 26, 0) + bytes(16)),
        (0xED, b"Photoshop 3.0\0" + RESOURCES),
        (0xFE, b"words"),
    ]
    return buffer.getvalue()[:20] + b"".join(encode_segment(*each) for each in segments) + buffer.getvalue()[20:]


def rich_webp() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "webp", lossless=True, exif=exif(), xmp=XMP, icc_profile=bytes(200))
    return buffer.getvalue()


def rich_tiff() -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype.update({33723: 7, 34377: 7, 33550: 12, 33922: 12, 34735: 3})
    info[700], info[33723], info[34377], info[270] = XMP, RESOURCES[12:20], RESOURCES, "words"
    info[33550], info[33922] = (1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 4.0, 5.0, 0.0)
    info[34735] = (1, 1, 0, 1, 1025, 0, 1, 2)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "tiff", tiffinfo=info, exif=exif())
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of files that it reads nevertheless
@pytest.mark.parametrize(
    ("content", "source"),
    [(rich_png, PNG), (rich_jpeg, JPEG), (rich_webp, WEBP), (rich_tiff, TIFF)],
    ids=["png", "jpg", "webp", "tiff"],
)
def test_damaged_metadata_are_left_out_of_valid_results(
    tmp_path: Path, content: Callable[[], bytes], source: ImageFormat
) -> None:
    whole = content()
    image = pyvips.Image.new_from_array(PIXELS)
    enlarged = PIXELS.repeat(2, 0).repeat(2, 1)
    rng = np.random.default_rng(0)
    for case in range(40):
        damaged = bytearray(whole)
        for at in rng.integers(12, len(whole), rng.choice([1, 2, 5, 20])):
            damaged[at] = rng.choice([0, 255, rng.integers(256)])
        file = io.BytesIO(bytes(damaged[: rng.integers(12, len(whole))] if case % 5 == 0 else damaged))
        with_orientation(image, file, source)
        metadata = read_metadata(image, file, source)
        for target in FORMATS:
            assert all(isinstance(sentence, str) for sentence in losses(metadata, PIXELS, enlarged, target))
        target = FORMATS[case % 4]
        write_image(
            tmp_path / "out", enlarged, metadata, image_format=target, quality=100, overwrite=True, mark=UPSCALED
        )
        assert read_mark(tmp_path / "out") == UPSCALED
        Image.open(tmp_path / "out").load()
        if target is not JPEG:
            np.testing.assert_array_equal(read_image(tmp_path / "out").pixels, enlarged)


@pytest.mark.parametrize("quality", [80, 100], ids=["lossy", "lossless"])
@pytest.mark.parametrize("opaque", [False, True], ids=["transparent", "opaque"])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("profile", [None, bytes(16) + b"RGB " + bytes(181)], ids=["plain", "profile"])
def test_webp_of_every_kind_is_sound_with_metadata(
    tmp_path: Path, bands: int, opaque: bool, quality: int, profile: bytes | None
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, bands), dtype=np.uint8)
    if bands in (2, 4) and opaque:
        pixels[..., -1] = 255
    metadata = read_metadata(pyvips.Image.new_from_array(PIXELS), io.BytesIO(rich_jpeg()), JPEG)
    metadata = replace(metadata, icc=profile)
    write_image(tmp_path / "out", pixels, metadata, image_format=WEBP, quality=quality, mark=UPSCALED)
    opened = Image.open(tmp_path / "out")
    opened.load()
    assert opened.size == (7, 9)
    assert opened.info.get("icc_profile") == profile
    assert opened.getexif()[0x010F] == "Maker"
    assert b"upscaled" in opened.info["xmp"]
    size = struct.unpack("<I", (tmp_path / "out").read_bytes()[4:8])[0]
    assert size + 8 == (tmp_path / "out").stat().st_size
    read = read_image(tmp_path / "out")
    if quality == 100:
        colour = pixels if bands > 2 else np.concatenate([pixels[..., :1].repeat(3, 2), pixels[..., 1:]], axis=2)
        seen = colour[..., -1:] > 0 if bands in (2, 4) else np.ones_like(colour[..., :1], bool)
        expected = colour if read.pixels.shape[2] == colour.shape[2] else colour[..., :3]
        np.testing.assert_array_equal(read.pixels * seen, expected * seen)
