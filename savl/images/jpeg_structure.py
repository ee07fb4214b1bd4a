"""The structure of JPEG files (ITU-T T.81): metadata segments, the entropy-coded image, and data after its end."""

from __future__ import annotations

import os
import re
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
"""Maximum size of a segment's content in bytes, by its 16-bit length field."""

_MAX_STRAY = 2**16


@dataclass(frozen=True)
class Segment:
    """One segment: the second byte of its marker, and the content without marker and length."""

    marker: int
    content: bytes


def read_segments(file: BinaryIO) -> Iterator[Segment]:
    """Yield the application segments and comments before the samples, up to the first malformed one."""
    file.seek(2)
    stray = 0
    while stray < _MAX_STRAY:
        byte = file.read(1)
        if not byte:
            return
        if byte != b"\xff":
            stray += 1  # a stray byte before a marker, which decoders also skip
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
    """Return a segment with its marker and length.

    Raises:
        ValueError: `content` is longer than `MAX_CONTENT`.
    """
    if len(content) > MAX_CONTENT:
        raise ValueError(f"content: {len(content)} bytes; a JPEG segment holds at most {MAX_CONTENT}")
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


_SOI, _EOI, _SOS, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
# Frame headers: 0xC0 to 0xCF except for tables and a reserved marker, and that of JPEG-LS.
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
# Entropy-coded data end at a marker; stuffed zeros and restart markers are part of the data.
# (A pattern that begins with one fixed byte is found many times faster than one that begins with a repeated byte.)
_END_OF_SCAN = re.compile(rb"\xff\xff*[^\x00\xd0-\xd7\xff]")
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")

_KINDS = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical lossless",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded progressive",
    0xCB: "arithmetic-coded lossless",
    0xCD: "hierarchical arithmetic-coded",
    0xCE: "hierarchical arithmetic-coded",
    0xCF: "hierarchical arithmetic-coded lossless",
    0xF7: "JPEG-LS",
}


@dataclass(frozen=True)
class _Segment:
    """A marker with its parameters and, after SOS, the entropy-coded data up to the next marker."""

    marker: int
    parameters: bytes
    data: bytes = b""


def special_kind(content: bytes) -> str | None:
    """Return the name of an unusual kind of JPEG ("lossless", "12-bit"…), or None if every decoder supports it."""
    frame = next((segment for segment in _segments(content) if segment.marker in _FRAMES), None)
    if frame is None or len(frame.parameters) < 6:
        return None
    words = [f"{frame.parameters[0]}-bit"] if frame.parameters[0] != 8 else []
    words += [_KINDS[frame.marker]] if frame.marker in _KINDS else []
    components = frame.parameters[5]
    words += [f"{components}-component"] if components not in (1, 3, 4) else []
    return " ".join(words) or None


def without_harmless_faults(content: bytes) -> bytes:
    """Return a JPEG stream without harmless faults, so that a decoder warns only of corrupt image data.

    Many cameras and programs write stray bytes before a marker, unknown version numbers, or scan parameters without a
    meaning in sequential files. libjpeg ignores these faults, but warns of them as it does of corrupt data. Here they
    are removed, or replaced by the values that libjpeg assumes.
    """
    parts = [b"\xff\xd8"]
    sequential = False
    four = False
    for segment in _segments(content):
        parameters = segment.parameters
        if segment.marker in _FRAMES:
            sequential = segment.marker in _SEQUENTIAL
            four = len(parameters) >= 6 and parameters[5] == 4
        elif segment.marker == _APP0 and parameters.startswith(b"JFIF\0") and len(parameters) > 5:
            parameters = parameters[:5] + b"\x01" + parameters[6:]
        elif segment.marker == _APP14 and parameters.startswith(b"Adobe") and len(parameters) >= 12:
            known = parameters[11] in (0, 1, 2)
            parameters = parameters if known else parameters[:11] + (b"\x02" if four else b"\x01") + parameters[12:]
        elif segment.marker == _SOS and sequential and len(parameters) >= 3:
            parameters = parameters[:-3] + b"\x00\x3f\x00"
        parts.append(bytes((0xFF, segment.marker)))
        if segment.marker != _EOI:
            parts += [(len(parameters) + 2).to_bytes(2, "big"), parameters, segment.data]
    return b"".join(parts)


