"""Rewrite the directories of TIFF files, for pages that libvips refuses or misinterprets.

The samples of a page stay where they are in the file; only new directories are appended. The new directories change the
page in one of three ways:

- They omit the fields that do not describe the samples, because libvips may reject their values.
- They declare each plane as a separate page.
- They declare the samples of one pixel as neighbouring pixels of a wider image with one sample per pixel.
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
# Fields that describe the meaning of the samples: also YCbCrCoefficients, YCbCrSubSampling and ReferenceBlackWhite.
_SAMPLE_FIELDS = (_BITS, _COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT, 529, 530, 532)
# Fields that a rewritten directory keeps: those that describe how the samples are stored (also Compression (259),
# T4Options, T6Options (292, 293), Predictor (317) and the JPEG fields (347, 512 to 521)), and the colour profile.
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
_MISSING_BLOCKS = "some of its strips or tiles are missing"
_EXTRA_SAMPLE_TYPES = (0, 1, 2, 999)  # values of ExtraSamples that libtiff accepts


@dataclass(frozen=True)
class SplitSamples:
    """A page whose sample layout libvips cannot read, and which is therefore read sample by sample.

    `split` rewrites the file so that libvips can read it, and `join` assembles the image from the pages that it reads.

    Attributes:
        planar: Whether each plane is read as a separate page. If False, the samples of a pixel are stored next to each
            other with fewer than 8 bits each, and are read as pixels of a wider page.
        samples: Number of samples per pixel.
        inverted: Whether the value 0 of the first sample means white.
        colours: Palette (256, 3) uint8 for the values of the first sample, scaled to 8 bits; None without a palette.
        premultiplied: Index of the alpha band by which the other bands were multiplied, or None.
        interpretation: libvips' interpretation of the image if it has 8-bit samples.
    """

    planar: bool
    samples: int
    inverted: bool = False
    colours: np.ndarray[tuple[int, int], np.dtype[np.uint8]] | None = None
    premultiplied: int | None = None
    interpretation: str = "srgb"

    def split(self, file: BinaryIO, page: TiffPage) -> bytes:
        """Return a TIFF file whose pages are the planes of a page, or the wider page; see the class.

        Args:
            file: The TIFF file, seekable.
            page: The page to split.

        Raises:
            DecodeFailure: The file ends before the last sample, or a field that locates the samples is missing.
        """
        content = _read_whole(file)
        entries = _read_kept_fields(content, page)
        single = {tag: entry for tag, entry in entries.items() if tag not in _SAMPLE_FIELDS}
        single |= _short_entries(
            page, {_SAMPLES: 1, _PHOTOMETRIC: _BLACK_IS_ZERO, _PLANAR: 1, _BITS: page.number(_BITS, 1)}
        )
        if not self.planar:
            for tag in {_WIDTH, _TILE_WIDTH} & entries.keys():
                single[tag] = _offset_entry(page, tag, [int(entries[tag].numbers(page.layout.order)[0]) * self.samples])
            return _append_directories(content, page, [single])
        blocks = _blocks_per_plane(page, entries)
        numbers = {
            tag: [int(number) for number in entries[tag].numbers(page.layout.order)] for tag in _block_tags(entries)
        }
        directories = []
        for plane in range(self.samples):
            directory = dict(single)
            for tag, all_planes in numbers.items():
                this_plane = all_planes[plane * blocks : (plane + 1) * blocks]
                if len(this_plane) < blocks:
                    raise DecodeFailure(_MISSING_BLOCKS)
                directory[tag] = _offset_entry(page, tag, this_plane)
            directories.append(directory)
        return _append_directories(content, page, directories)

    @property
    def pages(self) -> int:
        """Number of pages of the file that `split` returns."""
        return self.samples if self.planar else 1

    def join(self, pages: Sequence[pyvips.Image]) -> pyvips.Image:
        """Return the image of the page, as libvips would return it if it could read the page directly.

        Args:
            pages: All pages of the file that `split` returns, read by libvips.
        """
        import pyvips

        bands = list(pages)
        if not self.planar:
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


def rewrite_page(
    file: BinaryIO, page: TiffPage, fields: Mapping[int, int] | None = None, *, without: Iterable[int] = ()
) -> bytes:
    """Return a TIFF file of one page, without the fields that do not describe its samples.

    Args:
        file: The TIFF file, seekable.
        page: The page.
        fields: New values of fields, by tag. They replace fields of the page; no field is added.
        without: Tags of further fields to remove.

    Raises:
        DecodeFailure: The file ends before the last sample, or a field that locates the samples is missing.
    """
    content = _read_whole(file)
    entries = _read_kept_fields(content, page)
    entries |= _short_entries(page, {tag: value for tag, value in (fields or {}).items() if tag in entries})
    return _append_directories(content, page, [{tag: entries[tag] for tag in entries.keys() - set(without)}])


def is_complete(file: BinaryIO, page: TiffPage) -> bool:
    """Return whether the file contains the values of all fields of a page, and does not end before."""
    tags, following = read_table(file, page.layout, page.offset)
    return following is not None and read_directory(file, page.layout, page.offset).keys() >= set(tags)


def check_tiles(file: BinaryIO, page: TiffPage) -> None:
    """Raise DecodeFailure if a tiled page has fewer tiles than its size requires.

    libvips would report every missing tile, and each report takes longer than the one before. A damaged file with a
    large width would take minutes.
    """
    tags = (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS)
    entries = read_directory(file, page.layout, page.offset, tags=tags)
    if _TILE_OFFSETS in entries:
        _check_count(page, entries, entries[_TILE_OFFSETS].count)


def _check_count(page: TiffPage, entries: Mapping[int, Entry], count: int) -> None:
    """Raise DecodeFailure if there are fewer strips or tiles than one plane of the page requires."""
    if count < _blocks_per_plane(page, entries):
        raise DecodeFailure(_MISSING_BLOCKS)


def _read_whole(file: BinaryIO) -> bytes:
    file.seek(0, os.SEEK_SET)
    return file.read()


def _read_kept_fields(content: bytes, page: TiffPage) -> dict[int, Entry]:
    """Return the fields of a page that a rewritten directory keeps, without values that libtiff would reject.

    Raises:
        DecodeFailure: The file ends before the last sample, or a field that locates the samples is missing.
    """
    entries = read_directory(io.BytesIO(content), page.layout, page.offset, tags=_KEPT)
    order = page.layout.order
    offsets, sizes = (entries[tag].numbers(order) if tag in entries else () for tag in _block_tags(entries))
    if not offsets or len(sizes) < len(offsets):
        raise DecodeFailure("it does not say where its samples are stored")
    _check_count(page, entries, len(offsets))
    if any(offset + size > len(content) for offset, size in zip(offsets, sizes, strict=False)):
        raise DecodeFailure("the file ends before its last sample")
    for tag, known in ((_FILL_ORDER, (1, 2)), (_SAMPLE_FORMAT, range(1, 7))):
        if tag in entries and not set(entries[tag].numbers(order)).intersection(known):
            del entries[tag]
    if _EXTRA_SAMPLES in entries:
        types = [int(each) if each in _EXTRA_SAMPLE_TYPES else 0 for each in entries[_EXTRA_SAMPLES].numbers(order)]
        entries[_EXTRA_SAMPLES] = Entry(_EXTRA_SAMPLES, SHORT, struct.pack(f"{order}{len(types)}H", *types))
    return entries


def _block_tags(entries: Mapping[int, Entry]) -> tuple[int, int]:
    """Return the tags of the positions and of the sizes of the tiles or, without tiles, of the strips."""
    return (_TILE_OFFSETS, _TILE_SIZES) if _TILE_OFFSETS in entries else (_STRIP_OFFSETS, _STRIP_SIZES)


def _blocks_per_plane(page: TiffPage, entries: Mapping[int, Entry]) -> int:
    """Return the number of strips or tiles that one plane of the page requires."""

    def number(tag: int, default: int) -> int:
        found = entries[tag].numbers(page.layout.order) if tag in entries else ()
        return int(found[0]) if found else default

    width, height = number(_WIDTH, 0), number(_HEIGHT, 0)
    block_width, block_height = width, min(number(_ROWS, height), height)
    if _TILE_OFFSETS in entries:
        block_width, block_height = number(_TILE_WIDTH, 0), number(_TILE_HEIGHT, 0)
    if min(width, height, block_width, block_height) < 1:
        raise DecodeFailure("it does not say how large the image or its tiles are")
    return -(-width // block_width) * -(-height // block_height)


def _offset_entry(page: TiffPage, tag: int, numbers: Sequence[int]) -> Entry:
    """Return a field of the widest integer type that the file supports: LONG8 in BigTIFF, otherwise LONG."""
    code, field_type = ("Q", _LONG8) if page.layout.big else ("I", LONG)
    return Entry(tag, field_type, struct.pack(f"{page.layout.order}{len(numbers)}{code}", *numbers))


def _short_entries(page: TiffPage, fields: Mapping[int, int]) -> dict[int, Entry]:
    """Return fields of type SHORT with one value each, by tag."""
    return {tag: Entry(tag, SHORT, struct.pack(page.layout.order + "H", value)) for tag, value in fields.items()}


def _append_directories(content: bytes, page: TiffPage, directories: Sequence[Mapping[int, Entry]]) -> bytes:
    """Return the file with new directories at its end, which replace its former chain of directories.

    Raises:
        UnsupportedKind: The new directories would lie beyond 4 GiB, and the file is not a BigTIFF.
    """
    layout = page.layout
    first = len(content) + len(content) % 2
    parts = [content, bytes(first - len(content))]
    offset = first
    for index, directory in enumerate(directories):
        size = len(encode_directory(directory.values(), layout, offset))
        last = index == len(directories) - 1
        next_offset = 0 if last else offset + size
        parts.append(encode_directory(directory.values(), layout, offset, next_offset=next_offset))
        offset += size
    if not layout.big and offset >= 2**32:
        raise UnsupportedKind("has a sample layout that savl reads only in files smaller than 4 GiB; convert it first")
    changed = bytearray().join(parts)
    struct.pack_into(layout.offset, changed, layout.header, first)
    return bytes(changed)
