"""Read and edit EXIF blocks in place (Exif 3.0; a block is a TIFF structure after a six-byte signature).

An edit keeps the position of all other bytes, because makers' notes contain offsets into the block that only software
of the manufacturer could adjust.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from savl.images.tiff_directory import (
    ASCII,
    LONG,
    RATIONAL,
    SHORT,
    TYPE_SIZES,
    UNDEFINED,
    Entry,
    Layout,
    encode_directory,
    read_layout,
)

PREFIX = b"Exif\0\0"
IMAGE, PHOTO, GPS, INTEROPERABILITY = 0, 0x8769, 0x8825, 0xA005
"""Directories of a block, by the tag that refers to them; that of the image is the first directory."""
_PARENTS = {PHOTO: IMAGE, GPS: IMAGE, INTEROPERABILITY: PHOTO}

ORIENTATION, DESCRIPTION, DOCUMENT_NAME, SOFTWARE, ARTIST, COPYRIGHT = 0x0112, 0x010E, 0x010D, 0x0131, 0x013B, 0x8298
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128
USER_COMMENT = 0x9286
_SUBJECT_AREA, _SUBJECT_LOCATION = 0x9214, 0xA214
_FOCAL_PLANE = (0xA20E, 0xA20F)
# Tags of width and height, for each directory that may contain them.
_SIZES = {IMAGE: (0x0100, 0x0101), PHOTO: (0xA002, 0xA003), INTEROPERABILITY: (0x1001, 0x1002)}
_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH = 0x0201, 0x0202
_ENTRY = 12


@dataclass
class _Directory:
    offset: int
    room: int  # number of entries that fit at its current position
    following: int
    entries: dict[int, bytes]
    changed: bool = False


class ExifBlock:
    """An EXIF block whose entries can be read, added, replaced and removed.

    Raises:
        ValueError: The block is damaged.
    """

    def __init__(self, block: bytes) -> None:
        self._body = bytearray(block.removeprefix(PREFIX))
        found = read_layout(io.BytesIO(self._body))
        if found is None or found[0].big:
            raise ValueError("the EXIF block has no header")
        self._layout, first = found
        self._directories = {IMAGE: self._parse(first)}
        for name, parent in _PARENTS.items():
            link = self._directories[parent].entries.get(name) if parent in self._directories else None
            if link is not None:
                with contextlib.suppress(ValueError):
                    self._directories[name] = self._parse(self._number(link))

    @property
    def order(self) -> str:
        """Byte order of the entries' data, "<" or ">"."""
        return self._layout.order

    def get(self, directory: int, tag: int) -> Entry | None:
        """Return an entry, or None if it is missing or damaged."""
        raw = self._directories[directory].entries.get(tag) if directory in self._directories else None
        return None if raw is None else self._decode(raw)

    def entries(self, directory: int) -> list[Entry]:
        """Return the undamaged entries of a directory, without links to other directories."""
        raws = self._directories[directory].entries if directory in self._directories else {}
        decoded = (self._decode(raw) for tag, raw in raws.items() if tag not in _PARENTS)
        return [entry for entry in decoded if entry is not None]

    def put(self, directory: int, entry: Entry) -> None:
        """Add an entry in the block's byte order, or replace the one with the same tag."""
        held = self._directories.setdefault(directory, _Directory(0, 0, 0, {}))
        if len(entry.data) <= 4:
            field = entry.data.ljust(4, b"\0")
        else:  # append the data: those at the old place may be shared with other entries
            field = struct.pack(self.order + "I", self._append(entry.data))
        held.entries[entry.tag] = struct.pack(self.order + "HHI4s", entry.tag, entry.type, entry.count, field)
        held.changed = True

    def remove(self, directory: int, tag: int) -> None:
        """Remove an entry if it exists."""
        if directory in self._directories and self._directories[directory].entries.pop(tag, None) is not None:
            self._directories[directory].changed = True

    def cut_thumbnail(self) -> None:
        """Remove the thumbnail, which shows the old image."""
        held = self._directories[IMAGE]
        if not held.following:
            return
        with contextlib.suppress(ValueError):
            thumbnail = self._parse(held.following)
            offset, length = (
                self._number(thumbnail.entries.get(tag)) for tag in (_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH)
            )
            if offset >= self._end_of_entries() and offset + length >= len(self._body) - 1:
                del self._body[offset:]
        held.following = 0
        held.changed = True

    def to_bytes(self) -> bytes:
        """Return the block with its signature; an empty block if a damaged one cannot be saved."""
        sound = {name: self.entries(name) for name in self._directories}
        for name in (INTEROPERABILITY, GPS, PHOTO, IMAGE):
            held = self._directories.get(name)
            if held is None or not held.changed:
                continue
            table = struct.pack(self.order + "H", len(held.entries))
            table += b"".join(held.entries[tag] for tag in sorted(held.entries))
            table += struct.pack(self.order + "I", held.following)
            if len(held.entries) <= held.room:
                self._body[held.offset : held.offset + len(table)] = table
            else:
                held.offset, held.room = self._append(table), len(held.entries)
                pointer = struct.pack(self.order + "I", held.offset)
                if name == IMAGE:
                    self._body[4:8] = pointer
                else:
                    self.put(_PARENTS[name], Entry(name, LONG, pointer))
            held.changed = False
        block = PREFIX + bytes(self._body)
        try:
            ExifBlock(block)
        except ValueError:  # directories of a damaged block overlap, so that writing one broke another
            header = b"II*\0\x08\0\0\0" if self.order == "<" else b"MM\0*\0\0\0\x08"
            return build_exif(sound, self.order) or PREFIX + header + bytes(6)
        return block

    def _end_of_entries(self) -> int:
        """Return the end of the last directory or of the last entry's data, whichever is later."""
        end = 8
        for held in self._directories.values():
            end = max(end, held.offset + 2 + _ENTRY * held.room + 4)
            for raw in held.entries.values():
                kind, count, at = struct.unpack_from(self.order + "HII", raw, 2)
                length = count * TYPE_SIZES.get(kind, 1)
                end = max(end, at + length if length > 4 else 0)
        return end

    def _append(self, data: bytes) -> int:
        self._body += bytes(len(self._body) % 2)
        at = len(self._body)
        self._body += data
        return at

    def _parse(self, offset: int) -> _Directory:
        if not 8 <= offset <= len(self._body) - 6:
            raise ValueError("the EXIF block is truncated")
        (count,) = struct.unpack_from(self.order + "H", self._body, offset)
        start, end = offset + 2, offset + 2 + _ENTRY * count
        if end > len(self._body):
            raise ValueError("the EXIF block is truncated")
        entries: dict[int, bytes] = {}
        for at in range(start, end, _ENTRY):
            raw = bytes(self._body[at : at + _ENTRY])
            entries.setdefault(struct.unpack_from(self.order + "H", raw)[0], raw)
        following = struct.unpack_from(self.order + "I", self._body, end)[0] if end + 4 <= len(self._body) else 0
        return _Directory(offset, count if end + 4 <= len(self._body) else 0, following, entries)

    def _decode(self, raw: bytes) -> Entry | None:
        tag, kind, count, field = struct.unpack(self.order + "HHI4s", raw)
        if kind not in TYPE_SIZES:
            return None
        length = count * TYPE_SIZES[kind]
        if length <= 4:
            return Entry(tag, kind, field[:length])
        (at,) = struct.unpack(self.order + "I", field)
        return Entry(tag, kind, bytes(self._body[at : at + length])) if at + length <= len(self._body) else None

    def _number(self, raw: bytes | None) -> int:
        entry = None if raw is None else self._decode(raw)
        numbers = () if entry is None else entry.numbers(self.order)
        if not numbers:
            raise ValueError("an entry is missing")
        return int(numbers[0])


