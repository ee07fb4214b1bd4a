"""Each metadata field is copied to every format that can store it, and reported for every other format."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, IptcImagePlugin, TiffImagePlugin, features

from savl.images.format import JPEG, PNG, TIFF, WEBP, ImageFormat
from savl.images.jpeg_structure import encode_segment, read_segments
from savl.images.metadata import losses
from savl.images.png_chunks import encode_chunk, read_chunks
from savl.images.read import read_image
from savl.images.result_mark import UPSCALED, read_mark
from savl.images.write import write_image

FORMATS = (PNG, JPEG, WEBP, TIFF)
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
TEXTS = {"Title": "A título", "Author": "Ada", "Description": "Fields", "Copyright": "© Ada"}


def packet(properties: str, inner: str = "") -> bytes:
    names = "".join(
        f' xmlns:{prefix}="{uri}"'
        for prefix, uri in {
            "tiff": "http://ns.adobe.com/tiff/1.0/",
            "exif": "http://ns.adobe.com/exif/1.0/",
            "dc": "http://purl.org/dc/elements/1.1/",
            "xmp": "http://ns.adobe.com/xap/1.0/",
        }.items()
    )
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""{names} '
        f"{properties}>{inner}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def resource(number: int, content: bytes) -> bytes:
    return b"8BIM" + struct.pack(">H2xI", number, len(content)) + content + bytes(len(content) % 2)


IPTC = b"\x1c\x02\x00\x00\x02\x00\x04" + b"\x1c\x02\x50\x00\x03Ada"  # record version 4, by-line "Ada"
RESOURCES = resource(0x0404, IPTC) + resource(1034, b"\1") + resource(1036, b"old thumbnail")
XMP = packet('dc:format="image/x" tiff:ImageWidth="8" exif:PixelYDimension="6"')


def picture(width: int = 8, height: int = 6) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), (120, 90, 60), np.uint8))


def with_chunks(path: Path, *chunks: tuple[bytes, bytes], after: bool = False) -> Path:
    """Write a PNG file with chunks before or after its samples."""
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    whole = buffer.getvalue()
    at = len(whole) - 12 if after else 33
    path.write_bytes(whole[:at] + b"".join(encode_chunk(*chunk) for chunk in chunks) + whole[at:])
    return path


def with_segments(path: Path, *segments: tuple[int, bytes]) -> Path:
    """Write a JPEG file with segments after its JFIF segment."""
    buffer = io.BytesIO()
    picture().save(buffer, "jpeg", quality=95)
    whole = buffer.getvalue()
    path.write_bytes(whole[:20] + b"".join(encode_segment(*segment) for segment in segments) + whole[20:])
    return path


def source_with(path: Path, field: str, image_format: ImageFormat) -> Path:
    """Write a file of a format with a field, without using savl."""
    if image_format is PNG:
        raw = b"\niptc\n%8d\n%s\n" % (len(RESOURCES), RESOURCES.hex().encode())
        chunks = {
            "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
            "iptc": (b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(raw)),
            "resolution": (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
            "comment": (b"tEXt", b"Comment\0hand-written"),
        }
        return with_chunks(path, chunks[field])
    if image_format is JPEG:
        if field == "resolution":
            picture().save(path, "jpeg", dpi=(300, 300))
            return path
        segments = {
            "xmp": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
            "iptc": (0xED, b"Photoshop 3.0\0" + RESOURCES),
            "comment": (0xFE, b"hand-written"),
        }
        return with_segments(path, segments[field])
    if image_format is WEBP:
        block = Image.Exif()
        block[0x011A], block[0x011B], block[0x0128] = 300.0, 300.0, 2
        options: dict[str, Any] = {"xmp": {"xmp": XMP}, "resolution": {"exif": block}}
        picture().save(path, "webp", lossless=True, **options[field])
        return path
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if field == "xmp":
        info[700] = XMP
    elif field == "iptc":
        info.tagtype[33723] = info.tagtype[34377] = 7
        info[33723], info[34377] = IPTC, RESOURCES
    else:
        info[282], info[283], info[296] = 300.0, 300.0, 2
    picture().save(path, "tiff", tiffinfo=info)
    return path


HOLDERS = {
    "xmp": FORMATS,
    "iptc": (PNG, JPEG, TIFF),
    "resolution": FORMATS,
    "comment": (PNG, JPEG),
}
PAIRS = [(field, source, target) for field, sources in HOLDERS.items() for source in sources for target in FORMATS]


def through(source: Path, target: ImageFormat, factor: int = 4) -> tuple[Path, list[str]]:
    """Read a file, write it larger, and return the new path and the notes about lost metadata."""
    read = read_image(source)
    enlarged = read.pixels.repeat(factor, 0).repeat(factor, 1)
    out = source.with_name(f"out.{target.name}")
    write_image(out, enlarged, read.metadata, image_format=target, mark=UPSCALED, overwrite=True)
    assert read_mark(out) == UPSCALED
    return out, losses(read.metadata, read.pixels, enlarged, target)


def xmp_of(path: Path) -> bytes:
    info = Image.open(path).info
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    return xmp.encode() if isinstance(xmp, str) else bytes(xmp)


def segments_of(path: Path) -> list[tuple[int, bytes]]:
    with open(path, "rb") as file:
        return [(segment.marker, segment.content) for segment in read_segments(file)]


def chunk_names(path: Path) -> list[bytes]:
    with open(path, "rb") as file:
        return [chunk.name for chunk in read_chunks(file)]


def user_comment(path: Path) -> bytes:
    return bytes(Image.open(path).getexif().get_ifd(0x8769).get(0x9286, b""))


@pytest.mark.parametrize(("field", "source", "target"), PAIRS, ids=lambda v: getattr(v, "name", v))
def test_a_field_is_copied_or_reported(tmp_path: Path, field: str, source: ImageFormat, target: ImageFormat) -> None:
    out, lost = through(source_with(tmp_path / "in", field, source), target)
    opened = Image.open(out)
    opened.load()
    if field == "xmp":
        held = xmp_of(out)
        assert b'dc:format="image/x"' in held
        assert b'tiff:ImageWidth="32"' in held
        assert b'exif:PixelYDimension="24"' in held
    elif field == "resolution":
        found = opened.info.get("dpi")
        if found is None:
            block = opened.getexif()
            found = (block[0x011A], block[0x011B])
        np.testing.assert_allclose([float(v) for v in found], 300, atol=0.02)
    elif field == "iptc" and target is PNG:
        assert "Raw profile type iptc" in opened.info
        assert read_image(out).metadata.iptc == IPTC
    elif field == "iptc" and target is not WEBP:
        info = IptcImagePlugin.getiptcinfo(opened)
        assert info is not None
        assert info[2, 80] == b"Ada"
        assert b"old thumbnail" not in out.read_bytes()
    elif field == "comment" and target is PNG:
        assert opened.info["Comment"] == "hand-written"
    elif field == "comment" and target is JPEG:
        assert opened.info["comment"] == b"hand-written"
    elif field == "comment":
        assert user_comment(out) == b"ASCII\0\0\0hand-written"
    expected = ["left out: IPTC and Photoshop's image resources"] if field == "iptc" and target is WEBP else []
    assert lost == expected


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("source", FORMATS, ids=lambda f: f.name)
def test_an_image_without_metadata_gets_only_the_mark(tmp_path: Path, source: ImageFormat, target: ImageFormat) -> None:
    picture().save(tmp_path / "in", source.title)
    read = read_image(tmp_path / "in")
    out = tmp_path / "out"
    write_image(out, read.pixels, read.metadata, image_format=target)
    opened = Image.open(out)
    assert not opened.getexif().keys() & {0x011A, 0x011B, 0x0128, 0x8769, 0x0131, 0x0213}
    if target is TIFF:  # Pillow has its own argument for its resolution
        assert not set(opened.tag_v2) & {282, 283, 296}
    else:
        assert "dpi" not in opened.info
    assert not set(opened.info) & {"exif", "xmp", "icc_profile", "XML:com.adobe.xmp", "photoshop", "comment"}
    if target is PNG:
        assert chunk_names(out) == [b"IHDR", b"IEND"]
    if target is JPEG:
        assert segments_of(out) == [(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")]
    if target is WEBP:
        assert out.read_bytes()[12:16] in (b"VP8 ", b"VP8L")
    write_image(out, read.pixels, read.metadata, image_format=target, mark=UPSCALED, overwrite=True)
    if target is PNG:
        assert chunk_names(out) == [b"IHDR", b"iTXt", b"IEND"]
    if target is JPEG:
        assert [marker for marker, _ in segments_of(out)] == [0xE0, 0xE1]


def test_png_texts_are_unchanged_in_png(tmp_path: Path) -> None:
    texts = [
        (b"tEXt", b"parameters\0a lighthouse, Seed: 7"),
        (b"iTXt", b"workflow\0\0\0en\0w\0" + '{"ü": 1}'.encode()),
        (b"zTXt", b"Copyright\0\0" + zlib.compress(b"Ada")),
        (b"tEXt", b"Title\0one"),
        (b"tEXt", b"Title\0two"),
    ]
    out, lost = through(with_chunks(tmp_path / "in", *texts), PNG)
    with open(out, "rb") as file:
        kept = [(chunk.name, chunk.data) for chunk in read_chunks(file) if chunk.data.count(b"XML:com") == 0]
    assert [entry for entry in kept if entry[0] != b"IHDR"][:-1] == texts
    assert lost == []


@pytest.mark.parametrize("target", [JPEG, WEBP, TIFF], ids=lambda f: f.name)
def test_png_texts_are_converted_to_exif_and_xmp(tmp_path: Path, target: ImageFormat) -> None:
    texts = [(b"iTXt", key.encode() + b"\0\0\0\0\0" + text.encode()) for key, text in TEXTS.items()]
    texts += [(b"tEXt", b"parameters\0Steps: 20"), (b"tEXt", b"workflow\0{}"), (b"tEXt", b"prompt\0{}")]
    out, lost = through(with_chunks(tmp_path / "in", *texts), target)
    held = xmp_of(out).decode()
    for name, text in zip(("title", "creator", "description", "rights"), TEXTS.values(), strict=True):
        assert f">{text}</rdf:li>" in held.split(f"<dc:{name}>")[1].split(f"</dc:{name}>")[0]
    raw = out.read_bytes()
    for key in ("Author", "Description", "Copyright"):
        assert TEXTS[key].encode() + b"\0" in raw, f"{key} in EXIF"
    assert user_comment(out) == b"ASCII\0\0\0Steps: 20"
    assert lost == ["left out: the PNG texts workflow, prompt"]


def test_several_jpeg_comments_are_kept(tmp_path: Path) -> None:
    comments = [(0xFE, b"one"), (0xFE, "zwö".encode()), (0xFE, b"tr\xe8s")]
    source = with_segments(tmp_path / "in", *comments)
    out, lost = through(source, JPEG)
    assert [content for marker, content in segments_of(out) if marker == 0xFE] == [
        b"one",
        "zwö".encode(),
        "très".encode(),
    ]
    assert lost == []
    out, lost = through(source, PNG)
    assert read_image(out).metadata.text[1].text == "zwö"
    out, lost = through(source, WEBP)
    assert user_comment(out) == b"ASCII\0\0\0one"
    assert lost == ["left out: 2 comments"]


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_document_and_page_name_of_tiff_are_copied(tmp_path: Path, target: ImageFormat) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[269], info[285], info[270] = "Document", "Page", "Words"
    picture().save(tmp_path / "in", "tiff", tiffinfo=info)
    out, lost = through(tmp_path / "in", target)
    block = Image.open(out).getexif()
    assert (block[269], block[285], block[270]) == ("Document", "Page", "Words")
    assert lost == []


PROFILE_TEXTS = {
    "exif": lambda block: (b"exif", block),
    "exif with its signature": lambda block: (b"exif", b"Exif\0\0" + block),
    "APP1": lambda block: (b"APP1", b"Exif\0\0" + block),
}


@pytest.mark.parametrize("where", ["eXIf before", "eXIf after", *PROFILE_TEXTS])
@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_exif_is_found_everywhere_in_png_files_and_its_orientation_is_applied(
    tmp_path: Path, where: str, target: ImageFormat
) -> None:
    block = Image.Exif()
    block[0x010F], block[0x0112] = "Maker", 6
    content = block.tobytes()[6:]
    chunk = (b"eXIf", content)
    if where in PROFILE_TEXTS:
        kind, data = PROFILE_TEXTS[where](content)
        lines = b"\n".join(data.hex().encode()[at : at + 72] for at in range(0, 2 * len(data), 72))
        text = b"\n%s\n%8d\n%s\n" % (kind, len(data), lines)
        chunk = (b"zTXt", b"Raw profile type " + kind + b"\0\0" + zlib.compress(text))
    out, lost = through(with_chunks(tmp_path / "in", chunk, after=where == "eXIf after"), target)
    opened = Image.open(out)
    assert opened.size == (24, 32)
    assert (opened.getexif()[0x010F], opened.getexif()[0x0112]) == ("Maker", 1)
    assert not any(key.startswith("Raw profile") for key in opened.info)
    assert lost == []


def test_an_icc_profile_in_a_png_text_is_copied(tmp_path: Path) -> None:
    icc = bytes(16) + b"RGB " + bytes(200)
    text = b"\nicc\n%8d\n%s\n" % (len(icc), icc.hex().encode())
    out, _ = through(with_chunks(tmp_path / "in", (b"tEXt", b"Raw profile type icc\0" + text)), TIFF)
    assert Image.open(out).info["icc_profile"] == icc


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_large_exif_is_copied_and_jpeg_reports_the_largest_entry(tmp_path: Path, target: ImageFormat) -> None:
    block = Image.Exif()
    block[0x010F], block[0x0112] = "Maker", 6
    block.get_ifd(0x8769)[0x927C] = b"n" * 70000
    out, lost = through(with_chunks(tmp_path / "in", (b"eXIf", block.tobytes()[6:])), target)
    opened = Image.open(out)
    assert opened.size == (24, 32)
    assert opened.getexif()[0x010F] == "Maker"
    assert (0x927C in opened.getexif().get_ifd(0x8769)) == (target is not JPEG)
    expected = ["left out: MakerNote of EXIF, as a JPEG file holds 64 kB of it"] if target is JPEG else []
    assert lost == expected


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_large_xmp_is_stored_in_jpeg_as_extended_xmp(tmp_path: Path, target: ImageFormat) -> None:
    large = "<dc:source>" + "w" * 200_000 + "</dc:source>"
    xmp = packet('dc:format="image/x"', large)
    source = with_chunks(tmp_path / "in", (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    out, lost = through(source, target)
    assert lost == []
    assert b'dc:format="image/x"' in xmp_of(out)
    read = read_image(out).metadata.xmp
    assert read is not None
    assert large.encode() in read
    if target is JPEG:
        assert len(xmp_of(out)) < 65503
        assert b"HasExtendedXMP" in xmp_of(out)
        again, lost = through(out, PNG, factor=1)
        assert lost == []
        assert large.encode() in xmp_of(again)
        assert b"HasExtendedXMP" not in xmp_of(again)


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_a_gain_map_is_reported_and_references_to_it_are_removed(tmp_path: Path, target: ImageFormat) -> None:
    container = "http://ns.google.com/photos/1.0/container/"
    xmp = packet(
        'xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0" dc:format="image/jpeg"',
        f'<C:Directory xmlns:C="{container}"><rdf:Seq><rdf:li rdf:parseType="Resource">'
        f'<C:Item xmlns:I="{container}item/" I:Semantic="GainMap" I:Length="700"/></rdf:li></rdf:Seq></C:Directory>',
    )
    segments = [
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp),
        (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        (0xE2, b"urn:iso:std:iso:ts:21496:-1\0\0\0\0\0"),
    ]
    out, lost = through(with_segments(tmp_path / "in", *segments), target)
    raw = out.read_bytes()
    for promise in (b"hdrgm:Version", b"GainMap", b"MPF\0", b"21496"):
        assert promise not in raw
    assert b'dc:format="image/jpeg"' in raw
    assert lost == ["left out: the HDR gain map"]


def test_other_data_in_jpeg_files_are_reported(tmp_path: Path) -> None:
    segments = [(0xEB, b"JP\0\0"), (0xE4, b"vendor"), (0xE2, b"MPF\0MM\0*"), (0xEE, b"Adobe\0\x64\0\0\0\0\0")]
    _, lost = through(with_segments(tmp_path / "in", *segments), JPEG)
    (sentence,) = lost
    assert sentence == (
        "left out: content credentials or other JUMBF data, application data (APP4) "
        "and the further images in the file (MPF)"
    )


@pytest.mark.parametrize(("kind", "named"), [(0x010002, False), (0x020002, True), (0, True)])
def test_camera_previews_are_removed_silently_and_other_images_are_reported(
    tmp_path: Path, kind: int, named: bool
) -> None:
    pictures = struct.pack(">IIIHH", 0x030000, 900, 0, 0, 0) + struct.pack(">IIIHH", kind, 500, 900, 0, 0)
    block = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIII", 1, 0xB002, 7, len(pictures), 26, 0) + pictures
    _, lost = through(with_segments(tmp_path / "in", (0xE2, b"MPF\0" + block)), JPEG)
    assert lost == (["left out: the further images in the file (MPF)"] if named else [])


def test_control_characters_in_names_are_not_printed(tmp_path: Path) -> None:
    texts = [(b"tEXt", b"a\x1b[2J%d\0x" % index) for index in range(9)]
    _, lost = through(with_chunks(tmp_path / "in", *texts), WEBP)
    names = ", ".join(f"a?[2J{index}" for index in range(6))
    assert lost == [f"left out: the PNG texts {names} (3 more)"]


def test_an_exif_chunk_takes_precedence_over_exif_in_a_text(tmp_path: Path) -> None:
    blocks = []
    for orientation in (3, 6):
        block = Image.Exif()
        block[0x0112] = orientation
        blocks.append(block.tobytes()[6:])
    text = b"\nexif\n%8d\n%s\n" % (len(blocks[0]), blocks[0].hex().encode())
    chunks = [(b"tEXt", b"Raw profile type exif\0" + text), (b"eXIf", blocks[1])]
    for order in (chunks, chunks[::-1]):
        out, _ = through(with_chunks(tmp_path / "in", *order), PNG)
        assert Image.open(out).size == (24, 32)


def test_unknown_chunks_are_copied_if_they_are_safe_to_copy(tmp_path: Path) -> None:
    chunks = [(b"prVt", b"safe to copy"), (b"prVT", b"not safe"), (b"tIME", bytes(7)), (b"caBX", b"c2pa")]
    source = with_chunks(tmp_path / "in", *chunks)
    out, lost = through(source, PNG)
    with open(out, "rb") as file:
        assert ("prVt", b"safe to copy") in [(chunk.name.decode(), chunk.data) for chunk in read_chunks(file)]
    assert lost == ["left out: the PNG chunk prVT, the PNG chunk tIME and content credentials (C2PA)"]


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_a_thumbnail_in_xmp_is_not_copied(tmp_path: Path, target: ImageFormat) -> None:
    xmp = packet('dc:format="x"', "<xmp:Thumbnails><rdf:Alt><rdf:li>OLD</rdf:li></rdf:Alt></xmp:Thumbnails>")
    out, lost = through(with_segments(tmp_path / "in", (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)), target)
    assert b"OLD" not in xmp_of(out)
    assert b"dc:format" in xmp_of(out)
    assert lost == []


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("junk", [b"", b"no xml", b"<a>", b"<!DOCTYPE a><a/>", b"<a " + b"<b>" * 3000])
def test_damaged_xmp_is_reported_and_the_mark_is_written(tmp_path: Path, junk: bytes, target: ImageFormat) -> None:
    source = with_segments(tmp_path / "in", (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + junk))
    _, lost = through(source, target)
    assert lost == ["left out: XMP, which is damaged"]


def test_xmp_in_utf_16_is_copied_with_a_mark(tmp_path: Path) -> None:
    segment = b"http://ns.adobe.com/xap/1.0/\0" + packet('dc:format="ü"').decode().encode("utf-16")
    out, lost = through(with_segments(tmp_path / "in", (0xE1, segment)), JPEG)
    assert 'dc:format="ü"'.encode() in xmp_of(out)
    assert lost == []


def test_texts_that_decompress_to_excessive_sizes_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.images.png_metadata.MAX_INFLATED", 1000)
    texts = [(b"zTXt", name + b"\0\0" + zlib.compress(bytes(600))) for name in (b"one", b"two")]
    _, lost = through(with_chunks(tmp_path / "in", *texts), PNG)
    assert lost == ["left out: the PNG text two, which is too long"]


def test_keywords_in_latin_1_are_read(tmp_path: Path) -> None:
    texts = [(b"tEXt", b"Gr\xf6\xdfe\0gro\xdf"), (b"tEXt", b"Author\0J\xfcrgen")]
    source = with_chunks(tmp_path / "in", *texts)
    out, lost = through(source, PNG)
    assert Image.open(out).info["Größe"] == "groß"
    assert lost == []
    out, lost = through(source, JPEG)
    assert "Jürgen" in xmp_of(out).decode()
    assert lost == ["left out: the PNG text Größe"]


def test_comments_and_xmp_of_gif_are_copied(tmp_path: Path) -> None:
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    buffer = io.BytesIO()
    picture().convert("P").save(buffer, "gif", comment="zwö".encode())
    whole = buffer.getvalue()
    at = whole.index(b"!\xfe")
    (tmp_path / "in").write_bytes(whole[:at] + b"!\xff\x0bXMP DataXMP" + XMP + trailer + whole[at:])
    out, lost = through(tmp_path / "in", PNG)
    assert b'tiff:ImageWidth="32"' in xmp_of(out)
    assert Image.open(out).info["Comment"] == "zwö"
    assert lost == []


def test_a_profile_in_bmp_is_copied(tmp_path: Path) -> None:
    icc = (bytes(16) + b"RGB ").ljust(36, b"\0") + b"acsp" + bytes(100)
    samples = bytes(3 * 8) * 6
    header = struct.pack("<IiiHHIIiiII", 124, 8, 6, 1, 24, 0, len(samples), 0, 0, 0, 0).ljust(56, b"\0")
    header = (header + b"DEBM").ljust(112, b"\0") + struct.pack("<III", 124 + len(samples), len(icc), 0)
    offset = 14 + len(header)
    content = struct.pack("<2sIII", b"BM", offset + len(samples) + len(icc), 0, offset) + header + samples + icc
    (tmp_path / "in").write_bytes(content)
    out, lost = through(tmp_path / "in", TIFF)
    assert Image.open(out).info["icc_profile"] == icc
    assert lost == []


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that writes AVIF")
@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_exif_and_xmp_of_avif_are_copied(tmp_path: Path, target: ImageFormat) -> None:
    block = Image.Exif()
    block[0x010F], block[0x0112] = "Maker", 6
    picture().save(tmp_path / "in", "avif", exif=block, xmp=XMP)
    out, lost = through(tmp_path / "in", target)
    opened = Image.open(out)
    assert opened.size == (24, 32)
    assert opened.getexif()[0x010F] == "Maker"
    assert opened.getexif().get(0x0112, 1) == 1
    assert b'tiff:ImageWidth="24"' in xmp_of(out)
    assert lost == []


def test_many_fields_are_listed_in_one_sentence(tmp_path: Path) -> None:
    source = with_chunks(tmp_path / "in", (b"sBIT", b"\5\5\5"), (b"tEXt", b"a\0b"), (b"sTER", b"\0"))
    _, lost = through(source, JPEG)
    assert lost == ["left out: the stereo layout, the number of significant bits (sBIT) and the PNG text a"]


CONTRADICTED = {
    "Title": (269, "title"),
    "Author": (315, "creator"),
    "Description": (270, "description"),
    "Copyright": (33432, "rights"),
    "Software": (305, None),
}


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("places", ["EXIF", "XMP", "both"])
@pytest.mark.parametrize("keyword", CONTRADICTED)
def test_a_png_text_that_differs_from_exif_or_xmp_is_copied_or_reported(
    tmp_path: Path, keyword: str, places: str, target: ImageFormat
) -> None:
    tag, name = CONTRADICTED[keyword]
    chunks = [(b"tEXt", keyword.encode() + b"\0of the text")]
    if places != "XMP":
        block = Image.Exif()
        block[tag] = "of EXIF"
        chunks.append((b"eXIf", block.tobytes()[6:]))
    if places != "EXIF":
        inner = f"<dc:{name}><rdf:Alt><rdf:li>of XMP</rdf:li></rdf:Alt></dc:{name}>" if name else ""
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet("", inner)))
    out, lost = through(with_chunks(tmp_path / "in", *chunks), target)
    opened = Image.open(out)
    opened.load()
    in_exif = opened.getexif().get(tag) == "of the text"
    in_xmp = b">of the text<" in xmp_of(out)
    if target is PNG:
        assert opened.info[keyword] == "of the text"
        assert lost == []
    else:
        assert lost == ([] if in_exif or in_xmp else [f"left out: the PNG text {keyword}"])
        free = {"EXIF": name is not None, "XMP": keyword != "Title" or target is TIFF, "both": False}
        assert (in_exif or in_xmp) == free[places]
    if places != "XMP":
        assert opened.getexif()[tag] == "of EXIF"
    if places != "EXIF" and name is not None:
        assert b">of XMP<" in xmp_of(out)


@pytest.mark.parametrize("target", [JPEG, WEBP, TIFF], ids=lambda f: f.name)
def test_a_png_text_that_exif_or_xmp_repeats_is_not_reported(tmp_path: Path, target: ImageFormat) -> None:
    block = Image.Exif()
    block[305] = "Editor 2"
    title = "<dc:title><rdf:Alt><rdf:li>Sea &amp; sky</rdf:li></rdf:Alt></dc:title>"
    chunks = [
        (b"tEXt", b"Software\0Editor 2 "),
        (b"tEXt", b"Title\0Sea & sky"),
        (b"eXIf", block.tobytes()[6:]),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet("", title)),
    ]
    assert through(with_chunks(tmp_path / "in", *chunks), target)[1] == []
