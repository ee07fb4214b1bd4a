"""Directories of tagged entries, of which TIFF files and EXIF blocks consist (TIFF 6.0, section 2; BigTIFF).

The data of an entry are kept as bytes in the byte order of their source. Data that are only copied are not interpreted,
so nothing is lost or rounded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import BinaryIO

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, DOUBLE, IFD = 1, 2, 3, 4, 5, 7, 12, 13
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size of one value of each type, in bytes."""
_WORD_SIZES = {**TYPE_SIZES, 5: 4, 10: 4}  # units whose bytes a change of byte order reverses; for fractions, each half
_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q"}


@dataclass(frozen=True)
class Layout:
    """Byte order and size of offsets in a file or EXIF block.

    Attributes:
        order: Byte order, "<" (little-endian) or ">" (big-endian), as in `struct`.
        big: Whether offsets have 64 bits (BigTIFF) instead of 32.
    """

    order: str
    big: bool

    @property
    def header(self) -> int:
        """Number of bytes before the offset of the first directory."""
        return 8 if self.big else 4

    @property
    def offset(self) -> str:
        """`struct` format of an offset."""
        return self.order + ("Q" if self.big else "I")

    @property
    def count(self) -> str:
        """`struct` format of the number of entries."""
        return self.order + ("Q" if self.big else "H")

    @property
    def entry(self) -> str:
        """`struct` format of an entry: tag, type, number of values, and the data or their offset."""
        return self.order + ("HHQ8s" if self.big else "HHI4s")


@dataclass(frozen=True)
class Entry:
    """One entry of a directory.

    Attributes:
        tag: Number of the field.
        type: Type of the values.
        data: The values, in the byte order of the directory from which they were read.
    """

    tag: int
    type: int
    data: bytes

    @property
    def count(self) -> int:
        """Number of values."""
        return len(self.data) // TYPE_SIZES[self.type]

    def numbers(self, order: str) -> tuple[float, ...]:
        """Return the values as numbers. Fractions are divided, with NaN for a division by zero; texts have none."""
        if self.type in (5, 10):
            parts = struct.unpack(f"{order}{2 * self.count}{'I' if self.type == 5 else 'i'}", self.data)
            return tuple(a / b if b else float("nan") for a, b in zip(parts[::2], parts[1::2], strict=True))
        if self.type not in _NUMBERS:
            return ()
        return struct.unpack(f"{order}{self.count}{_NUMBERS[self.type]}", self.data)

    def text(self) -> str:
        """Return the values as text, up to the first zero byte."""
        return self.data.partition(b"\0")[0].decode("utf-8", errors="replace")

    def reordered(self, old: str, new: str) -> Entry:
        """Return the entry with its data in another byte order."""
        size = _WORD_SIZES[self.type]
        if old == new or size == 1:
            return self
        turned = bytearray(len(self.data))
        for byte in range(size):
            turned[byte::size] = self.data[size - 1 - byte :: size]
        return replace(self, data=bytes(turned))


def read_layout(file: BinaryIO, start: int = 0) -> tuple[Layout, int] | None:
    """Return the layout and the offset of the first directory of a TIFF structure, or None if it is not TIFF.

    Args:
        file: File with the structure, seekable.
        start: Position of the structure in the file; offsets count from there.
    """
    file.seek(start)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return None
    version = struct.unpack_from(order + "H", head, 2)[0]
    if version not in (42, 43) or (version == 43 and len(head) < 16):
        return None
    layout = Layout(order, version == 43)
    return layout, struct.unpack_from(layout.offset, head, layout.header)[0]


def read_directory(
    file: BinaryIO, layout: Layout, offset: int, *, start: int = 0, tags: Iterable[int] | None = None
) -> dict[int, Entry]:
    """Return the entries of a directory by tag, without those outside the file or of unknown type.

    Args:
        file: File with the structure, seekable.
        layout: Byte order and size of offsets in the structure.
        offset: Position of the directory, relative to `start`.
        start: Position of the structure in the file.
        tags: Tags of the entries to read; None reads all.
    """
    end = file.seek(0, os.SEEK_END)
    wanted = None if tags is None else set(tags)
    width = struct.calcsize(layout.count)
    size = struct.calcsize(layout.entry)
    position = start + offset
    if offset < 8 or position + width > end:
        return {}
    file.seek(position)
    (count,) = struct.unpack(layout.count, file.read(width))
    table = file.read(min(count, 65535) * size)
    entries: dict[int, Entry] = {}
    for index in range(len(table) // size):
        tag, kind, values, field = struct.unpack_from(layout.entry, table, index * size)
        if kind not in TYPE_SIZES or tag in entries or (wanted is not None and tag not in wanted):
            continue
        length = values * TYPE_SIZES[kind]
        if length <= len(field):
            entries[tag] = Entry(tag, kind, field[:length])
            continue
        (where,) = struct.unpack(layout.offset, field)
        if start + where + length <= end:
            file.seek(start + where)
            entries[tag] = Entry(tag, kind, file.read(length))
    return entries


def encode_directory(entries: Iterable[Entry], layout: Layout, offset: int, *, next_offset: int = 0) -> bytes:
    """Return a directory and the data of its entries, to be written at `offset` (an even number).

    Args:
        entries: Entries in the byte order of `layout`, one per tag.
        layout: Byte order and size of offsets in the result.
        offset: Position at which the result will be written; the offsets in it count from the same start.
        next_offset: Position of the next directory.
    """
    chosen = sorted(entries, key=lambda entry: entry.tag)
    width = struct.calcsize(layout.offset)
    table = struct.pack(layout.count, len(chosen))
    after = offset + len(table) + struct.calcsize(layout.entry) * len(chosen) + width
    data = bytearray()
    for entry in chosen:
        if len(entry.data) <= width:
            field = entry.data.ljust(width, b"\0")
        else:
            data += bytes((after + len(data)) % 2)
            field = struct.pack(layout.offset, after + len(data))
            data += entry.data
        table += struct.pack(layout.entry, entry.tag, entry.type, entry.count, field)
    encoded = table + struct.pack(layout.offset, next_offset) + data
    return encoded + bytes(len(encoded) % 2)