def build_exif(directories: dict[int, list[Entry]], order: str) -> bytes | None:
    """Build a block from directories whose data are in byte order `order`; return None if all are empty."""
    if not any(directories.values()):
        return None
    layout = Layout(order, False)
    body = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    children = {name: entries for name, entries in directories.items() if name != IMAGE and entries}
    if INTEROPERABILITY in children:
        children.setdefault(PHOTO, [])
    links = {name: bytes(4) for name in children}

    def linked(name: int) -> list[Entry]:
        own = [Entry(child, LONG, link) for child, link in links.items() if _PARENTS[child] == name]
        return [entry for entry in directories.get(name, []) if entry.tag not in _PARENTS] + own

    # The values of links do not change the length of a directory, so all positions are known in advance.
    at = len(body) + len(encode_directory(linked(IMAGE), layout, 8))
    places: dict[int, int] = {}
    for name in children:
        places[name] = at
        at += len(encode_directory(linked(name), layout, at))
    links.update({name: struct.pack(order + "I", place) for name, place in places.items()})
    body += encode_directory(linked(IMAGE), layout, 8)
    for name in children:
        body += encode_directory(linked(name), layout, places[name])
    return PREFIX + body


def read_orientation(block: bytes) -> int:
    """Return the orientation in a block, 1 to 8; 1 if it contains none or is damaged."""
    try:
        exif = ExifBlock(block)
    except ValueError:
        return 1
    entry = exif.get(IMAGE, ORIENTATION)
    numbers = () if entry is None else entry.numbers(exif.order)
    return int(numbers[0]) if numbers and numbers[0] in range(1, 9) else 1


