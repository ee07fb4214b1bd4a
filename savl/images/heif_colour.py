"""The colour code points of AVIF and HEIC files, which libvips does not hand on (ISO/IEC 14496-12, `colr` boxes)."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

_MAX_META = 16 * 2**20
# Primaries and transfer functions that viewers show as sRGB, or that say nothing.
_PLAIN_PRIMARIES, _PLAIN_TRANSFERS = (0, 1, 2), (0, 1, 2, 6, 13, 14, 15)


def read_heif_colour(file: BinaryIO) -> bytes | None:
    """Return primaries, transfer function, matrix and range as PNG's cICP chunk tells them, for decoded RGB samples.

    Returns:
        Four bytes, or None where the file tells none, only what viewers assume anyway, or cannot be understood.
    """
    meta = next((content for name, content in _boxes(file) if name == b"meta"), b"")
    properties = _inside(_inside(meta[4:], b"iprp"), b"ipco")
    for name, content in _boxes(io.BytesIO(properties)):
        if name == b"colr" and content.startswith(b"nclx") and len(content) >= 11:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            if primaries in _PLAIN_PRIMARIES and transfer in _PLAIN_TRANSFERS:
                return None
            # The decoder has applied matrix and range.
            return bytes([primaries, transfer, 0, 1]) if max(primaries, transfer) < 256 else None
    return None


def _inside(content: bytes, wanted: bytes) -> bytes:
    return next((held for name, held in _boxes(io.BytesIO(content)) if name == wanted), b"")


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yields type and content of the boxes of a file, of larger ones than metadata can be without the content."""
    end = file.seek(0, os.SEEK_END)
    position = 0
    while position + 8 <= end:
        file.seek(position)
        head = file.read(16)
        size, name = struct.unpack_from(">I4s", head)
        start = position + 8
        if size == 1 and len(head) == 16:
            size, start = struct.unpack_from(">Q", head, 8)[0], position + 16
        following = end if size == 0 else position + size
        if following < start or following > end:
            return
        file.seek(start)
        yield name, file.read(following - start) if following - start <= _MAX_META else b""
        position = following
