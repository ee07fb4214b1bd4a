"""Colour chunks of PNG files are copied: as chunks to PNG, as an ICC profile to other formats."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from savl.images.format import JPEG, PNG, TIFF, WEBP, ImageFormat
from savl.images.icc_profile import profile_of
from savl.images.metadata import losses
from savl.images.metadata_record import PngColour
from savl.images.png_chunks import encode_chunk, read_chunks
from savl.images.read import read_image
from savl.images.read_only_metadata import read_heif
from savl.images.write import write_image

OTHERS = [JPEG, WEBP, TIFF]
SAMPLE = (180, 110, 60)
SRGB_XY = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE_XY = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


def png(path: Path, *chunks: tuple[bytes, bytes], gray: bool = False, bits: int = 8) -> Path:
    """Write a PNG file of one colour with chunks between its header and its samples."""
    channels, colour_type = (1, 0) if gray else (3, 2)
    values = SAMPLE[1:2] if gray else SAMPLE
    row = b"\0" + np.tile(np.array(values, np.uint8) if bits == 8 else np.array(values, ">u2") * 257, 8).tobytes()
    assert len(row) == 1 + 8 * channels * bits // 8
    header = struct.pack(">IIBBBBB", 8, 8, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(row * 8)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(encode_chunk(*part) for part in parts))
    return path


def chunks_of(path: Path) -> dict[bytes, bytes]:
    with open(path, "rb") as file:
        return {chunk.name: chunk.data for chunk in read_chunks(file)}


def through(source: Path, image_format: ImageFormat) -> Path:
    picture = read_image(source)
    target = source.with_name(f"out.{image_format.name}")
    write_image(target, picture.pixels.repeat(4, 0).repeat(4, 1), picture.metadata, image_format=image_format)
    return target


def linear(value: float, transfer: object) -> float:
    """Return the linear light of an encoded value in [0, 1], by the formulas of the standards."""
    if transfer == "sRGB":  # IEC 61966-2-1
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
    if transfer == "BT.709":
        return value / 4.5 if value < 0.081 else ((value + 0.099) / 1.099) ** (1 / 0.45)
    if transfer == "PQ":  # SMPTE ST 2084, relative to 203 cd/m²
        power = value ** (32 / 2523)
        nits = 10000 * (max(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)
        return min(nits / 203, 1)
    assert isinstance(transfer, float)
    return value**transfer


def expected(primaries: tuple[int, ...], transfer: object) -> list[int]:
    """Return SAMPLE in sRGB, converted through XYZ; all primaries here have the white point of sRGB."""
    to_xyz = [matrix(primaries), matrix(SRGB_XY)]
    light = np.array([linear(value / 255, transfer) for value in SAMPLE])
    srgb = np.clip(np.linalg.solve(to_xyz[1], to_xyz[0] @ light), 0, 1)
    encoded = np.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055)
    return [round(255 * value) for value in encoded]


def matrix(chromaticities: tuple[int, ...]) -> np.ndarray:
    points = np.array(chromaticities, float).reshape(4, 2) / 100000
    xyz = np.stack([points[:, 0] / points[:, 1], np.ones(4), (1 - points.sum(1)) / points[:, 1]])
    return xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])


def shown(icc: bytes, sample: tuple[int, ...] = SAMPLE) -> tuple[int, ...]:
    """Return a pixel of the profile in sRGB, as converted by littleCMS."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    picture = Image.new("RGB" if len(sample) == 3 else "L", (1, 1), sample if len(sample) == 3 else sample[0])
    srgb = ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB", renderingIntent=intent).getpixel((0, 0))


