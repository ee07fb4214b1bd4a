"""White point, primaries and transfer function of TIFF files keep their meaning in every output format."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from savl.images.format import FORMATS, JPEG, PNG, TIFF, WEBP, ImageFormat
from savl.images.metadata import losses
from savl.images.read import read_image
from savl.images.write import write_image

OTHERS = [PNG, JPEG, WEBP]
WHITE = (0.3127, 0.3290)
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
P3 = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
SIGNAL = np.arange(256) / 255
GAMMAS = (1.4, 1.8, 2.6)
ONE_TABLE = tuple(np.round(65535 * SIGNAL**1.8).astype(int).tolist())
THREE_TABLES = tuple(np.concatenate([np.round(65535 * SIGNAL**gamma) for gamma in GAMMAS]).astype(int).tolist())
SAMPLES = np.random.default_rng(0).integers(20, 236, (6, 8, 3), dtype=np.uint8)


def srgb_curve(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def matrix(primaries: tuple[float, ...]) -> np.ndarray:
    points = np.array([*primaries, *WHITE]).reshape(4, 2)
    xyz = np.stack([points[:, 0] / points[:, 1], np.ones(4), (1 - points.sum(1)) / points[:, 1]])
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


def in_srgb(primaries: tuple[float, ...], light: np.ndarray) -> np.ndarray:
    """Convert linear light (H, W, 3) of the given primaries to sRGB, 0 to 255."""
    linear = np.clip(light @ (np.linalg.inv(matrix(SRGB)) @ matrix(primaries)).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def tiff(path: Path, entries: dict[int, object], samples: np.ndarray = SAMPLES) -> Path:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in entries.items():
        info.tagtype[tag] = 3 if tag in (301, 342) else 5
        info[tag] = value
    Image.fromarray(samples).save(path, "tiff", tiffinfo=info)
    return path


def gray_tiff(path: Path, photometric: int, table: tuple[int, ...]) -> Path:
    """Write a gray file of the first band of the samples with a transfer function."""
    height, width = SAMPLES.shape[:2]
    fields = [(256, width), (257, height), (258, 8), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    fields.append((279, width * height))
    table_at = 8 + width * height
    directory_at = table_at + 2 * len(table)
    directory = struct.pack("<H", len(fields) + 1)
    directory += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in fields)
    directory += struct.pack("<HHIII", 301, 3, len(table), table_at, 0)
    samples = SAMPLES[:, :, 0] if photometric else 255 - SAMPLES[:, :, 0]
    content = b"II*\0" + struct.pack("<I", directory_at) + samples.tobytes()
    path.write_bytes(content + struct.pack(f"<{len(table)}H", *table) + directory)
    return path


def through(source: Path, target: ImageFormat, dtype: type = np.uint8) -> tuple[Image.Image, list[str]]:
    read = read_image(source)
    pixels = read.pixels if read.pixels.dtype == dtype else (read.pixels >> 8).astype(np.uint8)
    out = source.with_name(f"out.{target.name}")
    write_image(out, pixels, read.metadata, image_format=target, quality=100, overwrite=True)
    return Image.open(out), losses(read.metadata, read.pixels, pixels, target)


def shown(samples: np.ndarray, icc: bytes) -> np.ndarray:
    """Return samples of a profile in sRGB, as converted by littleCMS."""
    picture = Image.fromarray(samples)
    profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return np.asarray(ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB", renderingIntent=intent))


CASES = {
    "primaries": ({319: P3}, P3, srgb_curve),
    "white and primaries": ({318: WHITE, 319: P3}, P3, srgb_curve),
    "white": ({318: WHITE}, SRGB, srgb_curve),
    "one table": ({301: ONE_TABLE}, SRGB, lambda signal: signal**1.8),
    "three tables": ({301: THREE_TABLES, 342: (0, 255) * 3}, SRGB, lambda signal: signal ** np.array(GAMMAS)),
    "all": ({301: ONE_TABLE, 318: WHITE, 319: P3}, P3, lambda signal: signal**1.8),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", OTHERS, ids=lambda f: f.name)
def test_other_formats_get_a_profile_that_shows_the_same_colours(
    tmp_path: Path, case: str, target: ImageFormat
) -> None:
    entries, primaries, curve = CASES[case]
    out, lost = through(tiff(tmp_path / "in", entries), target)
    assert lost == []
    expected = in_srgb(primaries, curve(SAMPLES / 255))
    np.testing.assert_allclose(shown(SAMPLES, out.info["icc_profile"]), expected, atol=1.6)


@pytest.mark.parametrize("case", CASES)
def test_tiff_keeps_the_entries_as_they_are(tmp_path: Path, case: str) -> None:
    entries = CASES[case][0]
    out, lost = through(tiff(tmp_path / "in", entries), TIFF)
    assert lost == []
    assert "icc_profile" not in out.info
    for tag, value in entries.items():
        np.testing.assert_allclose(np.ravel([float(v) for v in np.ravel(out.tag_v2[tag])]), np.ravel(value), atol=1e-6)


def test_a_transfer_function_becomes_a_profile_where_the_depth_changes(tmp_path: Path) -> None:
    table = tuple(np.round(65535 * (np.arange(65536) / 65535) ** 1.8).astype(int).tolist())
    read = read_image(tiff(tmp_path / "in", {301: ONE_TABLE, 319: P3}))
    wide = read.pixels.astype(np.uint16) * 257
    write_image(tmp_path / "wide", wide, read.metadata, image_format=TIFF)
    out = Image.open(tmp_path / "wide")
    assert 301 not in out.tag_v2
    np.testing.assert_allclose([float(v) for v in out.tag_v2[319]], P3, atol=1e-6)
    expected = in_srgb(P3, (SAMPLES / 255) ** 1.8)
    np.testing.assert_allclose(shown(SAMPLES, out.info["icc_profile"]), expected, atol=1.6)
    assert losses(read.metadata, read.pixels, wide, TIFF) == []
    # From 16 bits to 8, with a gray file.
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype[301] = 3
    info[301] = table
    Image.fromarray(SAMPLES[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "gray", "tiff", tiffinfo=info)
    out, lost = through(tmp_path / "gray", TIFF)
    assert lost == ["rounded from 16 bits per sample to 8"]
    light = np.repeat((SAMPLES[:, :, :1] / 255) ** 1.8, 3, axis=2)
    np.testing.assert_allclose(shown(SAMPLES[:, :, 0], out.info["icc_profile"]), in_srgb(SRGB, light), atol=1.6)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_gray_keeps_its_curve_either_way_round(tmp_path: Path, photometric: int, target: ImageFormat) -> None:
    table = ONE_TABLE if photometric else ONE_TABLE[::-1]
    source = gray_tiff(tmp_path / "in", photometric, table)
    np.testing.assert_array_equal(read_image(source).pixels[:, :, 0], SAMPLES[:, :, 0])
    out, lost = through(source, target)
    assert lost == []
    if target is TIFF:
        assert out.tag_v2[262] == 1
        assert tuple(np.ravel(out.tag_v2[301])) == ONE_TABLE
        return
    gray = SAMPLES[:, :, 0] if target is not WEBP else np.repeat(SAMPLES[:, :, :1], 3, axis=2)
    expected = in_srgb(SRGB, np.repeat((SAMPLES[:, :, :1] / 255) ** 1.8, 3, axis=2))
    np.testing.assert_allclose(shown(gray, out.info["icc_profile"]), expected, atol=1.6)


@pytest.mark.parametrize("target", OTHERS, ids=lambda f: f.name)
def test_colour_data_that_no_profile_can_store_is_reported(tmp_path: Path, target: ImageFormat) -> None:
    senseless = tiff(tmp_path / "a", {319: (0.0,) * 6})
    assert through(senseless, target)[1] == ["left out: the primary chromaticities"]
    ranged = tiff(tmp_path / "b", {301: ONE_TABLE, 342: (16, 235) * 3})
    assert through(ranged, target)[1] == ["left out: the transfer range"]
    damaged = tiff(tmp_path / "c", {301: ONE_TABLE[:200], 319: P3})
    out, lost = through(damaged, target)
    assert lost == ["left out: the transfer function"]
    assert "icc_profile" in out.info


def test_colour_entries_are_not_copied_if_samples_become_srgb(tmp_path: Path) -> None:
    cmyk = np.dstack([SAMPLES, SAMPLES[:, :, :1]])
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype[318] = 5
    info[318] = WHITE
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "in", "tiff", tiffinfo=info)
    out, lost = through(tmp_path / "in", TIFF)
    assert 318 not in out.tag_v2
    assert lost == ["left out: the white point"]


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_a_profile_ranks_before_the_entries(tmp_path: Path, target: ImageFormat) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype[319] = 5
    info[319] = P3
    Image.fromarray(SAMPLES).save(tmp_path / "in", "tiff", tiffinfo=info, icc_profile=icc)
    out, lost = through(tmp_path / "in", target)
    assert out.info["icc_profile"] == icc
    assert lost == []
