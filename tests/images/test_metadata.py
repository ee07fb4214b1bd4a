"""Colour profile, EXIF, XMP and resolution are copied; orientation is applied and reset."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from savl.images.format import FORMATS, JPEG, PNG, TIFF, WEBP, ImageFormat
from savl.images.read import read_image
from savl.images.write import write_image

MODEL, ORIENTATION, ARTIST = 0x0110, 0x0112, 0x013B
TAKEN, EXPOSURE, WIDTH, HEIGHT = 0x9003, 0x829A, 0xA002, 0xA003
EXIF, GPS = 0x8769, 0x8825
ENDINGS = {PNG: "png", JPEG: "jpg", WEBP: "webp", TIFF: "tif"}
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description tiff:Orientation="6" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"/></rdf:RDF></x:xmpmeta>'
)


@functools.cache  # the profile contains its time of creation
def rgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gray_profile() -> bytes:
    """Return a minimal gray profile with gamma 2.2 (ICC.1:2001-04, 6.3.1.3)."""
    white = struct.pack(">iii", 63190, 65536, 54061)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"gray\0" + bytes(78) + b"\0",
        b"cprt": b"text\0\0\0\0free",
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, 563, 0),
    }
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s12x4s", size, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    return head.ljust(68, b"\0") + white.ljust(60, b"\0") + table + data


def exif(orientation: int = 1, width: int = 30, height: int = 20) -> Image.Exif:
    block = Image.Exif()
    block[MODEL] = "Camera One"
    block[ARTIST] = "A. Photographer"
    block[ORIENTATION] = orientation
    details = {TAKEN: "2021:02:03 04:05:06", EXPOSURE: 1 / 125, WIDTH: width, HEIGHT: height}
    block.get_ifd(EXIF).update(details)
    block.get_ifd(GPS).update({1: "N", 2: (48.0, 51.0, 24.0)})
    return block


def corners(height: int = 20, width: int = 30) -> np.ndarray:
    """Return an image whose eight orientations all differ: red, green, blue and white corners."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    picture[: height // 2, width // 2 :] = (0, 255, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 255)
    picture[height // 2 :, width // 2 :] = 255
    return picture


def save(path: Path, picture: np.ndarray, **options: Any) -> None:
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    Image.fromarray(picture).save(path, **lossless.get(path.suffix[1:], {}), **options)


def through(source: Path, image_format: ImageFormat) -> Path:
    """Read a file, and write its image four times as large with its metadata."""
    picture = read_image(source)
    target = source.with_name(f"out.{ENDINGS[image_format]}")
    write_image(target, picture.pixels.repeat(4, 0).repeat(4, 1), picture.metadata, image_format=image_format)
    return target


def exif_of(path: Path) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    block = Image.open(path).getexif()
    return dict(block), dict(block.get_ifd(EXIF)), dict(block.get_ifd(GPS))


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f"to-{f.name}")
@pytest.mark.parametrize("source", FORMATS, ids=lambda f: f.name)
def test_profile_and_exif_are_kept_between_all_formats(
    tmp_path: Path, source: ImageFormat, target: ImageFormat
) -> None:
    path = tmp_path / f"in.{ENDINGS[source]}"
    save(path, corners(), exif=exif().tobytes(), icc_profile=rgb_profile())
    out = through(path, target)
    assert Image.open(out).info["icc_profile"] == rgb_profile()
    first, details, place = exif_of(out)
    assert first[MODEL] == "Camera One"
    assert first[ARTIST] == "A. Photographer"
    assert first[ORIENTATION] == 1
    assert details[TAKEN] == "2021:02:03 04:05:06"
    assert float(details[EXPOSURE]) == pytest.approx(1 / 125)
    assert (details[WIDTH], details[HEIGHT]) == (120, 80), "EXIF must tell the new size"
    assert place[1] == "N"
    assert [float(part) for part in place[2]] == [48, 51, 24]
    Image.open(out).load()  # the TIFF file is still valid with its metadata


@pytest.mark.parametrize("target", [PNG, TIFF, JPEG], ids=lambda f: f.name)
def test_a_gray_profile_is_kept_with_gray_samples(tmp_path: Path, target: ImageFormat) -> None:
    path = tmp_path / "in.png"
    save(path, corners()[..., 0], icc_profile=gray_profile())
    out = read_image(through(path, target))
    assert out.pixels.shape[2] == 1
    assert out.metadata.icc == gray_profile()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_the_pixels_and_then_says_upright(
    tmp_path: Path, orientation: int, ending: str
) -> None:
    path = tmp_path / f"in.{ending}"
    save(path, corners(), exif=exif(orientation).tobytes())
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = Image.fromarray(corners())
    if orientation in turns:
        upright = upright.transpose(turns[orientation])
    picture = read_image(path)
    assert picture.pixels.shape == np.asarray(upright).shape
    assert np.abs(picture.pixels.astype(int) - np.asarray(upright)).max() <= 3
    first, _, _ = exif_of(through(path, JPEG))
    assert first[ORIENTATION] == 1