P3_XY = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
BT2020_XY = (31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600)
CASES = {
    "sRGB": ([(b"sRGB", b"\0")], SRGB_XY, "sRGB"),
    "gamma 1": ([(b"gAMA", struct.pack(">I", 100000))], SRGB_XY, 1.0),
    "gamma 2.2": ([(b"gAMA", struct.pack(">I", 45455))], SRGB_XY, 2.2),
    "Adobe RGB": ([(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", struct.pack(">8I", *ADOBE_XY))], ADOBE_XY, 2.2),
    "Display P3": ([(b"cICP", bytes([12, 13, 0, 1]))], P3_XY, "sRGB"),
    "BT.2020": ([(b"cICP", bytes([9, 1, 0, 1]))], BT2020_XY, "BT.709"),
    "BT.709": ([(b"cICP", bytes([1, 1, 0, 1]))], SRGB_XY, "BT.709"),
    "PQ": ([(b"cICP", bytes([9, 16, 0, 1]))], BT2020_XY, "PQ"),
    "PQ with mastering": (
        [(b"cICP", bytes([1, 16, 0, 1])), (b"mDCV", bytes(range(1, 25))), (b"cLLI", bytes(range(1, 9)))],
        SRGB_XY,
        "PQ",
    ),
    "linear P3": ([(b"cICP", bytes([12, 8, 0, 1]))], P3_XY, 1.0),
    "cICP before all others": (
        [(b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000))],
        P3_XY,
        "sRGB",
    ),
    "sRGB before gAMA": ([(b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\1")], SRGB_XY, "sRGB"),
}


@pytest.mark.parametrize("case", CASES)
def test_png_keeps_the_chunks_byte_for_byte(tmp_path: Path, case: str) -> None:
    chunks, _, _ = CASES[case]
    out = chunks_of(through(png(tmp_path / "in.png", *chunks), PNG))
    for name, data in chunks:
        assert out[name] == data
    assert b"iCCP" not in out


@pytest.mark.parametrize("target", OTHERS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", CASES)
def test_other_formats_get_a_profile_that_shows_the_same_colours(
    tmp_path: Path, case: str, target: ImageFormat
) -> None:
    chunks, primaries, transfer = CASES[case]
    icc = Image.open(through(png(tmp_path / "in.png", *chunks), target)).info["icc_profile"]
    np.testing.assert_allclose(shown(icc), expected(primaries, transfer), atol=2)


def test_hlg_white_is_its_reference_white() -> None:
    """75 % of the signal is the white of graphics and paper (BT.2408), and must be shown as white."""
    icc = profile_of(PngColour(cicp=bytes([9, 18, 0, 1])), gray=False)
    assert icc is not None
    assert min(shown(icc, (192, 192, 192))) >= 253
    assert max(shown(icc, (128, 128, 128))) < 200


def test_narrow_range_has_black_at_16_and_white_at_235() -> None:
    icc = profile_of(PngColour(cicp=bytes([1, 13, 0, 0])), gray=False)
    assert icc is not None
    assert max(shown(icc, (16, 16, 16))) <= 1
    assert min(shown(icc, (235, 235, 235))) >= 254
    middle = round((126 - 16) / 219 * 255)
    np.testing.assert_allclose(shown(icc, (126, 126, 126)), [middle] * 3, atol=2)


@pytest.mark.parametrize("gamma", [100000, 45455, 55556])
def test_a_gray_picture_with_gamma_gets_a_gray_profile_or_rgb_where_stored_so(tmp_path: Path, gamma: int) -> None:
    source = png(tmp_path / "in.png", (b"gAMA", struct.pack(">I", gamma)), gray=True)
    light = (SAMPLE[1] / 255) ** (100000 / gamma)
    value = round(255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055))
    for target in OTHERS:
        picture = Image.open(through(source, target))
        assert picture.mode == ("RGB" if target is WEBP else "L")
        icc = picture.info["icc_profile"]
        assert icc[16:20] == (b"RGB " if target is WEBP else b"GRAY")
        sample = (SAMPLE[1],) * (3 if target is WEBP else 1)
        np.testing.assert_allclose(shown(icc, sample), [value] * 3, atol=2)


MALFORMED = {
    "gamma of 0": (b"gAMA", bytes(4)),
    "gamma of three bytes": (b"gAMA", b"\0\1\2"),
    "rendering intent 9": (b"sRGB", b"\x09"),
    "cICP of a YCbCr matrix": (b"cICP", bytes([9, 16, 9, 1])),
    "cICP of five bytes": (b"cICP", bytes(5)),
    "primaries on one line": (b"cHRM", struct.pack(">8I", 31270, 32900, *[30000, 30000] * 3)),
    "white of no light": (b"cHRM", struct.pack(">8I", 31270, 0, *SRGB_XY[2:])),
    "sBIT of 0": (b"sBIT", b"\0\0\0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_chunks_say_nothing(tmp_path: Path, case: str) -> None:
    source = png(tmp_path / "in.png", MALFORMED[case])
    assert set(chunks_of(through(source, PNG))) == {b"IHDR", b"IEND"}
    for target in OTHERS:
        assert "icc_profile" not in Image.open(through(source, target)).info


def test_primaries_without_numbers_are_reported_and_the_next_chunk_counts(tmp_path: Path) -> None:
    source = png(tmp_path / "in.png", (b"cICP", bytes([2, 2, 0, 1])), (b"gAMA", struct.pack(">I", 100000)))
    picture = read_image(source)
    assert losses(picture.metadata, picture.pixels, picture.pixels, PNG) == []
    (sentence,) = losses(picture.metadata, picture.pixels, picture.pixels, JPEG)
    assert sentence == "left out: the colour code points 2/2 (cICP)"
    icc = Image.open(through(source, JPEG)).info["icc_profile"]
    np.testing.assert_allclose(shown(icc), expected(SRGB_XY, 1.0), atol=2)


def test_a_profile_ranks_after_cicp_and_before_gamma(tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = (b"iCCP", b"x\0\0" + zlib.compress(icc))
    gamma, cicp = (b"gAMA", struct.pack(">I", 100000)), (b"cICP", bytes([12, 13, 0, 1]))
    out = through(png(tmp_path / "a.png", gamma, profile), JPEG)
    assert Image.open(out).info["icc_profile"] == icc
    out = through(png(tmp_path / "b.png", cicp, profile), WEBP)
    np.testing.assert_allclose(shown(Image.open(out).info["icc_profile"]), expected(P3_XY, "sRGB"), atol=2)
    out = through(tmp_path / "b.png", PNG)
    assert Image.open(out).info["icc_profile"] == icc
    assert chunks_of(out)[b"cICP"] == cicp[1]


@pytest.mark.parametrize(
    ("bits", "stored", "kept"), [(b"\5\6\5", np.uint8, b"\5\6\5"), (b"\x0c\x0c\x0a", np.uint8, b"\x08\x08\x08")]
)
def test_significant_bits_are_kept_up_to_the_stored_depth(
    tmp_path: Path, bits: bytes, stored: type[np.uint8], kept: bytes
) -> None:
    picture = read_image(png(tmp_path / "in.png", (b"sBIT", bits), bits=16))
    assert picture.pixels.dtype == np.uint16
    write_image(tmp_path / "same.png", picture.pixels, picture.metadata, image_format=PNG)
    assert chunks_of(tmp_path / "same.png")[b"sBIT"] == bits
    write_image(tmp_path / "out.png", picture.pixels.astype(stored), picture.metadata, image_format=PNG)
    assert chunks_of(tmp_path / "out.png")[b"sBIT"] == kept
    assert losses(picture.metadata, picture.pixels, picture.pixels, TIFF) == [
        "left out: the number of significant bits (sBIT)"
    ]


def test_gray_bits_and_background_follow_a_picture_that_becomes_rgb(tmp_path: Path) -> None:
    picture = read_image(png(tmp_path / "in.png", (b"sBIT", b"\6"), (b"bKGD", b"\0\x40"), gray=True))
    colour = np.repeat(picture.pixels, 3, axis=2)
    write_image(tmp_path / "out.png", colour, picture.metadata, image_format=PNG)
    out = chunks_of(tmp_path / "out.png")
    assert out[b"sBIT"] == b"\6\6\6"
    assert out[b"bKGD"] == b"\0\x40" * 3


def test_hdr_data_that_a_profile_cannot_store_is_reported(tmp_path: Path) -> None:
    picture = read_image(png(tmp_path / "in.png", *CASES["PQ with mastering"][0]))
    (sentence,) = losses(picture.metadata, picture.pixels, picture.pixels, JPEG)
    assert "light above PQ's white" in sentence
    assert "mDCV, cLLI" in sentence


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that writes AVIF")
@pytest.mark.parametrize("points", [(12, 13), (9, 16)])
def test_code_points_of_avif_become_those_of_png(points: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), SAMPLE).save(buffer, "avif", quality=100)
    content = bytearray(buffer.getvalue())
    assert read_heif(io.BytesIO(content)).colour.cicp is None, "what viewers assume anyway"
    at = content.index(b"nclx") + 4
    content[at : at + 4] = struct.pack(">HH", *points)
    assert read_heif(io.BytesIO(content)).colour.cicp == bytes([*points, 0, 1])
    for size in range(0, len(content), 3):
        read_heif(io.BytesIO(content[:size]))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (b"urn:com:apple:photo:2020:aux:hdrgainmap\0", ("the HDR gain map",)),
        (b"urn:mpeg:hevc:2015:auxid:2\0", ("the depth map",)),
        (b"urn:mpeg:hevc:2015:auxid:1\0", ()),
    ],
    ids=["gain map", "depth", "alpha"],
)
def test_further_images_of_heic_are_reported(kind: bytes, words: tuple[str, ...]) -> None:
    def box(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), name) + content

    auxiliary = box(b"iprp", box(b"ipco", box(b"auxC", bytes(4) + kind)))
    content = box(b"ftyp", b"heic" + bytes(4)) + box(b"meta", bytes(4) + auxiliary)
    assert read_heif(io.BytesIO(content)).lost == words


def icc_of(space: bytes, version: int = 4) -> bytes:
    """Return a valid profile that declares a colour space."""
    icc = profile_of(PngColour(intent=0), gray=space == b"GRAY")
    assert icc is not None
    return icc[:8] + bytes([version]) + icc[9:16] + space + icc[20:]


def with_length(icc: bytes, more: int) -> bytes:
    return struct.pack(">I", len(icc) + more) + icc[4:]


PROFILES = {
    "sound": icc_of(b"RGB "),
    "4 too long": with_length(icc_of(b"RGB "), 4),
    "4 too short": with_length(icc_of(b"RGB "), -4),
    "no multiple of 4": with_length(icc_of(b"RGB "), 1) + b"x",
    "for GRAY": icc_of(b"GRAY"),
    "for CMYK": icc_of(b"CMYK"),
    "for Lab": icc_of(b"Lab "),
    "junk": b"junk" * 60,
    "cut": with_length(icc_of(b"RGB ")[:-40], 0),
}


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("kind", PROFILES)
@pytest.mark.parametrize("target", [PNG, *OTHERS], ids=lambda f: f.name)
def test_a_profile_that_png_decoders_refuse_is_kept_or_named(
    tmp_path: Path, kind: str, target: ImageFormat, gray: bool
) -> None:
    source = png(tmp_path / "in", (b"iCCP", b"icc\0\0" + zlib.compress(PROFILES[kind])), gray=gray)
    read = read_image(source)
    stored = "gray" if gray and target is not WEBP else "RGB"
    icc = Image.open(through(source, target)).info.get("icc_profile")
    lost = losses(read.metadata, read.pixels, read.pixels, target)
    if kind in ("junk", "cut"):
        assert icc is None
        assert lost == ["left out: the colour profile, which is damaged"]
    elif {"GRAY": "gray", "RGB": "RGB"}.get(kind[4:] if kind.startswith("for") else "RGB") == stored:
        assert lost == []
        if kind.startswith("for"):
            assert icc == PROFILES[kind]
            return
        assert icc is not None
        assert int.from_bytes(icc[:4], "big") == len(icc)
        assert len(icc) % 4 == 0
        if not gray:
            # littleCMS converts with the repaired profile as with the valid one.
            assert shown(icc) == shown(PROFILES["sound"])
        if target is PNG:  # its decoder accepts the repaired profile
            import pyvips

            assert pyvips.Image.new_from_file(str(tmp_path / "out.png")).get("icc-profile-data") == icc
    else:
        space = kind[4:] if kind.startswith("for") else "RGB"
        assert icc is None
        assert lost == [
            f"the colour profile was left out: it is for {space}, and {target.title} stores this as {stored}"
        ]


def test_a_profile_after_the_samples_is_ignored_and_named(tmp_path: Path) -> None:
    whole = png(tmp_path / "in").read_bytes()
    chunk = encode_chunk(b"iCCP", b"icc\0\0" + zlib.compress(PROFILES["sound"]))
    (tmp_path / "in").write_bytes(whole[:-12] + chunk + whole[-12:])
    read = read_image(tmp_path / "in")
    assert read.metadata.icc is None
    assert losses(read.metadata, read.pixels, read.pixels, JPEG) == ["left out: a colour profile after the samples"]
