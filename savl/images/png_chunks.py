"""Read and write chunks of PNG files (PNG specification, third edition, sections 5 and 11)."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_KEYWORD = b"XML:com.adobe.xmp"
# Maximum size of decompressed text: a few kilobytes in a file can expand to gigabytes.
MAX_INFLATED = 64 * 2**20


@dataclass(frozen=True)
class Chunk:
    """One chunk of a PNG file.

    Attributes:
        name: Four letters, such as b"gAMA".
        data: Content; empty for IDAT, because the samples are read by a decoder.
        after_samples: Whether the chunk comes after the first IDAT.
        end: Position of the next chunk in the file.
    """

    name: bytes
    data: bytes
    after_samples: bool = False
    end: int = 0


def read_chunks(file: BinaryIO, *, stop_at_samples: bool = False) -> Iterator[Chunk]:
    """Yield the chunks of a PNG file in order, up to the first malformed one.

    Args:
        file: The PNG file, seekable. Its signature is not checked.
        stop_at_samples: Whether to stop before the first IDAT.
    """
    file.seek(0, os.SEEK_END)
    end = file.tell()
    position, after_samples = len(SIGNATURE), False
    while position + 12 <= end:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IDAT":
            if stop_at_samples:
                return
            after_samples = True
        elif position + 12 + length <= end:
            yield Chunk(name, file.read(length), after_samples, position + 12 + length)
        if name == b"IEND":
            return
        position += 12 + length


def encode_chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def inflate(data: bytes) -> bytes | None:
    """Return decompressed data, or None if they are corrupt, truncated or larger than `MAX_INFLATED`."""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(data, MAX_INFLATED)
    except zlib.error:
        return None
    return inflated if inflater.eof else None


def international_text(data: bytes) -> tuple[bytes, bytes] | None:
    """Return keyword and UTF-8 text of an iTXt chunk, or None if it is malformed."""
    keyword, zero, rest = data.partition(b"\0")
    if not zero or len(rest) < 2:
        return None
    compressed, rest = rest[0], rest[2:]
    _language, _, rest = rest.partition(b"\0")
    _translated, zero, text = rest.partition(b"\0")
    if not zero:
        return None
    inflated = inflate(text) if compressed else text
    return None if inflated is None else (keyword, inflated)


def xmp_packet(chunk: Chunk) -> bytes | None:
    """Return the XMP packet in a text chunk, or None if there is none.

    The specification requires iTXt, but libvips writes zTXt.
    """
    if chunk.name == b"iTXt":
        text = international_text(chunk.data)
        return text[1] if text is not None and text[0] == XMP_KEYWORD else None
    if chunk.name == b"zTXt" and chunk.data.startswith(XMP_KEYWORD + b"\0\0"):
        return inflate(chunk.data[len(XMP_KEYWORD) + 2 :])
    return None


def encode_international_text(keyword: bytes, text: bytes) -> bytes:
    """Return an iTXt chunk of uncompressed UTF-8 text."""
    return encode_chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text)