def without_stray_bytes(content: bytes, warning: str) -> Iterator[bytes]:
    """Yield variants of the stream without stray bytes after a scan, one for each scan that may be concerned.

    Args:
        content: The stream, as returned by `without_harmless_faults`.
        warning: Warning of libjpeg. Nothing is yielded unless it is about such bytes.
    """
    match = _STRAY.search(warning)
    if match is None:
        return
    count, marker = int(match[1]), int(match[2], 16)
    for scan in _END_OF_SCAN.finditer(content):
        if content[scan.end() - 1] == marker:
            yield content[: scan.start() - count] + content[scan.start() :]


def end_of_picture(content: bytes, start: int = 0) -> int | None:
    """Return the position after the EOI marker of the JPEG stream that begins at `start`, or None without one."""
    for marker, _, _, end in _spans(content, start + 2):
        if marker == _EOI:
            return end
    return None


def _segments(content: bytes) -> Iterator[_Segment]:
    """Yield the segments up to the end of the image or to a truncated segment."""
    for marker, begin, stop, end in _spans(content, 2):
        yield _Segment(marker, content[begin:stop], content[stop:end])


def _spans(content: bytes, position: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield for each segment its marker, begin and end of the parameters, and end of the entropy-coded data."""
    while True:
        position = content.find(b"\xff", position)
        if position < 0 or position + 2 > len(content):
            return
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2
        if marker == _EOI:
            yield marker, position, position, position
            return
        if marker in _WITHOUT_LENGTH:
            continue
        length = int.from_bytes(content[position : position + 2], "big")
        begin, stop = position + 2, position + length
        if length < 2 or stop > len(content):
            return
        position = stop
        if marker == _SOS:
            found = _END_OF_SCAN.search(content, stop)
            position = found.start() if found else len(content)
        yield marker, begin, stop, position


_START = b"\xff\xd8\xff"
_FILM = re.compile(rb"MotionPhoto_Data|\0\0\0[\x08-\x7f]ftyp")  # Samsung's marker, and the beginning of MP4 and MOV
_FILL = b"\0\xff\r\n\t "  # bytes with which cameras fill blocks
_STEP = 2**20
_MAX_BYTES = 2**28  # data after the image are looked for only in this many bytes of a file


@dataclass(frozen=True)
class JpegTail:
    """Data after the end of the image in a JPEG file.

    Attributes:
        pictures: Number of JPEG images that follow directly.
        film: Whether the film of a motion photo follows them.
        size: Number of bytes after these images, without filling; 0 if they are a film.
    """

    pictures: int = 0
    film: bool = False
    size: int = 0


def read_tail(file: BinaryIO) -> JpegTail:
    """Find the data after the end of the image in a JPEG file; there are none if the image has no end.

    Args:
        file: The JPEG file, seekable.
    """
    whole = file.seek(0, os.SEEK_END)
    file.seek(0)
    content = file.read(_MAX_BYTES)
    end = end_of_picture(content)
    if end is None:
        return JpegTail()
    pictures = 0
    while True:
        start = _after_filling(content, end)
        further = end_of_picture(content, start) if content[start : start + len(_START)] == _START else None
        if further is None:
            break
        pictures, end = pictures + 1, further
    if start == whole:
        return JpegTail(pictures)
    film = _FILM.search(content, end) is not None
    return JpegTail(pictures, film, 0 if film else whole - end)


def _after_filling(content: bytes, begin: int) -> int:
    """Return the position of the first byte from `begin` on that is not filling; 0xFF before an image is not."""
    position = begin
    while position < len(content):
        piece = content[position : position + _STEP]
        rest = piece.lstrip(_FILL)
        position += len(piece) - len(rest)
        if rest:
            break
    begins_picture = content[position : position + 1] == _START[1:2] and position > begin
    return position - 1 if begins_picture and content[position - 1] == _START[0] else position
