"""Metadata of WebP files: read and write the chunks of their RIFF container."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from savl.images.exif import PREFIX
from savl.images.metadata_record import Metadata, Stored, bytes_after

_HEADER = 12
_METADATA = (b"VP8X", b"ICCP", b"EXIF", b"XMP ")
_SAMPLES = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def read_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of each metadata chunk, up to the first malformed chunk."""
    for name, position, length in _places(file):
        if name in _METADATA:
            file.seek(position)
            yield name, file.read(length)


def read_unknown(file: BinaryIO) -> tuple[list[str], int]:
    """Return the names of chunks that WebP does not define, and the number of bytes after the end of the container."""
    names = [name.decode("latin-1") for name, _, _ in _places(file) if name not in _METADATA + _SAMPLES]
    file.seek(4)
    size = struct.unpack("<I", file.read(4))[0] + 8
    file.seek(size + size % 2)
    after = sum(len(piece.strip(b"\0")) and len(piece) for piece in iter(lambda: file.read(2**20), b""))
    return names, after


def _places(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, content position and content length of each complete chunk."""
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


_ICC, _ALPHA, _EXIF, _XMP = 0x20, 0x10, 0x08, 0x04


def read_webp(file: BinaryIO) -> Metadata:
    """Return EXIF block and XMP packet of a WebP file, and the names of other data in it."""
    chunks: dict[bytes, bytes] = {}
    for name, content in read_chunks(file):
        chunks.setdefault(name, content)
    names, after = read_unknown(file)
    lost = [f"the WebP chunk {name.strip()}" for name in dict.fromkeys(names)]
    if after:
        lost.append(bytes_after(after))
    return Metadata(exif=chunks.get(b"EXIF"), xmp=chunks.get(b"XMP "), lost=tuple(lost))


def encode_webp(metadata: Metadata) -> tuple[bytes, bytes, list[str]]:
    """Return the chunks to write before and after the samples, and the names of what WebP cannot store."""
    before = b"" if metadata.icc is None else encode_chunk(b"ICCP", metadata.icc)
    after = b"" if metadata.exif is None else encode_chunk(b"EXIF", metadata.exif.removeprefix(PREFIX))
    after += b"" if metadata.xmp is None else encode_chunk(b"XMP ", metadata.xmp)
    lost = [] if metadata.iptc is None else ["IPTC"]
    if metadata.photoshop is not None:
        lost.append("Photoshop's image resources")
    return before, after, lost


def splice_webp(head: bytes, before: bytes, after: bytes, stored: Stored) -> bytes | None:
    """Add metadata to the beginning of an encoded WebP file; return None if more of the file is needed.

    Args:
        head: First bytes of the file, as written by an encoder without metadata.
        before: Chunks to write before the samples.
        after: Chunks that will be written after the samples.
        stored: The stored image.
    """
    if not before and not after:
        return head
    if len(head) < 30:
        return None
    (size,) = struct.unpack_from("<I", head, 4)
    samples = 30 if head[12:16] == b"VP8X" else 12
    flags = _ALPHA if stored.bands == 4 else 0
    flags |= _ICC if before else 0
    names = _names(after)
    flags |= (_EXIF if b"EXIF" in names else 0) | (_XMP if b"XMP " in names else 0)
    extended = encode_chunk(
        b"VP8X",
        struct.pack("<I", flags) + _three_bytes(stored.width - 1) + _three_bytes(stored.height - 1),
    )
    size += 12 - samples + len(extended) + len(before) + len(after)
    return b"RIFF" + struct.pack("<I", size) + b"WEBP" + extended + before + head[samples:]


def _names(chunks: bytes) -> set[bytes]:
    names, position = set(), 0
    while position + 8 <= len(chunks):
        name, length = struct.unpack_from("<4sI", chunks, position)
        names.add(name)
        position += 8 + length + length % 2
    return names


def _three_bytes(value: int) -> bytes:
    return value.to_bytes(3, "little")
