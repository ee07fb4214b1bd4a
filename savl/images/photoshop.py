"""Photoshop's image resources ("8BIM" blocks), in which JPEG files store IPTC (Adobe Photoshop File Formats)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_IPTC = 0x0404
# Resources to drop: thumbnails; layers, guides and slices of the old image; and copies of the ICC profile, EXIF and
# XMP, which are handled separately and would contradict their updated versions.
_STALE = frozenset({1024, 1026, 1032, 1033, 1036, 1039, 1050, 1058, 1059, 1060, 1069, 1072, 1080})


def split_resources(data: bytes) -> tuple[bytes | None, bytes | None]:
    """Return the IPTC block, and the other resources that are still valid for the new image; either may be None."""
    iptc: bytes | None = None
    others = b""
    for number, name, content in _read(data):
        if number == _IPTC:
            iptc = iptc or content or None
        elif number not in _STALE:
            others += _encode(number, name, content)
    return iptc, others or None


def join_resources(iptc: bytes | None, others: bytes | None) -> bytes | None:
    """Return resources including an IPTC block; None if both are None."""
    block = b"" if iptc is None else _encode(_IPTC, b"\0\0", iptc)
    return block + (others or b"") or None


def _read(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number, name (a padded Pascal string) and content of the blocks, up to the first malformed one."""
    position = 0
    while data[position : position + 4] == b"8BIM" and position + 12 <= len(data):
        (number,) = struct.unpack_from(">H", data, position + 4)
        name_size = data[position + 6] + 1
        name_size += name_size % 2
        name = data[position + 6 : position + 6 + name_size]
        start = position + 6 + name_size + 4
        if start > len(data):
            return
        (length,) = struct.unpack_from(">I", data, start - 4)
        if start + length > len(data):
            return
        yield number, name, data[start : start + length]
        position = start + length + length % 2


def _encode(number: int, name: bytes, content: bytes) -> bytes:
    head = b"8BIM" + struct.pack(">H", number) + name + struct.pack(">I", len(content))
    return head + content + bytes(len(content) % 2)
