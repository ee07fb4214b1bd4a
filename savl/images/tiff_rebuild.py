"""Rebuild TIFF files with new directories, for pages that libvips refuses or misinterprets.

The samples of a page stay where they are in the file. New directories, which only tell how the samples are stored, are
appended. They omit fields that do not concern the samples, or make each plane a page of its own, or declare the samples
of a pixel as pixels of a wider image.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from savl.images.tiff_directory import LONG, SHORT, Entry, encode_directory, read_directory
from savl.images.tiff_pages import TiffPage, read_table
from savl.images.vips_decode import DecodeFailure, UnsupportedKind

if TYPE_CHECKING:
    import pyvips

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 262, 277
_STRIP_OFFSETS, _ROWS, _STRIP_SIZES = 273, 278, 279
_PLANAR, _COLOUR_MAP, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES = 284, 320, 322, 323, 324, 325
_FILL_ORDER, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _ICC, _LONG8 = 266, 338, 339, 34675, 16
_SAMPLE_FIELDS = (_BITS, _COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT, 529, 530, 532)  # meaning of each sample
# Fields that tell how samples are stored, and the colour profile, which libvips returns.
_KEPT = {
    *(
        _WIDTH,
        _HEIGHT,
        259,
        _PHOTOMETRIC,
        _FILL_ORDER,
        _STRIP_OFFSETS,
        _SAMPLES,
        _ROWS,
        _STRIP_SIZES,
        _PLANAR,
        292,
        293,
        317,
    ),
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES, 347, _ICC, *range(512, 522), *_SAMPLE_FIELDS),
}
_BLACK_IS_ZERO = 1
_EXTRA_KINDS = (0, 1, 2, 999)  # values of ExtraSamples that libtiff knows


@dataclass(frozen=True)
class Layers:
    """How to assemble a page whose sample layout libvips cannot read.

    Attributes:
        apart: Whether each plane is read as an image of its own. Otherwise the samples of a pixel are adjacent and have
            fewer than 8 bits each, and are read as pixels of a wider image.
        samples: Number of samples per pixel.
        inverted: Whether 0 is white in the first sample.
        colours: Palette (256, 3) uint8 for the values of the first sample, scaled to 8 bits; None without a palette.
        premultiplied: Index of the alpha band that the other bands were multiplied with, or None.
        interpretation: libvips' interpretation for 8-bit samples.
    """

    apart: bool
    samples: int
    inverted: bool = False
    colours: np.ndarray[tuple[int, int], np.dtype[np.uint8]] | None = None
    premultiplied: int | None = None
    interpretation: str = "srgb"

    def rebuilt(self, file: BinaryIO, page: TiffPage) -> bytes:
        """Return the file with the directories of the pages that `join` needs.

        Raises:
            DecodeFailure: Samples are missing.
        """
        content = _content(file)
        entries = _storage(content, page)
        single = {tag: entry for tag, entry in entries.items() if tag not in _SAMPLE_FIELDS}
        single |= _fields(page, {_SAMPLES: 1, _PHOTOMETRIC: _BLACK_IS_ZERO, _PLANAR: 1, _BITS: page.number(_BITS, 1)})
        if not self.apart:
            for tag in {_WIDTH, _TILE_WIDTH} & entries.keys():
                single[tag] = _numbers(page, tag, [int(entries[tag].numbers(page.layout.order)[0]) * self.samples])
            return _with_directories(content, page, [single])
        blocks = _blocks_of_plane(page, entries)
        numbers = {
            tag: [int(number) for number in entries[tag].numbers(page.layout.order)] for tag in _block_tags(entries)
        }
        directories = []
        for plane in range(self.samples):
            directory = dict(single)
            for tag, every in numbers.items():
                own = every[plane * blocks : (plane + 1) * blocks]
                if len(own) < blocks:
                    raise DecodeFailure("some of its strips or tiles are missing")
                directory[tag] = _numbers(page, tag, own)
            directories.append(directory)
        return _with_directories(content, page, directories)

    @property
    def pages(self) -> int:
        """Number of pages that `join` needs."""
        return self.samples if self.apart else 1

    def join(self, pages: Sequence[pyvips.Image]) -> pyvips.Image:
        """Return the assembled image, in the form in which libvips returns pages that it can read."""
        import pyvips

        bands = list(pages)
        if not self.apart:
            wide = pages[0].bandfold(factor=self.samples)
            bands = [wide.extract_band(band) for band in range(self.samples)]
        if self.inverted:
            bands[0] = bands[0].invert()
        if self.colours is not None:
            table = pyvips.Image.new_from_memory(self.colours.tobytes(), len(self.colours), 1, 3, "uchar")
            bands[0] = bands[0].maplut(table)
        joined = bands[0].bandjoin(bands[1:]) if len(bands) > 1 else bands[0]
        deep = joined.format == "ushort"
        if self.premultiplied is not None:
            joined = joined.unpremultiply(max_alpha=65535 if deep else 255, alpha_band=self.premultiplied)
            joined = joined.cast("ushort" if deep else "uchar")
        name = {"b-w": "grey16", "srgb": "rgb16"}.get(self.interpretation) if deep else None
        return joined.copy(interpretation=name or self.interpretation)


def rebuilt(
    file: BinaryIO, page: TiffPage, fields: Mapping[int, int] | None = None, *, without: Iterable[int] = ()
) -> bytes:
    """Return a TIFF file of one page, without fields that do not concern its samples.

    Args:
        file: The TIFF file, seekable.
        page: The page.
        fields: New values for some fields of the page; fields that it does not have are not added.
        without: Further fields to leave out.

    Raises:
        DecodeFailure: Samples are missing.
    """
    content = _content(file)
    entries = _storage(content, page)
    entries |= _fields(page, {tag: value for tag, value in (fields or {}).items() if tag in entries})
    return _with_directories(content, page, [{tag: entries[tag] for tag in entries.keys() - set(without)}])


def is_complete(file: BinaryIO, page: TiffPage) -> bool:
    """Return whether all fields of a page are within the file."""
    tags, following = read_table(file, page.layout, page.offset)
    return following is not None and read_directory(file, page.layout, page.offset).keys() >= set(tags)


def check_tiles(file: BinaryIO, page: TiffPage) -> None:
    """Raise DecodeFailure if a tiled page has fewer tiles than its size requires.

    libvips would report each missing tile, and more slowly each time: minutes for a damaged file with a large width.
    """
    tags = (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS)
    entries = read_directory(file, page.layout, page.offset, tags=tags)
    if _TILE_OFFSETS in entries:
        _check_count(page, entries, entries[_TILE_OFFSETS].count)


def _check_count(page: TiffPage, entries: Mapping[int, Entry], count: int) -> None:
    if count < _blocks_of_plane(page, entries):
        raise DecodeFailure("some of its strips or tiles are missing")


def _content(file: BinaryIO) -> bytes:
    file.seek(0, os.SEEK_SET)
    return file.read()


def _storage(content: bytes, page: TiffPage) -> dict[int, Entry]:
    """Return the fields that tell how samples are stored; raise DecodeFailure if samples are missing in the file."""
    entries = read_directory(io.BytesIO(content), page.layout, page.offset, tags=_KEPT)
    order = page.layout.order
    offsets, sizes = (entries[tag].numbers(order) if tag in entries else () for tag in _block_tags(entries))
    if not offsets or len(sizes) < len(offsets):
        raise DecodeFailure("the places of its samples are missing")
    _check_count(page, entries, len(offsets))
    if any(offset + size > len(content) for offset, size in zip(offsets, sizes, strict=False)):
        raise DecodeFailure("its samples are cut off")
    for tag, known in ((_FILL_ORDER, (1, 2)), (_SAMPLE_FORMAT, range(1, 7))):
        if tag in entries and not set(entries[tag].numbers(order)).intersection(known):
            del entries[tag]
    if _EXTRA_SAMPLES in entries:
        kinds = [int(kind) if kind in _EXTRA_KINDS else 0 for kind in entries[_EXTRA_SAMPLES].numbers(order)]
        entries[_EXTRA_SAMPLES] = Entry(_EXTRA_SAMPLES, SHORT, struct.pack(f"{order}{len(kinds)}H", *kinds))
    return entries


def _block_tags(entries: Mapping[int, Entry]) -> tuple[int, int]:
    return (_TILE_OFFSETS, _TILE_SIZES) if _TILE_OFFSETS in entries else (_STRIP_OFFSETS, _STRIP_SIZES)


def _blocks_of_plane(page: TiffPage, entries: Mapping[int, Entry]) -> int:
    def number(tag: int, default: int) -> int:
        found = entries[tag].numbers(page.layout.order) if tag in entries else ()
        return int(found[0]) if found else default

    width, height = number(_WIDTH, 0), number(_HEIGHT, 0)
    block_width, block_height = width, min(number(_ROWS, height), height)
    if _TILE_OFFSETS in entries:
        block_width, block_height = number(_TILE_WIDTH, 0), number(_TILE_HEIGHT, 0)
    if min(width, height, block_width, block_height) < 1:
        raise DecodeFailure("its size is missing")
    return -(-width // block_width) * -(-height // block_height)


def _numbers(page: TiffPage, tag: int, numbers: Sequence[int]) -> Entry:
    code, kind = ("Q", _LONG8) if page.layout.big else ("I", LONG)
    return Entry(tag, kind, struct.pack(f"{page.layout.order}{len(numbers)}{code}", *numbers))


def _fields(page: TiffPage, fields: Mapping[int, int]) -> dict[int, Entry]:
    return {tag: Entry(tag, SHORT, struct.pack(page.layout.order + "H", value)) for tag, value in fields.items()}


def _with_directories(content: bytes, page: TiffPage, directories: Sequence[Mapping[int, Entry]]) -> bytes:
    layout = page.layout
    first = len(content) + len(content) % 2
    parts = [content, bytes(first - len(content))]
    at = first
    for index, directory in enumerate(directories):
        size = len(encode_directory(directory.values(), layout, at))
        last = index == len(directories) - 1
        parts.append(encode_directory(directory.values(), layout, at, next_offset=0 if last else at + size))
        at += size
    if not layout.big and at >= 2**32:
        raise UnsupportedKind("is stored in a way that savl reads in files below 4 GiB; convert it first")
    changed = bytearray().join(parts)
    struct.pack_into(layout.offset, changed, layout.header, first)
    return bytes(changed)