def upright_exif(block: bytes, orientation: int, stored_size: tuple[int, int]) -> bytes:
    """Return the block for an image to which `orientation` was applied, without the thumbnail.

    Args:
        block: EXIF block, with or without its signature.
        orientation: The applied orientation, 1 to 8.
        stored_size: Width and height before, in pixels.

    Raises:
        ValueError: The block is damaged.
    """
    exif = ExifBlock(block)
    exif.cut_thumbnail()
    if exif.get(IMAGE, ORIENTATION) is not None:
        exif.put(IMAGE, Entry(ORIENTATION, SHORT, struct.pack(exif.order + "H", 1)))
    if orientation != 1:
        for tag in (_SUBJECT_AREA, _SUBJECT_LOCATION):
            area = _positions(exif, tag)
            if area is not None:
                x, y = turn_point(area[0], area[1], stored_size, orientation)
                sides = area[2:][::-1] if orientation >= 5 and len(area) == 4 else area[2:]
                exif.put(PHOTO, _shorts(exif, tag, [x, y, *sides]))
        if orientation >= 5:
            _swap(exif, IMAGE, X_RESOLUTION, Y_RESOLUTION)
            _swap(exif, PHOTO, *_FOCAL_PLANE)
    return exif.to_bytes()


def turn_point(x: float, y: float, size: tuple[int, int], orientation: int) -> tuple[float, float]:
    """Return the position of a pixel after `orientation` was applied to an image of `size` (width, height)."""
    right, bottom = size[0] - 1 - x, size[1] - 1 - y
    return {
        2: (right, y),
        3: (right, bottom),
        4: (x, bottom),
        5: (y, x),
        6: (bottom, x),
        7: (bottom, right),
        8: (y, right),
    }.get(orientation, (x, y))


