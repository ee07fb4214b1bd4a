"""The marker segments before the samples of a JPEG file (ITU-T T.81, annex B)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

APP0, APP1, APP2, APP11, APP13 = 0xE0, 0xE1, 0xE2, 0xEB, 0xED
COMMENT = 0xFE
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
PHOTOSHOP = b"Photoshop 3.0\0"
ICC = b"ICC_PROFILE\0"
MAX_CONTENT = 65533
"""Bytes that a segment's 16-bit length leaves for its content."""

_MAX_STRAY = 2**16


@dataclass(frozen=True)
class Segment:
    """One segment: the second byte of its marker, and its content without marker and length."""

    marker: int
    content: bytes


def read_segments(file: BinaryIO) -> Iterator[Segment]:
    """Yield the application segments and comments before the samples, as far as the file can be understood."""
    file.seek(2)
    stray = 0
    while stray < _MAX_STRAY:
        byte = file.read(1)
        if not byte:
            return
        if byte != b"\xff":
            stray += 1  # bytes before a marker, which decoders pass over too
            continue
        while byte == b"\xff":
            byte = file.read(1)
        if not byte:
            return
        marker = byte[0]
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return
        if marker in (0, 1) or 0xD0 <= marker <= 0xD8:
            continue  # markers without content
        size = file.read(2)
        if len(size) < 2:
            return
        length = int.from_bytes(size, "big") - 2
        if APP0 <= marker <= 0xEF or marker == COMMENT:
            content = file.read(length) if length > 0 else b""
            if len(content) < length:
                return
            yield Segment(marker, content)
        else:
            file.seek(max(length, 0), 1)


def encode_segment(marker: int, content: bytes) -> bytes:
    """Return a segment with its marker and its length.

    Raises:
        ValueError: `content` is longer than `MAX_CONTENT`.
    """
    if len(content) > MAX_CONTENT:
        raise ValueError(f"content: {len(content)} bytes; a JPEG segment holds at most {MAX_CONTENT}")
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
