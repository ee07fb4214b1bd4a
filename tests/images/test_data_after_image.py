"""Data after the end of an image, and chunks that a format does not define, are reported when they are left out."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from savl.images.format import JPEG, PNG, WEBP, ImageFormat
from savl.images.jpeg_structure import JpegTail, read_tail
from savl.images.metadata import losses
from savl.images.read import read_image

FILM = b"\0\0\0\x18ftypmp42" + b"m" * 200
SAMSUNG = b"\0\0\x30\x0a\x10\0\0\0MotionPhoto_Data" + FILM + b"SEFHdirectorySEFT"


def encoded(name: str, seed: int = 0, **options: Any) -> bytes:
    """Return a file of random samples, whose entropy-coded data contain stuffed bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def named(tmp_path: Path, content: bytes, source: ImageFormat, target: ImageFormat = PNG) -> list[str]:
    (tmp_path / "in").write_bytes(content)
    read = read_image(tmp_path / "in")
    assert read.format is source
    return losses(read.metadata, read.pixels, read.pixels, target)


@pytest.mark.parametrize(
    ("tail", "names"),
    [
        (b"", ""),
        (b"\0" * 77 + b"\xff" * 30 + b"\r\n", ""),
        (SAMSUNG, "the film of a motion photo"),
        (FILM, "the film of a motion photo"),
        (encoded("jpeg", 1), "a further image after the first"),
        (b"\xff\0" * 50 + encoded("jpeg", 1), "a further image after the first"),
        (encoded("jpeg", 1) * 3, "3 further images after the first"),
        (encoded("jpeg", 1) + FILM, "a further image after the first and the film of a motion photo"),
        (b"\0\0some maker's words", "20 bytes after the image"),
        (encoded("jpeg", 1)[:-2], f"{len(encoded('jpeg', 1)) - 2} bytes after the image"),
        (b"w", "1 byte after the image"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_data_after_a_jpeg_image_are_reported(tmp_path: Path, tail: bytes, names: str, options: dict[str, Any]) -> None:
    expected = [f"left out: {names}"] if names else []
    for quality in (30, 100):
        assert named(tmp_path, encoded("jpeg", quality=quality, **options) + tail, JPEG) == expected


def test_data_after_a_jpeg_image_are_found_in_file_objects() -> None:
    assert read_tail(io.BytesIO(encoded("jpeg") + FILM)) == JpegTail(film=True)
    assert read_tail(io.BytesIO(encoded("jpeg")[:-2])) == JpegTail()
    assert read_tail(io.BytesIO(b"")) == JpegTail()


def test_padding_may_be_longer_than_the_read_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.images.jpeg_structure._STEP", 7)
    for length in range(15):
        tail = b"\xff" * length + encoded("jpeg", 1) + b"\0" * length
        assert read_tail(io.BytesIO(encoded("jpeg") + tail)) == JpegTail(pictures=1)


@pytest.mark.parametrize(
    ("kind", "pictures", "names"),
    [
        (0x010002, 1, ""),
        (0x010002, 2, "a further image after the first"),
        (0x020002, 1, "the further images in the file (MPF)"),
        (0x020002, 2, "the further images in the file (MPF)"),
    ],
)
def test_images_that_a_segment_lists_are_reported_once(tmp_path: Path, kind: int, pictures: int, names: str) -> None:
    listed = struct.pack(">IIIHH", 0x030000, 900, 0, 0, 0) + struct.pack(">IIIHH", kind, 500, 900, 0, 0)
    block = b"MPF\0MM\0*\0\0\0\x08" + struct.pack(">HHHIII", 1, 0xB002, 7, len(listed), 26, 0) + listed
    whole = encoded("jpeg")
    segment = struct.pack(">HH", 0xFFE2, len(block) + 2) + block
    content = whole[:20] + segment + whole[20:] + encoded("jpeg", 1) * pictures
    assert named(tmp_path, content, JPEG) == ([f"left out: {names}"] if names else [])


@pytest.mark.parametrize("target", [PNG, JPEG, WEBP], ids=lambda f: f.name)
def test_data_after_a_png_or_webp_image_are_reported(tmp_path: Path, target: ImageFormat) -> None:
    for name, source in (("png", PNG), ("webp", WEBP)):
        whole = encoded(name)
        assert named(tmp_path, whole, source, target) == []
        assert named(tmp_path, whole + b"words", source, target) == ["left out: 5 bytes after the image"]


def test_chunks_that_webp_does_not_define_are_reported(tmp_path: Path) -> None:
    whole = encoded("webp", lossless=True, exif=Image.Exif())
    whole += b"abcd\3\0\0\0xyz\0" + b"EFG \2\0\0\0xy" + b"abcd\0\0\0\0"
    whole = whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]
    assert named(tmp_path, whole, WEBP) == ["left out: the WebP chunk abcd and the WebP chunk EFG"]


@pytest.mark.parametrize("numbers", [[(2, 2)], [(0, 0)], [(1, 1)], [(2, 2), (1, 2)]])
def test_a_jpeg_profile_with_missing_parts_is_reported(tmp_path: Path, numbers: list[tuple[int, int]]) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    half = len(icc) // 2
    whole = encoded("jpeg")
    segments = b""
    for number, count in numbers:
        piece = icc if count < 2 else (icc[:half], icc[half:])[number - 1]
        content = b"ICC_PROFILE\0" + bytes([number, count]) + piece
        segments += struct.pack(">HH", 0xFFE2, len(content) + 2) + content
    lost = named(tmp_path, whole[:20] + segments + whole[20:], JPEG)
    complete = len(numbers) == numbers[0][1]
    assert lost == ([] if complete else ["left out: the colour profile, which is damaged"])
    assert (read_image(tmp_path / "in").metadata.icc == icc) == complete