def resized_exif(block: bytes, new_size: tuple[int, int], scale: tuple[float, float]) -> bytes:
    """Return the block for the image at another size.

    Sizes in the block are updated; positions in pixels and the focal plane resolution are scaled.

    Args:
        block: EXIF block.
        new_size: Width and height, in pixels.
        scale: New pixels per old pixel, horizontally and vertically.

    Raises:
        ValueError: The block is damaged.
    """
    exif = ExifBlock(block)
    for directory, tags in _SIZES.items():
        for tag, side in zip(tags, new_size, strict=True):
            if exif.get(directory, tag) is not None:
                kind, code = (SHORT, "H") if side < 2**16 else (LONG, "I")
                exif.put(directory, Entry(tag, kind, struct.pack(exif.order + code, side)))
    if scale == (1.0, 1.0):
        return exif.to_bytes()
    for tag in (_SUBJECT_AREA, _SUBJECT_LOCATION):
        area = _positions(exif, tag)
        if area is not None:
            # After x and y, a circle has one diameter and a rectangle has two sides.
            factors = [*scale, *(scale if len(area) == 4 else [math.sqrt(scale[0] * scale[1])])]
            exif.put(PHOTO, _shorts(exif, tag, [value * f for value, f in zip(area, factors, strict=False)]))
    for tag, factor in zip(_FOCAL_PLANE, scale, strict=True):
        entry = exif.get(PHOTO, tag)
        numbers = () if entry is None else entry.numbers(exif.order)
        if numbers and math.isfinite(numbers[0]) and 0 < numbers[0] * factor < 4e6:
            exif.put(PHOTO, rational(tag, numbers[0] * factor, exif.order))
    return exif.to_bytes()


def rational(tag: int, value: float, order: str) -> Entry:
    """Return an entry with a positive number as a fraction, with at least three digits."""
    denominator = 1 if value == int(value) else 1000 if value < 4e6 else 1
    return Entry(tag, RATIONAL, struct.pack(order + "II", round(value * denominator), denominator))


def text_entry(tag: int, text: str) -> Entry:
    """Return an entry of UTF-8 text, which programs write and read although Exif 2 allows ASCII only."""
    return Entry(tag, ASCII, text.encode() + b"\0")


def user_comment(text: str, order: str) -> Entry:
    """Return a user comment, in ASCII if possible, else in UTF-16 in the block's byte order."""
    if text.isascii():
        return Entry(USER_COMMENT, UNDEFINED, b"ASCII\0\0\0" + text.encode())
    return Entry(USER_COMMENT, UNDEFINED, b"UNICODE\0" + text.encode("utf-16-le" if order == "<" else "utf-16-be"))


def fit_exif(block: bytes, limit: int) -> tuple[bytes | None, list[str]]:
    """Reduce a block to at most `limit` bytes; return it and the names of the removed entries, largest first."""
    if len(block) <= limit:
        return block, []
    from PIL import ExifTags

    exif = ExifBlock(block)
    directories = {name: exif.entries(name) for name in (IMAGE, PHOTO, GPS, INTEROPERABILITY)}
    names: list[str] = []
    fitted = build_exif(directories, exif.order)
    while fitted is not None and len(fitted) > limit:
        name, entry = max(
            ((name, entry) for name, entries in directories.items() for entry in entries),
            key=lambda item: len(item[1].data),
        )
        directories[name].remove(entry)
        names.append(str(ExifTags.TAGS.get(entry.tag, f"tag {entry.tag}")))
        fitted = build_exif(directories, exif.order)
    return fitted, names


def _positions(exif: ExifBlock, tag: int) -> tuple[float, ...] | None:
    entry = exif.get(PHOTO, tag)
    numbers = () if entry is None else entry.numbers(exif.order)
    return numbers if len(numbers) in (2, 3, 4) else None


def _shorts(exif: ExifBlock, tag: int, values: Iterable[float]) -> Entry:
    numbers = [min(max(round(value), 0), 65535) for value in values]
    return Entry(tag, SHORT, struct.pack(f"{exif.order}{len(numbers)}H", *numbers))


def _swap(exif: ExifBlock, directory: int, first: int, second: int) -> None:
    entries = exif.get(directory, first), exif.get(directory, second)
    if entries[0] is not None and entries[1] is not None:
        exif.put(directory, Entry(first, entries[1].type, entries[1].data))
        exif.put(directory, Entry(second, entries[0].type, entries[0].data))
