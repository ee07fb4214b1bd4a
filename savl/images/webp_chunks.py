"""The chunks of a WebP file (RIFF; WebP Container Specification, RFC 9649)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

_HEADER = 12
_WANTED = (b"VP8X", b"ICCP", b"EXIF", b"XMP ")


def read_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the content of each chunk that is metadata, as far as the file can be understood."""
    file.seek(0, os.SEEK_END)
    end = file.tell()
    position = _HEADER
    while position + 8 <= end:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if name in _WANTED and position + 8 + length <= end:
            yield name, file.read(length)
        position += 8 + length + length % 2


def encode_chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk with its length, padded to an even number of bytes."""
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
