"""Find the pages of a TIFF file and read their directories (TIFF 6.0, section 2)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from savl.images.tiff_directory import Entry, Layout, read_directory, read_layout
from savl.images.vips_decode import DecodeFailure, UnsupportedKind, check_page

# Tags.
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _PHOTOMETRIC, _TILE_WIDTH = 254, 255, 262, 322
_SUB_DIRECTORIES, _DNG_VERSION = 330, 50706
# Values of these fields.
_NEW_SUBFILE_TYPE_REDUCED_BIT, _NEW_SUBFILE_TYPE_MASK_BIT = 1, 4
_SUBFILE_TYPE_REDUCED = 2
_PHOTOMETRIC_TRANSPARENCY_MASK = 4

_MAX_DIRECTORIES = 65535
# Tags of the fields that describe how samples are stored and interpreted, and whether a page is a thumbnail or a mask.
_TAGS = (
    *(254, 255, 256, 257, 258, 259, 262, 274, 277, 284, 317, 320, 322, 330, 332, 334, 336, 338, 339, 529, 530, 532),
    *(32995, _DNG_VERSION),
)


@dataclass(frozen=True)
class TiffPage:
    """One directory in the file's chain of directories.

    Attributes:
        index: Index of the directory in the chain, counted from 0.
        offset: Position of the directory in the file, in bytes.
        layout: Byte order and size of offsets in the file.
        entries: The entries that describe the samples, by tag.
        complete: Whether the file contains the whole directory and the data of all these entries.
    """

    index: int
    offset: int
    layout: Layout
    entries: Mapping[int, Entry]
    complete: bool

    def numbers(self, tag: int) -> tuple[float, ...]:
        """Return the values of a field. The tuple is empty if the field is missing or a value is not finite (0/0)."""
        entry = self.entries.get(tag)
        numbers = () if entry is None else entry.numbers(self.layout.order)
        return numbers if all(map(math.isfinite, numbers)) else ()

    def number(self, tag: int, default: int) -> int:
        """Return the first value of a field, or `default` if there is none."""
        numbers = self.numbers(tag)
        return int(numbers[0]) if numbers else default

    @property
    def is_tiled(self) -> bool:
        """Whether the samples are stored in tiles instead of strips."""
        return _TILE_WIDTH in self.entries

    @property
    def is_mask(self) -> bool:
        """Whether this is a transparency mask of another page."""
        mask_bit = self.number(_NEW_SUBFILE_TYPE, 0) & _NEW_SUBFILE_TYPE_MASK_BIT
        return bool(mask_bit) or self.number(_PHOTOMETRIC, -1) == _PHOTOMETRIC_TRANSPARENCY_MASK

    @property
    def is_reduced(self) -> bool:
        """Whether this is a reduced copy of another page, such as a thumbnail, or the mask of such a copy."""
        reduced_bit = self.number(_NEW_SUBFILE_TYPE, 0) & _NEW_SUBFILE_TYPE_REDUCED_BIT
        return bool(reduced_bit) or self.number(_SUBFILE_TYPE, 0) == _SUBFILE_TYPE_REDUCED


def choose_page(file: BinaryIO, page: int | None) -> tuple[TiffPage, int, bool]:
    """Find the directory of a page. Thumbnails and transparency masks are not counted as pages.

    Args:
        file: The TIFF file, seekable.
        page: Page number, counted from 1; None selects the first page.

    Returns:
        The page, the number of pages in the file, and whether the page has a transparency mask.

    Raises:
        DecodeFailure: The file has no directory, or the directory of the page is truncated.
        UnsupportedKind: The file has no such page, or it contains raw camera data.
    """
    file.seek(8)  # position of the signature of a CR2 file
    if file.read(2) == b"CR":
        raise UnsupportedKind("is a CR2 file of raw camera data; convert it to an image first")
    directories = _read_chain(file)
    if not directories:
        raise DecodeFailure("its TIFF directory is missing")
    if any(_DNG_VERSION in directory.entries for directory in directories):
        raise UnsupportedKind("is a DNG file of raw camera data; convert it to an image first")
    pages = [directory for directory in directories if not (directory.is_mask or directory.is_reduced)]
    if not pages and any(_SUB_DIRECTORIES in directory.entries for directory in directories):
        raise UnsupportedKind(
            "contains only a thumbnail and a sub-image, as raw camera files do; convert it to an image first"
        )
    pages = pages or directories
    check_page(page, len(pages))
    chosen = pages[0 if page is None else page - 1]
    if not chosen.complete:
        raise DecodeFailure("its TIFF directory is truncated")
    # The masks of a page are stored between it and the next page.
    next_page = next((later.index for later in pages if later.index > chosen.index), len(directories))
    between = directories[chosen.index + 1 : next_page]
    return chosen, len(pages), any(later.is_mask and not later.is_reduced for later in between)


def _read_chain(file: BinaryIO) -> list[TiffPage]:
    """Read all directories in the chain; each contains the offset of the next one. Stop at the first unreadable one."""
    found = read_layout(file)
    if found is None:
        return []
    layout, offset = found
    chain: list[TiffPage] = []
    seen: set[int] = set()
    while offset and offset not in seen and len(chain) < _MAX_DIRECTORIES:
        seen.add(offset)
        entries = read_directory(file, layout, offset, tags=_TAGS)
        if not entries:
            break
        tags, next_offset = read_table(file, layout, offset)
        complete = next_offset is not None and entries.keys() >= set(_TAGS).intersection(tags)
        chain.append(TiffPage(len(chain), offset, layout, entries, complete))
        offset = next_offset or 0
    return chain


def read_table(file: BinaryIO, layout: Layout, offset: int) -> tuple[list[int], int | None]:
    """Return the tags of a directory, and the offset of the next directory.

    The offset is 0 for the last directory, and None if the file ends before the offset.
    """
    file.seek(offset)
    (count,) = struct.unpack(layout.count, file.read(struct.calcsize(layout.count)))
    size = struct.calcsize(layout.entry)
    table = file.read(min(count, 65535) * size)
    field = file.read(struct.calcsize(layout.offset))
    tags = [struct.unpack_from(layout.order + "H", table, start)[0] for start in range(0, len(table) - 1, size)]
    return tags, struct.unpack(layout.offset, field)[0] if len(field) == struct.calcsize(layout.offset) else None
