"""Animations in AVIF and HEIC files (ISO/IEC 14496-12), of which libvips reads the still picture beside them."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from savl.images.read_only_metadata import heif_boxes


def heif_frames(file: BinaryIO) -> int:
    """Return how many frames the longest sequence of pictures in a file has, 0 where it has none.

    Args:
        file: The AVIF or HEIC file, seekable; its position afterwards is anywhere.
    """
    longest = 0
    for movie in _all(file, b"moov"):
        for track in _all(io.BytesIO(movie), b"trak"):
            for media in _all(io.BytesIO(track), b"mdia"):
                # Not the alpha or the sound that belongs to another track.
                if any(handler[8:12] in (b"pict", b"vide") for handler in _all(io.BytesIO(media), b"hdlr")):
                    longest = max(longest, _samples(media))
    return longest


def _samples(media: bytes) -> int:
    """Return the number of samples in a track, by its table of their sizes."""
    for information in _all(io.BytesIO(media), b"minf"):
        for table in _all(io.BytesIO(information), b"stbl"):
            for name, content in heif_boxes(io.BytesIO(table)):
                if name in (b"stsz", b"stz2") and len(content) >= 12:
                    return int(struct.unpack_from(">I", content, 8)[0])
    return 0


def _all(file: BinaryIO, wanted: bytes) -> list[bytes]:
    return [content for name, content in heif_boxes(file) if name == wanted]
