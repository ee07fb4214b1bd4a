"""The chunks of a WebP file (RIFF; WebP Container Specification, RFC 9649)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

_HEADER = 12
_METADATA = (b"VP8X", b"ICCP", b"EXIF", b"XMP ")
_SAMPLES = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def read_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the content of each chunk that is metadata, as far as the file can be understood."""
    for name, position, length in _places(file):
        if name in _METADATA:
            file.seek(position)
            yield name, file.read(length)


def read_unknown(file: BinaryIO) -> tuple[list[str], int]:
    """Return the names of the chunks that the format does not define, and the bytes behind the end of the RIFF file."""
    names = [name.decode("latin-1") for name, _, _ in _places(file) if name not in _METADATA + _SAMPLES]
    file.seek(4)
    size = struct.unpack("<I", file.read(4))[0] + 8
    file.seek(size + size % 2)
    behind = sum(len(piece.strip(b"\0")) and len(piece) for piece in iter(lambda: file.read(2**20), b""))
    return names, behind


def _places(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, place of the content and its length, of each chunk that is whole."""
    end = file.seek(0, os.SEEK_END)
    if end < _HEADER:
        return
    file.seek(4)
    riff = struct.unpack("<I", file.read(4))[0] + 8
    end = min(end, riff + riff % 2)
    position = _HEADER
    while position + 8 <= end:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if position + 8 + length <= end:
            yield name, position + 8, length
        position += 8 + length + length % 2


def encode_chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk with its length, padded to an even number of bytes."""
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
