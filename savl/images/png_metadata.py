"""Metadata of PNG files: read chunks into `Metadata`, and write `Metadata` as chunks."""

from __future__ import annotations

import binascii
import contextlib
import os
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from savl.images import exif as exif_blocks
from savl.images import jpeg_structure
from savl.images.icc_profile import primaries_are_sound, repaired_profile
from savl.images.metadata_record import COLOUR_PROFILE, Metadata, PngColour, PngText, Stored, bytes_after
from savl.images.photoshop import join_resources, split_resources
from savl.images.png_chunks import (
    MAX_INFLATED,
    SIGNATURE,
    Chunk,
    encode_chunk,
    encode_international_text,
    inflate,
    international_text,
    read_chunks,
    xmp_packet,
)

_RAW_PROFILE = "Raw profile type "
_HEADER, _PALETTE = b"IHDR", b"PLTE"
# Chunks that tell how samples are stored, and chunks that are written anew.
_STORAGE = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iDOT", b"hIST", b"acTL", b"fcTL", b"fdAT"})
_COLOUR = frozenset({b"cICP", b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"mDCV", b"cLLI"})
_MASTERING_SIZES = {b"mDCV": 24, b"cLLI": 8}
# Chunks that depend on the old size, stereo layout or calibration of the samples.
_NAMED_LOSSES = {
    b"caBX": "content credentials (C2PA)",
    b"sTER": "the stereo layout",
    b"pCAL": "the calibration of samples (pCAL)",
    b"sCAL": "the physical scale (sCAL)",
    b"oFFs": "the offset on the page (oFFs)",
}
_STALE = frozenset({b"vpAg", b"caNv", b"orNT"})  # ImageMagick's canvas, which has the old size
_STALE_KEYWORDS = ("Thumb::", "exif:ExifImage", "exif:PixelX", "exif:PixelY", "exif:Orientation", "exif:thumbnail:")


@dataclass
class _Found:
    """Values found so far while reading a file."""

    values: dict[str, bytes] = field(default_factory=dict)  # exif, xmp, iptc, photoshop, icc
    text: list[PngText] = field(default_factory=list)
    colour: PngColour = field(default_factory=PngColour)
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    resolution: tuple[float, float] | None = None
    unit: str = "in"
    palette: bytes = b""
    colour_type: int = 0
    bits: int = 8
    characters: int = 0


def read_png(file: BinaryIO) -> Metadata:
    """Return the metadata in the chunks of a PNG file. Malformed chunks are ignored.

    EXIF is read before or after the samples, or from a text named "Raw profile type" as written by ImageMagick. XMP,
    IPTC and a colour profile are read from such texts, too.
    """
    found = _Found()
    for chunk in read_chunks(file):
        _take(found, chunk)
        if chunk.name == b"IEND":
            after = file.seek(0, os.SEEK_END) - chunk.end
            found.lost += [bytes_after(after)] if after > 0 else []
    return Metadata(
        icc=found.values.get("icc"),
        exif=found.values.get("exif"),
        xmp=found.values.get("xmp"),
        iptc=found.values.get("iptc"),
        photoshop=found.values.get("photoshop"),
        resolution=found.resolution,
        resolution_unit=found.unit,
        text=tuple(found.text),
        colour=found.colour,
        png_chunks=tuple(found.chunks),
        lost=tuple(dict.fromkeys(found.lost)),
    )


def encode_png(metadata: Metadata, stored: Stored) -> tuple[bytes, list[str]]:
    """Return the chunks to write between header and samples, and the names of what they cannot store."""
    colour = metadata.colour
    parts: list[bytes] = []
    if colour.cicp is not None:
        parts.append(encode_chunk(b"cICP", colour.cicp))
    parts += [encode_chunk(name, data) for name, data in colour.mastering]
    if colour.chromaticities is not None:
        parts.append(encode_chunk(b"cHRM", struct.pack(">8I", *colour.chromaticities)))
    if colour.gamma is not None:
        parts.append(encode_chunk(b"gAMA", struct.pack(">I", colour.gamma)))
    if metadata.icc is not None:
        icc = repaired_profile(metadata.icc) or metadata.icc
        parts.append(encode_chunk(b"iCCP", b"icc\0\0" + zlib.compress(icc)))
    if colour.significant_bits is not None:
        parts.append(encode_chunk(b"sBIT", _adapted_bits(colour.significant_bits, stored)))
    if colour.intent is not None:
        parts.append(encode_chunk(b"sRGB", bytes([colour.intent])))
    for name, data in metadata.png_chunks:
        adapted = _adapted_background(data, stored) if name == b"bKGD" else data
        parts.append(encode_chunk(name, adapted))
    if metadata.resolution is not None:
        parts.append(encode_chunk(b"pHYs", _physical_size(metadata.resolution, metadata.resolution_unit)))
    if metadata.exif is not None:
        parts.append(encode_chunk(b"eXIf", metadata.exif.removeprefix(exif_blocks.PREFIX)))
    if metadata.xmp is not None:
        parts.append(encode_international_text(b"XML:com.adobe.xmp", metadata.xmp))
    resources = join_resources(metadata.iptc, metadata.photoshop)
    if resources is not None:
        parts.append(encode_chunk(b"zTXt", _raw_profile(b"iptc", resources)))
    parts += [encode_chunk(text.name, text.data) for text in metadata.text]
    for comment in metadata.comments:
        parts.append(_encode_text("Comment", comment))
    return b"".join(parts), []


