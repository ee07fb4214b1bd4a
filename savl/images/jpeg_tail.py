"""What stands behind the picture in a JPEG file: further pictures, films of motion photos, makers' data."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import BinaryIO

from savl.images.jpeg_stream import end_of_picture

_START = b"\xff\xd8\xff"
_FILM = re.compile(rb"MotionPhoto_Data|\0\0\0[\x08-\x7f]ftyp")  # Samsung's name for one, and how MP4 and MOV begin
_FILL = b"\0\xff\r\n\t "  # what cameras fill blocks with
_STEP = 2**20
_MAX_BYTES = 2**28  # of a file that are looked at; of larger ones, what is behind may stay unknown


@dataclass(frozen=True)
class JpegTail:
    """What stands behind the picture.

    Attributes:
        pictures: how many further JPEG pictures follow at once.
        film: whether the film of a motion photo is behind them.
        size: bytes behind the further pictures, other than filling; 0 where a film explains them.
    """

    pictures: int = 0
    film: bool = False
    size: int = 0


def read_tail(file: BinaryIO) -> JpegTail:
    """Return what stands behind the picture of a JPEG file; a picture without an end has nothing behind it.

    Args:
        file: seekable.
    """
    whole = file.seek(0, os.SEEK_END)
    file.seek(0)
    content = file.read(_MAX_BYTES)
    end = end_of_picture(content)
    if end is None:
        return JpegTail()
    pictures = 0
    while True:
        start = _behind_filling(content, end)
        further = end_of_picture(content, start) if content[start : start + len(_START)] == _START else None
        if further is None:
            break
        pictures, end = pictures + 1, further
    if start == whole:
        return JpegTail(pictures)
    film = _FILM.search(content, end) is not None
    return JpegTail(pictures, film, 0 if film else whole - end)


def _behind_filling(content: bytes, begin: int) -> int:
    """Where the next byte that is no filling stands, from `begin` on; 0xFF in front of a picture is none either."""
    position = begin
    while position < len(content):
        piece = content[position : position + _STEP]
        rest = piece.lstrip(_FILL)
        position += len(piece) - len(rest)
        if rest:
            break
    begins_picture = content[position : position + 1] == _START[1:2] and position > begin
    return position - 1 if begins_picture and content[position - 1] == _START[0] else position
