"""Metadata of JPEG files: read segments into `Metadata`, and write `Metadata` as segments."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from savl.images.exif import PREFIX, fit_exif
from savl.images.jpeg_structure import (
    APP0,
    APP1,
    APP2,
    APP11,
    APP13,
    COMMENT,
    EXTENDED_XMP,
    ICC,
    MAX_CONTENT,
    PHOTOSHOP,
    XMP,
    Segment,
    encode_segment,
    read_segments,
    read_tail,
)
from savl.images.metadata_record import (
    COLOUR_PROFILE,
    FILM,
    GAIN_MAP,
    MULTI_PICTURE,
    Metadata,
    bytes_after,
    images_after,
)
from savl.images.photoshop import join_resources, split_resources
from savl.images.tiff_directory import read_directory, read_layout
from savl.images.xmp_extension import join_extended_xmp, split_extended_xmp

_JFIF = b"JFIF\0"
_MAX_ICC_PIECES = 255
_MULTI_PICTURE, _GAIN_MAP, _FLASHPIX = b"MPF\0", b"urn:iso:std:iso:ts:21496:-1\0", b"FPXR\0"
_PICTURES, _PREVIEWS = 0xB002, (0x010001, 0x010002)  # tag of the list of images, and types of previews
_MAX_EXTENSION = 256 * 2**20
# Segments that concern the storage of samples, thumbnails, and remarks of encoders.
_PASSED_OVER = (b"JFXX\0", b"Adobe", b"Ducky", _JFIF)


def read_jpeg(file: BinaryIO) -> Metadata:
    """Return the metadata in the segments of a JPEG file, except the ICC profile. Malformed segments are ignored."""
    exif: bytes | None = None
    xmp: bytes | None = None
    extension = bytearray()
    resources = b""
    comments: list[str] = []
    lost: dict[str, None] = {}  # used as an ordered set
    pieces: list[bytes] = []  # number and count bytes of the pieces of an ICC profile
    declared = 0  # number of further images that a segment declares
    resolution, unit = None, "in"
    for segment in read_segments(file):
        marker, content = segment.marker, segment.content
        if marker == COMMENT:
            comments.append(_decode(content))
        elif marker == APP0 and content.startswith(_JFIF) and len(content) >= 12:
            resolution, unit = _density(content)
        elif marker == APP1 and content.startswith(PREFIX):
            exif = exif or content
        elif marker == APP1 and content.startswith(XMP):
            xmp = xmp or content[len(XMP) :]
        elif marker == APP1 and content.startswith(EXTENDED_XMP):
            _store_extension(extension, content[len(EXTENDED_XMP) :])
        elif marker == APP13 and content.startswith(PHOTOSHOP):
            resources += content[len(PHOTOSHOP) :]
        elif content.startswith(_MULTI_PICTURE) and (kinds := _further_pictures(content)) is not None:
            declared += len(kinds)
            if not all(kind in _PREVIEWS for kind in kinds):
                lost[MULTI_PICTURE] = None
        elif content.startswith(ICC):
            pieces.append(content[len(ICC) : len(ICC) + 2])
        elif not content.startswith(_PASSED_OVER):
            lost[_name(segment)] = None
    if xmp is not None and extension:
        joined = join_extended_xmp(xmp, bytes(extension))
        if joined is None:
            lost["the extended XMP, which is damaged"] = None
        xmp = joined or xmp
    if sorted(pieces) != [bytes([number, len(pieces)]) for number in range(1, len(pieces) + 1)]:
        lost[COLOUR_PROFILE] = None
    lost.update(dict.fromkeys(_names_of_tail(file, declared)))
    iptc, photoshop = split_resources(resources)
    return Metadata(
        exif=exif,
        xmp=xmp,
        iptc=iptc,
        photoshop=photoshop,
        resolution=resolution,
        resolution_unit=unit,
        comments=tuple(comments),
        lost=tuple(lost),
    )


def encode_jpeg(metadata: Metadata) -> tuple[bytes, list[str]]:
    """Return the segments to write before the samples, and the names of what does not fit."""
    lost: list[str] = []
    parts = [encode_segment(APP0, _encode_density(metadata.resolution, metadata.resolution_unit))]
    if metadata.exif is not None:
        exif, names = fit_exif(metadata.exif, MAX_CONTENT)
        lost += [f"{name} of EXIF, as a JPEG file holds 64 kB of it" for name in names]
        if exif is not None:
            parts.append(encode_segment(APP1, exif))
    if metadata.xmp is not None:
        main, extension = split_extended_xmp(metadata.xmp, MAX_CONTENT - len(XMP))
        if main is None:
            lost.append("XMP, of which a JPEG file holds 64 kB")
        else:
            parts.append(encode_segment(APP1, XMP + main))
            parts += _extension_segments(extension)
    resources = join_resources(metadata.iptc, metadata.photoshop) or b""
    room = MAX_CONTENT - len(PHOTOSHOP)
    for at in range(0, len(resources), room):
        parts.append(encode_segment(APP13, PHOTOSHOP + resources[at : at + room]))
    if metadata.icc is not None:
        room = MAX_CONTENT - len(ICC) - 2
        pieces = [metadata.icc[at : at + room] for at in range(0, len(metadata.icc), room)]
        if len(pieces) > _MAX_ICC_PIECES:
            lost.append("the ICC profile, of which a JPEG file holds 16 MB")
        else:
            for index, piece in enumerate(pieces, 1):
                parts.append(encode_segment(APP2, ICC + bytes([index, len(pieces)]) + piece))
    for comment in metadata.comments:
        content = comment.encode()
        if len(content) > MAX_CONTENT:
            lost.append("a comment, of which a JPEG file holds 64 kB")
        else:
            parts.append(encode_segment(COMMENT, content))
    return b"".join(parts), lost


def splice_jpeg(head: bytes, segments: bytes) -> bytes | None:
    """Replace the metadata in the beginning of an encoded JPEG file; return None if more of the file is needed.

    Args:
        head: First bytes of the file, as written by an encoder.
        segments: Segments to write before the samples. The encoder's JFIF segment is removed.
    """
    position = 2
    while position + 4 <= len(head):
        if head[position + 1] != APP0:
            return head[:2] + segments + head[position:]
        position += 2 + int.from_bytes(head[position + 2 : position + 4], "big")
    return None


def _density(content: bytes) -> tuple[tuple[float, float] | None, str]:
    """Return resolution and unit from a JFIF segment; None for square pixels without a unit, the default."""
    unit, x, y = struct.unpack_from(">BHH", content, 7)
    if not x or not y or unit > 2 or (unit == 0 and x == y):
        return None, "in"
    if unit == 0:
        return (float(x), float(y)), "none"
    per_mm = 25.4 if unit == 1 else 10.0
    return (x / per_mm, y / per_mm), "in" if unit == 1 else "cm"


def _encode_density(resolution: tuple[float, float] | None, unit: str) -> bytes:
    number, factor = {"in": (1, 25.4), "cm": (2, 10.0)}.get(unit, (0, 1.0))
    if resolution is None:
        number, factor, resolution = 0, 1.0, (1.0, 1.0)
    x, y = (min(max(round(value * factor), 1), 65535) for value in resolution)
    return _JFIF + struct.pack(">BBBHHBB", 1, 1, number, x, y, 0, 0)


def _store_extension(extension: bytearray, content: bytes) -> None:
    """Store one piece of extended XMP at its offset. `content` is GUID, whole length, offset, and the piece."""
    if len(content) < 40:
        return
    length, offset = struct.unpack_from(">II", content, 32)
    piece = content[40:]
    if length > _MAX_EXTENSION or offset + len(piece) > length:
        return
    extension.extend(bytes(max(offset + len(piece) - len(extension), 0)))
    extension[offset : offset + len(piece)] = piece


def _extension_segments(extension: tuple[bytes, bytes] | None) -> list[bytes]:
    if extension is None:
        return []
    guid, packet = extension
    room = MAX_CONTENT - len(EXTENDED_XMP) - 40
    return [
        encode_segment(APP1, EXTENDED_XMP + guid + struct.pack(">II", len(packet), at) + packet[at : at + room])
        for at in range(0, len(packet), room)
    ]


def _decode(content: bytes) -> str:
    content = content.rstrip(b"\0")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _further_pictures(content: bytes) -> list[int] | None:
    """Return the types of the further images listed in a segment (CIPA DC-007); None if it is damaged."""
    block = io.BytesIO(content[len(_MULTI_PICTURE) :])
    found = read_layout(block)
    entry = None if found is None else read_directory(block, *found, tags=[_PICTURES]).get(_PICTURES)
    if found is None or entry is None:
        return None
    places = range(16, len(entry.data) - 15, 16)
    return [struct.unpack_from(found[0].order + "I", entry.data, at)[0] & 0xFFFFFF for at in places]


def _names_of_tail(file: BinaryIO, declared: int) -> Iterator[str]:
    """Yield the names of data after the image that are lost, except `declared` further images."""
    tail = read_tail(file)
    further = tail.pictures - declared
    if further > 0:
        yield images_after(further)
    if tail.film:
        yield FILM
    if tail.size:
        yield bytes_after(tail.size)


def _name(segment: Segment) -> str:
    """Return the name of what is lost with a segment."""
    content = segment.content
    if segment.marker == APP2 and content.startswith(_GAIN_MAP):
        return GAIN_MAP
    if segment.marker == APP2 and content.startswith(_MULTI_PICTURE):
        return MULTI_PICTURE
    if segment.marker == APP2 and content.startswith(_FLASHPIX):
        return "FlashPix data"
    if segment.marker == APP11:
        return "content credentials or other JUMBF data"
    return f"application data (APP{segment.marker - APP0})"