def splice_png(head: bytes, chunks: bytes) -> bytes | None:
    """Replace the metadata in the beginning of an encoded PNG file; return None if more of the file is needed.

    Args:
        head: First bytes of the file, as written by an encoder.
        chunks: Chunks to write between header and samples. Those of the encoder are removed.
    """
    position = len(SIGNATURE)
    kept: list[bytes] = []
    while position + 8 <= len(head):
        length, name = struct.unpack_from(">I4s", head, position)
        if name == b"IDAT":
            header, *others = kept
            return head[: len(SIGNATURE)] + header + chunks + b"".join(others) + head[position:]
        end = position + 12 + length
        if end > len(head):
            return None
        if name in (_HEADER, _PALETTE, b"tRNS"):
            kept.append(head[position:end])
        position = end
    return None


def _take(found: _Found, chunk: Chunk) -> None:
    name, data = chunk.name, chunk.data
    if name == _HEADER and len(data) == 13:
        found.bits, found.colour_type = data[8], data[9]
    elif name == _PALETTE:
        found.palette = data
    elif name == b"eXIf":  # has precedence over a text
        found.values["exif"] = data
    elif name == b"iCCP":
        _store_profile(found, chunk)
    elif name == b"pHYs" and len(data) == 9:
        _take_resolution(found, data)
    elif name in _COLOUR:
        if not chunk.after_samples:
            found.colour = _with_colour(found.colour, name, data)
    elif name in (b"tEXt", b"zTXt", b"iTXt"):
        _take_text(found, chunk)
    elif name == b"bKGD":
        background = _background(found, data)
        if background is not None:
            found.chunks.append((name, background))
    elif name in _NAMED_LOSSES:
        found.lost.append(_NAMED_LOSSES[name])
    elif name not in _STORAGE | _STALE:
        # A lower-case first letter means that decoders may ignore the chunk, and a lower-case fourth letter that it is
        # still valid after samples change (specification, 5.4).
        if name.isalpha() and name[:1].islower() and name[3:].islower():
            found.chunks.append((name, data))
        else:
            found.lost.append(f"the PNG chunk {name.decode('latin-1')}")


def _store_profile(found: _Found, chunk: Chunk) -> None:
    """Store a profile, including profiles that a PNG decoder refuses for their length or colour space."""
    if chunk.after_samples:
        found.lost.append("a colour profile after the samples")
        return
    _, zero, rest = chunk.data.partition(b"\0")
    inflated = inflate(rest[1:]) if zero and rest[:1] == b"\0" else None
    icc = None if inflated is None else repaired_profile(inflated)
    if icc is None:
        found.lost.append(COLOUR_PROFILE)
    else:
        found.values["icc"] = icc  # has precedence over a text


def _take_resolution(found: _Found, data: bytes) -> None:
    x, y, unit = struct.unpack(">IIB", data)
    if x and y:
        found.resolution = (x / 1000, y / 1000) if unit == 1 else (float(x), float(y))
        found.unit = "in" if unit == 1 else "none"


def _with_colour(colour: PngColour, name: bytes, data: bytes) -> PngColour:
    """Return `colour` with the values of one chunk. A malformed chunk is ignored, as browsers do."""
    if name == b"cICP" and len(data) == 4 and data[2] == 0 and data[3] in (0, 1):
        return replace(colour, cicp=data)
    if name == b"sRGB" and len(data) == 1 and data[0] <= 3:
        return replace(colour, intent=data[0])
    if name == b"gAMA" and len(data) == 4 and 0 < (gamma := int.from_bytes(data, "big")) < 2**31:
        return replace(colour, gamma=gamma)
    if name == b"cHRM" and len(data) == 32 and primaries_are_sound(points := struct.unpack(">8I", data)):
        return replace(colour, chromaticities=points)
    if name == b"sBIT" and 1 <= len(data) <= 4 and all(data):
        return replace(colour, significant_bits=data)
    if len(data) == _MASTERING_SIZES.get(name):
        return replace(colour, mastering=(*colour.mastering, (name, data)))
    return colour


def _take_text(found: _Found, chunk: Chunk) -> None:
    packet = xmp_packet(chunk)
    if packet is not None:
        found.values.setdefault("xmp", packet)
        return
    decoded = _decode_text(chunk)
    if decoded is None:
        found.lost.append("a damaged PNG text")
        return
    keyword, text = decoded
    found.characters += len(text)
    if found.characters > MAX_INFLATED:
        found.lost.append(f"the PNG text {keyword}, which is too long")
        return
    if keyword.startswith(_RAW_PROFILE):
        _store_raw_profile(found, keyword[len(_RAW_PROFILE) :].lower(), text)
    elif not keyword.startswith(_STALE_KEYWORDS):
        found.text.append(PngText(keyword, text, chunk.name, chunk.data))


