"""The markers of a JPEG stream: what kind it is of, and what is wrong with it that harms nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SOI, _EOI, _SOS, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
# Frame headers: 0xC0 to 0xCF without the tables and the reserved marker among them, and JPEG-LS.
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
# Entropy-coded data ends at a marker; a stuffed zero and restart markers are part of it.
# (A pattern that begins with one fixed byte is searched many times faster than one with a repeated one.)
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
    """A marker with what follows it up to the next: its parameters, and after SOS the entropy-coded data."""

    marker: int
    parameters: bytes
    data: bytes = b""


def special_kind(content: bytes) -> str | None:
    """Return what is unusual about a JPEG file ("lossless", "12-bit"…), or None for one that every decoder reads."""
    frame = next((segment for segment in _segments(content) if segment.marker in _FRAMES), None)
    if frame is None or len(frame.parameters) < 6:
        return None
    words = [f"{frame.parameters[0]}-bit"] if frame.parameters[0] != 8 else []
    words += [_KINDS[frame.marker]] if frame.marker in _KINDS else []
    components = frame.parameters[5]
    words += [f"{components}-component"] if components not in (1, 3, 4) else []
    return " ".join(words) or None


def without_harmless_faults(content: bytes) -> bytes:
    """Return a JPEG stream whose decoder has nothing to warn of but faults in the picture itself.

    Many cameras and programs leave stray bytes before a marker, unknown version numbers, or scan parameters that mean
    nothing in a sequential file. libjpeg warns of each, as it does of broken data, and ignores it. So they are removed
    or set to what libjpeg assumes in their place.
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
    """Yield the stream without the stray bytes after a scan that libjpeg warned of, once for each scan they may be in.

    Args:
        content: As `without_harmless_faults` returns it.
        warning: Libjpeg's message; one about anything else yields nothing.
    """
    told = _STRAY.search(warning)
    if told is None:
        return
    count, marker = int(told[1]), int(told[2], 16)
    for scan in _END_OF_SCAN.finditer(content):
        if content[scan.end() - 1] == marker:
            yield content[: scan.start() - count] + content[scan.start() :]


def end_of_picture(content: bytes, start: int = 0) -> int | None:
    """Return where the JPEG stream that begins at `start` ends, behind its EOI marker, or None when it does not."""
    for marker, _, _, end in _spans(content, start + 2):
        if marker == _EOI:
            return end
    return None


def _segments(content: bytes) -> Iterator[_Segment]:
    """Yield the segments up to the end of the picture; one that is cut off ends them."""
    for marker, begin, stop, end in _spans(content, 2):
        yield _Segment(marker, content[begin:stop], content[stop:end])


def _spans(content: bytes, position: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield marker, begin and end of the parameters, and end of the entropy-coded data, of each segment."""
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
