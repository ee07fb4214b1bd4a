"""Find the pages of a TIFF file and read their directories (TIFF 6.0, section 2)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from savl.images.tiff_directory import Entry, Layout, read_directory, read_layout
from savl.images.vips_decode import DecodeFailure, UnsupportedKind, check_page

_PHOTOMETRIC, _TILE_WIDTH = 262, 322
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _SUB_DIRECTORIES, _DNG_VERSION = 254, 255, 330, 50706
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_TRANSPARENCY_MASK = 4  # a value of PhotometricInterpretation
_OLD_REDUCED = 2  # a value of SubfileType
_MOST_PAGES = 65535
# Fields that tell how samples are stored, what they mean, and whether a page is a thumbnail or a mask.
_TAGS = (
    *(254, 255, 256, 257, 258, 259, 262, 274, 277, 284, 317, 320, 322, 330, 332, 334, 336, 338, 339, 529, 530, 532),
    *(32995, _DNG_VERSION),
)


@dataclass(frozen=True)
class TiffPage:
    """One directory in the file's chain of directories.

    Attributes:
        index: Index in the chain, from 0.
        offset: Position in the file.
        layout: How the file stores numbers.
        entries: Entries that describe the samples, by tag.
        whole: Whether all these entries are within the file.
    """

    index: int
    offset: int
    layout: Layout
    entries: Mapping[int, Entry]
    whole: bool

    def numbers(self, tag: int) -> tuple[float, ...]:
        """Return the values of a field; none if it is missing or has an undefined value such as 0/0."""
        entry = self.entries.get(tag)
        numbers = () if entry is None else entry.numbers(self.layout.order)
        return numbers if all(map(math.isfinite, numbers)) else ()

    def number(self, tag: int, default: int) -> int:
        """Return the first value of a field, or `default`."""
        numbers = self.numbers(tag)
        return int(numbers[0]) if numbers else default

    @property
    def is_tiled(self) -> bool:
        """Whether the samples are stored in tiles instead of strips."""
        return _TILE_WIDTH in self.entries

    @property
    def is_mask(self) -> bool:
        """Whether this is a transparency mask of another page."""
        masks = self.number(_NEW_SUBFILE_TYPE, 0) & _MASK
        return bool(masks) or self.number(_PHOTOMETRIC, -1) == _TRANSPARENCY_MASK

    @property
    def is_reduced(self) -> bool:
        """Whether the fields declare a thumbnail or another reduced copy, or the mask of one."""
        reduced = self.number(_NEW_SUBFILE_TYPE, 0) & _REDUCED
        return bool(reduced) or self.number(_SUBFILE_TYPE, 0) == _OLD_REDUCED


def choose_page(file: BinaryIO, page: int | None) -> tuple[TiffPage, int, bool]:
    """Return a page, the number of pages, and whether the page has a mask. Thumbnails and masks do not count as pages.

    Args:
        file: The TIFF file, seekable.
        page: Page, counted from 1; None is the first.

    Raises:
        DecodeFailure: The file has no directory, or that of the page is truncated.
        UnsupportedKind: There is no such page, or the file contains raw camera data.
    """
    file.seek(8)
    if file.read(2) == b"CR":
        raise UnsupportedKind("is a CR2 file of raw camera data; convert it to an image first")
    directories = _read_chain(file)
    if not directories:
        raise DecodeFailure("its directory is missing")
    if any(_DNG_VERSION in directory.entries for directory in directories):
        raise UnsupportedKind("is a DNG file of raw camera data; convert it to an image first")
    pages = [directory for directory in directories if not (directory.is_mask or directory.is_reduced)]
    if not pages and any(_SUB_DIRECTORIES in directory.entries for directory in directories):
        raise UnsupportedKind("holds a thumbnail only, beside a sub-directory as raw camera files have it")
    pages = pages or directories
    check_page(page, len(pages))
    chosen = pages[0 if page is None else page - 1]
    if not chosen.whole:
        raise DecodeFailure("its directory is cut off")
    following = next((later.index for later in pages if later.index > chosen.index), len(directories))
    after = directories[chosen.index + 1 : following]
    return chosen, len(pages), any(later.is_mask and not later.is_reduced for later in after)


def _read_chain(file: BinaryIO) -> list[TiffPage]:
    found = read_layout(file)
    if found is None:
        return []
    layout, offset = found
    chain: list[TiffPage] = []
    seen: set[int] = set()
    while offset and offset not in seen and len(chain) < _MOST_PAGES:
        seen.add(offset)
        entries = read_directory(file, layout, offset, tags=_TAGS)
        if not entries:
            break
        tags, following = read_table(file, layout, offset)
        whole = following is not None and entries.keys() >= set(_TAGS).intersection(tags)
        chain.append(TiffPage(len(chain), offset, layout, entries, whole))
        offset = following or 0
    return chain


def read_table(file: BinaryIO, layout: Layout, offset: int) -> tuple[list[int], int | None]:
    """Return the tags of a directory and the offset of the next one; None if the file ends before that."""
    file.seek(offset)
    (count,) = struct.unpack(layout.count, file.read(struct.calcsize(layout.count)))
    size = struct.calcsize(layout.entry)
    table = file.read(min(count, 65535) * size)
    field = file.read(struct.calcsize(layout.offset))
    tags = [struct.unpack_from(layout.order + "H", table, start)[0] for start in range(0, len(table) - 1, size)]
    return tags, struct.unpack(layout.offset, field)[0] if len(field) == struct.calcsize(layout.offset) else None