def _decode_text(chunk: Chunk) -> tuple[str, str] | None:
    """Return keyword and text of a chunk, or None if it is malformed."""
    if chunk.name == b"iTXt":
        international = international_text(chunk.data)
        if international is None:
            return None
        return international[0].decode("latin-1"), international[1].decode("utf-8", errors="replace")
    keyword, zero, rest = chunk.data.partition(b"\0")
    text = rest if chunk.name == b"tEXt" else inflate(rest[1:])
    if not zero or not keyword or text is None:
        return None
    return keyword.decode("latin-1"), text.decode("latin-1")


def _store_raw_profile(found: _Found, kind: str, text: str) -> None:
    """Store a block written by ImageMagick as text: its name, its length, and the data in hexadecimal digits."""
    parts = text.split(maxsplit=2)
    content = None
    if len(parts) == 3:
        with contextlib.suppress(ValueError, binascii.Error):
            content = bytes.fromhex(parts[2])[: int(parts[1])]
    if not content:
        found.lost.append(f"a damaged PNG text ({_RAW_PROFILE}{kind})")
    elif kind in ("exif", "app1") and content.startswith(jpeg_structure.XMP):
        found.values.setdefault("xmp", content[len(jpeg_structure.XMP) :])
    elif kind in ("exif", "app1"):
        found.values.setdefault("exif", content.removeprefix(exif_blocks.PREFIX))
    elif kind == "xmp":
        found.values.setdefault("xmp", content)
    elif kind in ("icc", "icm"):
        found.values.setdefault("icc", content)
    elif kind in ("iptc", "8bim"):
        content = content.removeprefix(jpeg_structure.PHOTOSHOP)
        iptc, others = split_resources(content) if content.startswith(b"8BIM") else (content, None)
        if iptc is not None:
            found.values.setdefault("iptc", iptc)
        if others is not None:
            found.values.setdefault("photoshop", others)
    else:
        found.lost.append(f"the PNG text {_RAW_PROFILE}{kind}")


def _raw_profile(kind: bytes, content: bytes) -> bytes:
    """Return the content of a zTXt chunk with a block in the form that ImageMagick and ExifTool read."""
    digits = binascii.hexlify(content)
    lines = b"\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    text = b"\n%s\n%8d\n%s\n" % (kind, len(content), lines)
    return b"Raw profile type " + kind + b"\0\0" + zlib.compress(text)


def _encode_text(keyword: str, text: str) -> bytes:
    if text.isascii():
        return encode_chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode())
    return encode_international_text(keyword.encode("latin-1"), text.encode())


def _physical_size(resolution: tuple[float, float], unit: str) -> bytes:
    per_unit = [value if unit == "none" else value * 1000 for value in resolution]
    x, y = (min(max(round(value), 1), 2**31 - 1) for value in per_unit)
    return struct.pack(">IIB", x, y, 0 if unit == "none" else 1)


def _adapted_bits(bits: bytes, stored: Stored) -> bytes:
    """Return the significant bits for the stored channels; none has more bits than are stored."""
    colours, alpha = (bits[:1], bits[1:]) if len(bits) < 3 else (bits[:3], bits[3:])
    if stored.is_gray:
        colours = bytes([max(colours)])
    elif len(colours) == 1:
        colours *= 3
    if stored.bands in (2, 4):
        colours += alpha or bytes([stored.bits])
    return bytes(min(value, stored.bits) for value in colours)


def _background(found: _Found, data: bytes) -> bytes | None:
    """Return the background colour as one (gray) or three 16-bit samples, or None if it is malformed."""
    if found.colour_type == 3:
        colour = found.palette[3 * data[0] : 3 * data[0] + 3] if len(data) == 1 else b""
        return struct.pack(">3H", *(value * 257 for value in colour)) if len(colour) == 3 else None
    count = 1 if found.colour_type in (0, 4) else 3
    if len(data) != 2 * count:
        return None
    peak = 2**found.bits - 1
    return struct.pack(f">{count}H", *(min(v, peak) * 65535 // peak for v in struct.unpack(f">{count}H", data)))


def _adapted_background(background: bytes, stored: Stored) -> bytes:
    """Convert the colour returned by `_background` to the channels and bit depth of the stored image."""
    samples = list(struct.unpack(f">{len(background) // 2}H", background))
    if stored.is_gray and len(samples) == 3:
        samples = [round(0.2126 * samples[0] + 0.7152 * samples[1] + 0.0722 * samples[2])]
    elif not stored.is_gray and len(samples) == 1:
        samples *= 3
    peak = 2**stored.bits - 1
    return struct.pack(f">{len(samples)}H", *(round(value * peak / 65535) for value in samples))