@pytest.mark.parametrize("ending", ["jpg", "webp", "tif"])
def test_xmp_is_kept_and_its_orientation_becomes_upright(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"in.{ending}"
    if ending == "tif":
        save(path, corners(), tiffinfo={700: XMP})
    else:
        save(path, corners(), xmp=XMP)
    xmp = read_image(through(path, WEBP)).metadata.xmp
    assert xmp is not None
    assert b'tiff:Orientation="1"' in xmp


@pytest.mark.parametrize("target", [PNG, JPEG, TIFF], ids=lambda f: f.name)
def test_the_resolution_is_kept(tmp_path: Path, target: ImageFormat) -> None:
    path = tmp_path / "in.png"
    save(path, corners(), dpi=(300, 300))
    dpi = Image.open(through(path, target)).info["dpi"]
    assert [float(axis) for axis in dpi] == pytest.approx([300, 300], abs=0.5)


def test_resolution_that_only_exif_knows_is_not_overwritten(tmp_path: Path) -> None:
    block = exif()
    block[0x011A], block[0x011B], block[0x0128] = 240.0, 240.0, 2
    save(tmp_path / "in.webp", corners(), exif=block)
    dpi = Image.open(through(tmp_path / "in.webp", JPEG)).info["dpi"]
    assert [float(axis) for axis in dpi] == pytest.approx([240, 240], abs=0.5)


def test_the_old_thumbnail_is_not_copied(tmp_path: Path) -> None:
    import pyvips

    thumbnail = tmp_path / "thumbnail.jpg"
    save(thumbnail, np.zeros((8, 8, 3), np.uint8))
    save(tmp_path / "plain.jpg", corners(), exif=exif().tobytes())
    image = pyvips.Image.new_from_file(str(tmp_path / "plain.jpg")).copy()
    image.set_type(pyvips.GValue.blob_type, "jpeg-thumbnail-data", thumbnail.read_bytes())
    image.jpegsave(str(tmp_path / "in.jpg"))

    def has_thumbnail(path: Path) -> bool:
        return "jpeg-thumbnail-data" in pyvips.Image.new_from_file(str(path)).get_fields()

    assert has_thumbnail(tmp_path / "in.jpg")
    out = through(tmp_path / "in.jpg", JPEG)
    assert not has_thumbnail(out)
    assert exif_of(out)[0][MODEL] == "Camera One"


def test_a_sixteen_bit_rgba_png_keeps_depth_alpha_and_profile(tmp_path: Path) -> None:
    import pyvips

    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 4), dtype=np.uint16)
    image = pyvips.Image.new_from_array(pixels, interpretation="rgb16").copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", rgb_profile())
    image.pngsave(str(tmp_path / "in.png"))
    for target in (PNG, TIFF):
        out = read_image(through(tmp_path / "in.png", target))
        assert out.pixels.dtype == np.uint16
        np.testing.assert_array_equal(out.pixels[::4, ::4], pixels)
        assert out.metadata.icc == rgb_profile()


@pytest.mark.parametrize("junk", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"])
@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_an_image_with_damaged_exif_is_read(tmp_path: Path, junk: bytes, target: ImageFormat) -> None:
    Image.fromarray(corners()).save(tmp_path / "in.webp", lossless=True, exif=junk)
    out = read_image(through(tmp_path / "in.webp", target))
    assert out.pixels.shape == (80, 120, 3)


def test_an_image_with_a_damaged_profile_is_read(tmp_path: Path) -> None:
    save(tmp_path / "in.webp", corners(), icc_profile=b"no profile at all")
    for target in FORMATS:
        assert read_image(through(tmp_path / "in.webp", target)).pixels.shape == (80, 120, 3)


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_big_endian_exif_is_understood(tmp_path: Path, target: ImageFormat) -> None:
    block = exif(orientation=3)
    block.endian = ">"
    assert block.tobytes()[6:8] == b"MM"
    save(tmp_path / "in.jpg", corners(), exif=block.tobytes())
    first, details, _ = exif_of(through(tmp_path / "in.jpg", target))
    assert (first[MODEL], first[ORIENTATION]) == ("Camera One", 1)
    assert details[TAKEN] == "2021:02:03 04:05:06"
