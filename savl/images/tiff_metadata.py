"""Metadata of TIFF files: read entries into `Metadata`, and write `Metadata` as entries.

TIFF files store EXIF as entries of the first directory (camera, author, date) and in additional directories; libvips
neither reads nor writes them. XMP, IPTC, ICC profile and Photoshop's resources are entries, too.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import BinaryIO

from savl.images import exif as exif_blocks
from savl.images.exif import ExifBlock, build_exif
from savl.images.geotiff import GEO_TAGS, scaled_georeference
from savl.images.metadata_record import Metadata, Stored, TiffEntries
from savl.images.photoshop import split_resources
from savl.images.tiff_colour import COLOUR_TAGS, read_tiff_colour
from savl.images.tiff_directory import (
    ASCII,
    BYTE,
    IFD,
    LONG,
    SHORT,
    TYPE_SIZES,
    UNDEFINED,
    Entry,
    Layout,
    encode_directory,
    read_directory,
    read_layout,
)

_ORIENTATION = exif_blocks.ORIENTATION
_XMP, _IPTC, _PHOTOSHOP, _ICC = _BLOBS = 700, 33723, 34377, 34675
_RESOLUTION = (exif_blocks.X_RESOLUTION, exif_blocks.Y_RESOLUTION, exif_blocks.RESOLUTION_UNIT)
# Entries that describe the image, and may be in the first directory of an EXIF block.
_DESCRIPTIVE = frozenset(
    (
        0x010D,  # DocumentName
        0x010E,  # ImageDescription
        0x010F,  # Make
        0x0110,  # Model
        0x011D,  # PageName
        0x0129,  # PageNumber
        0x0131,  # Software
        0x0132,  # DateTime
        0x013B,  # Artist
        0x013C,  # HostComputer
        0x4746,  # Rating
        0x4749,  # RatingPercent
        0x8298,  # Copyright
        *range(0x9C9B, 0x9CA0),  # title, comment, author, keywords and subject of Windows
        0xC4A5,  # PrintImageMatching
    )
)
# Entries that tell how samples are stored (TIFF 6.0 and its supplements): written anew or not needed.
_STORAGE = frozenset(
    (254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 288, 289, 292, 293, 317, 320)
    + (*range(322, 326), 330, 332, 333, 334, 336, 338, 339, 347, *range(512, 516), *range(517, 522))
    + (*range(529, 533), 559)
)
# Entries of an EXIF block that would describe the samples of the TIFF file wrongly.
_NOT_FROM_EXIF = _STORAGE | GEO_TAGS | {*range(254, 300), 321, 337, *range(340, 347), 34016, 37439, 40976}
_THRESHOLDING, _PHOTOMETRIC = 263, 262
_NAMED_LOSSES = {
    _THRESHOLDING: "how gray became black and white",
    264: "how gray became black and white",
    265: "how gray became black and white",
    280: "the range of the samples",
    281: "the range of the samples",
    286: "the position on the page",
    287: "the position on the page",
    290: "the gray response curve",
    291: "the gray response curve",
    321: "the halftone hints",
    337: "the printer that was meant",
    340: "the range of the samples",
    341: "the range of the samples",
    **dict.fromkeys(range(343, 347), "the clipping path"),
    37724: "Photoshop's layers",
    50844: "the RPC georeference",
    50838: "ImageJ's metadata",
    50839: "ImageJ's metadata",
}
# Descriptions that tell how a program stored the samples: tifffile's shape, and headers of libvips and of pyramids.
_STORAGE_TEXT = re.compile(r'\s*(\{"shape":|<\?xml[^>]*\?>\s*<image xmlns="http://www\.vips)')
# Descriptions by microscopes (OME-XML) contain the size in pixels and the size of a pixel.
_OME = re.compile(r"<(?:\w+:)?OME\s")
_OME_SIZE = re.compile(r"""\b(PhysicalSize|Size)([XY])=(["'])([^"']*)\3""")
_IMAGEJ_LINE = re.compile(r"(?m)^(images|channels|slices|frames|hyperstack|mode|loop)=.*\n?")


def read_tiff(file: BinaryIO, page: int = 1) -> Metadata:
    """Return the metadata in the entries of a page. Damaged entries are ignored.

    Args:
        file: The TIFF file, seekable.
        page: Page, counted from 1.
    """
    found = read_layout(file)
    if found is None:
        return Metadata()
    layout, offset = found
    for _ in range(page - 1):
        offset = _following(file, layout, offset)
    known = _DESCRIPTIVE | GEO_TAGS | COLOUR_TAGS | {*_BLOBS, *_RESOLUTION, exif_blocks.PHOTO, exif_blocks.GPS}
    wanted = known | {_ORIENTATION, _PHOTOMETRIC, _THRESHOLDING}
    entries = read_directory(file, layout, offset, tags=wanted)  # skip entries that may be as large as the samples
    order = layout.order
    iptc = _blob(entries, _IPTC, order)
    photoshop = _blob(entries, _PHOTOSHOP, order)
    in_photoshop, others = split_resources(photoshop or b"")
    resolution, unit = _resolution(entries, order)
    unknown = sorted(set(_tags(file, layout, offset)) - known - _STORAGE)
    if _value(entries, _THRESHOLDING, order) == 1:  # 1 means no thresholding, the default
        unknown.remove(_THRESHOLDING)
    lost = [_NAMED_LOSSES.get(tag, f"the TIFF tag {tag}") for tag in unknown]
    colour, names = read_tiff_colour(entries, order, _value(entries, _PHOTOMETRIC, order))
    geo = tuple(entries[tag] for tag in sorted(GEO_TAGS & entries.keys()))
    return Metadata(
        exif=_exif(file, layout, entries),
        xmp=_blob(entries, _XMP, order),
        iptc=iptc or in_photoshop,
        photoshop=others,
        resolution=resolution,
        resolution_unit=unit,
        tiff=TiffEntries(order, geo) if geo else None,
        tiff_colour=colour,
        lost=tuple(dict.fromkeys(lost + names)),
    )


def read_tiff_orientation(file: BinaryIO, page: int = 1) -> int:
    """Return the orientation of a page of a TIFF file, 1 to 8; 1 if it has none."""
    found = read_layout(file)
    if found is None:
        return 1
    layout, offset = found
    for _ in range(page - 1):
        offset = _following(file, layout, offset)
    entry = read_directory(file, layout, offset, tags=[_ORIENTATION]).get(_ORIENTATION)
    numbers = () if entry is None else entry.numbers(layout.order)
    return int(numbers[0]) if numbers and numbers[0] in range(1, 9) else 1


def write_tiff(file: BinaryIO, metadata: Metadata, stored: Stored) -> None:
    """Add metadata to a complete TIFF file with one directory, in place.

    The samples are not moved: a new directory with old and new entries is appended, and the header is changed to refer
    to it.

    Args:
        file: File open for reading and writing. A file that is not TIFF is left unchanged.
        metadata: Metadata for the stored image.
        stored: The stored image.
    """
    found = read_layout(file)
    if found is None:
        return
    layout, offset = found
    raw = _raw_entries(file, layout, offset)
    for tag in _RESOLUTION:  # the encoder writes 10 per centimetre for an unknown resolution
        raw.pop(tag, None)
    order = layout.order
    end = file.seek(0, io.SEEK_END)
    end += end % 2
    entries = {entry.tag: entry for entry in _entries(metadata, stored, order)}
    data = bytearray()

    def place(block: bytes) -> int:
        data.extend(bytes((end + len(data)) % 2))
        at = end + len(data)
        data.extend(block)
        return at

    for tag, link in _sub_directories(metadata, layout, place).items():
        entries[tag] = link
    width = struct.calcsize(layout.offset)
    for tag, entry in entries.items():
        content = entry.data
        field = content.ljust(width, b"\0") if len(content) <= width else struct.pack(layout.offset, place(content))
        raw[tag] = struct.pack(layout.entry, tag, entry.type, entry.count, field)
    table = struct.pack(layout.count, len(raw)) + b"".join(raw[tag] for tag in sorted(raw)) + bytes(width)
    first = place(table)
    if not layout.big and end + len(data) >= 2**32:
        return
    _write(file, end, bytes(data))
    _write(file, layout.header, struct.pack(layout.offset, first))


def tiff_losses(metadata: Metadata) -> list[str]:
    """Return the names of metadata that a TIFF file cannot store."""
    return ["EXIF, which is damaged"] if metadata.exif is not None and _parsed(metadata.exif) is None else []


def _entries(metadata: Metadata, stored: Stored, order: str) -> Iterable[Entry]:
    """Return the entries of the first directory in the file's byte order, without links to other directories."""
    block = None if metadata.exif is None else _parsed(metadata.exif)
    if block is not None:
        for entry in block.entries(exif_blocks.IMAGE):
            if entry.tag in _DESCRIPTIVE or entry.tag not in _NOT_FROM_EXIF | {*_RESOLUTION, *_BLOBS}:
                yield _resized_text(entry, stored, metadata.scale(stored)).reordered(block.order, order)
    if metadata.resolution is not None:
        number, factor = {"in": (2, 25.4), "cm": (3, 10.0)}.get(metadata.resolution_unit, (1, 1.0))
        scale = metadata.scale(stored) if _is_calibrated(block) else (1.0, 1.0)
        for tag, value, grown in zip(_RESOLUTION, metadata.resolution, scale, strict=False):
            yield exif_blocks.rational(tag, round(value * factor * grown, 3), order)
        yield Entry(_RESOLUTION[2], SHORT, struct.pack(order + "H", number))
    blobs = {
        (_XMP, BYTE): metadata.xmp,
        (_IPTC, UNDEFINED): metadata.iptc,
        (_PHOTOSHOP, BYTE): metadata.photoshop,
        (_ICC, UNDEFINED): metadata.icc,
    }
    for (tag, kind), content in blobs.items():
        if content is not None:
            yield Entry(tag, kind, content)
    if metadata.tiff is not None:
        for entry in scaled_georeference(metadata.tiff, metadata.scale(stored)):
            yield entry.reordered(metadata.tiff.order, order)
    if metadata.tiff_colour is not None:
        for entry in metadata.tiff_colour.entries:
            yield entry.reordered(metadata.tiff_colour.order, order)


def _sub_directories(metadata: Metadata, layout: Layout, place: Callable[[bytes], int]) -> dict[int, Entry]:
    """Write the directories of EXIF and GPS with `place`, and return the entries that link to them."""
    block = None if metadata.exif is None else _parsed(metadata.exif)
    if block is None:
        return {}
    links: dict[int, Entry] = {}
    for name in (exif_blocks.INTEROPERABILITY, exif_blocks.PHOTO, exif_blocks.GPS):
        entries = [entry.reordered(block.order, layout.order) for entry in block.entries(name)]
        if name == exif_blocks.PHOTO and exif_blocks.INTEROPERABILITY in links:
            entries.append(links.pop(exif_blocks.INTEROPERABILITY))
        if entries:
            # Encoded twice: the position must be known, and depends on the size that the first encoding gives.
            at = place(b"")
            place(encode_directory(entries, layout, at))
            code, kind = ("Q", 18) if layout.big else ("I", LONG)
            links[name] = Entry(name, kind, struct.pack(layout.order + code, at))
    return links


def _parsed(exif: bytes) -> ExifBlock | None:
    try:
        return ExifBlock(exif)
    except ValueError:
        return None


def _exif(file: BinaryIO, layout: Layout, entries: dict[int, Entry]) -> bytes | None:
    """Build an EXIF block from the entries of a page, or return None if none of them describes the image."""
    order = layout.order

    def linked(holder: dict[int, Entry], tag: int) -> dict[int, Entry]:
        entry = holder.get(tag)
        numbers = () if entry is None or entry.type not in (LONG, IFD, 16, 18) else entry.numbers(order)
        return read_directory(file, layout, int(numbers[0])) if numbers else {}

    image = [_text_without_storage(entries[tag]) for tag in sorted(_DESCRIPTIVE & entries.keys())]
    directories = {exif_blocks.IMAGE: [entry for entry in image if entry is not None]}
    photo = linked(entries, exif_blocks.PHOTO)
    directories[exif_blocks.PHOTO] = list(photo.values())
    directories[exif_blocks.GPS] = list(linked(entries, exif_blocks.GPS).values())
    directories[exif_blocks.INTEROPERABILITY] = list(linked(photo, exif_blocks.INTEROPERABILITY).values())
    # EXIF does not allow the types that only BigTIFF defines.
    directories = {name: [e for e in held if e.type not in (16, 17, 18)] for name, held in directories.items()}
    if not any(directories.values()):
        return None
    if _ORIENTATION in entries:
        directories[exif_blocks.IMAGE].append(Entry(_ORIENTATION, SHORT, struct.pack(order + "H", 1)))
    return build_exif(directories, order)


def _text_without_storage(entry: Entry) -> Entry | None:
    """Return the entry without the part of a description that tells how a program stored the samples."""
    if entry.tag != exif_blocks.DESCRIPTION or entry.type != ASCII:
        return entry
    text = entry.text()
    if _STORAGE_TEXT.match(text):
        return None
    if text.startswith("ImageJ="):
        return replace(entry, data=_IMAGEJ_LINE.sub("", text).encode() + b"\0")
    return entry


def _resized_text(entry: Entry, stored: Stored, scale: tuple[float, float]) -> Entry:
    """Return the entry with the sizes in an OME-XML description updated."""
    if entry.tag != exif_blocks.DESCRIPTION or entry.type != ASCII or not _OME.search(text := entry.text()):
        return entry

    def resized(found: re.Match[str]) -> str:
        name, axis, quote, value = found.groups()
        across = axis == "X"
        if name == "Size":
            value = str(stored.width if across else stored.height)
        else:
            with contextlib.suppress(ValueError):
                value = f"{float(value) / scale[not across]:.9g}"
        return f"{name}{axis}={quote}{value}{quote}"

    return replace(entry, data=_OME_SIZE.sub(resized, text).encode() + b"\0")


def _is_calibrated(block: ExifBlock | None) -> bool:
    """Return whether the resolution is ImageJ's physical size of a pixel, not a size for printing."""
    entry = None if block is None else block.get(exif_blocks.IMAGE, exif_blocks.DESCRIPTION)
    text = "" if entry is None else entry.text()
    return text.startswith("ImageJ=") and "\nunit=" in text


def _value(entries: dict[int, Entry], tag: int, order: str) -> int:
    """Return the first number of an entry, or -1 if there is none."""
    numbers = entries[tag].numbers(order) if tag in entries else ()
    return int(numbers[0]) if numbers and math.isfinite(numbers[0]) else -1


def _blob(entries: dict[int, Entry], tag: int, order: str) -> bytes | None:
    """Return the bytes of an entry. If a program declared it as 32-bit words, they are in the file's byte order."""
    entry = entries.get(tag)
    if entry is None or not entry.data:
        return None
    # Some programs declare IPTC as LONG, and some of these swap the bytes of each word; a block begins with 0x1C.
    if tag == _IPTC and entry.type == LONG and entry.data[:1] != b"\x1c":
        return entry.reordered(order, "<" if order == ">" else ">").data
    return entry.data


def _resolution(entries: dict[int, Entry], order: str) -> tuple[tuple[float, float] | None, str]:
    values = [entries[tag].numbers(order)[:1] for tag in _RESOLUTION[:2] if tag in entries]
    if len(values) != 2 or not all(value and 0 < value[0] < 1e9 for value in values):
        return None, "in"
    unit = entries[_RESOLUTION[2]].numbers(order)[:1] if _RESOLUTION[2] in entries else (2,)
    x, y = values[0][0], values[1][0]
    if unit == (1,):
        return (None, "in") if x == y == 1 else ((x, y), "none")
    return ((x / 10, y / 10), "cm") if unit == (3,) else ((x / 25.4, y / 25.4), "in")


def _following(file: BinaryIO, layout: Layout, offset: int) -> int:
    """Return the position of the next directory, 0 if there is none."""
    file.seek(offset)
    head = file.read(struct.calcsize(layout.count))
    if len(head) < struct.calcsize(layout.count):
        return 0
    (count,) = struct.unpack(layout.count, head)
    file.seek(offset + len(head) + count * struct.calcsize(layout.entry))
    link = file.read(struct.calcsize(layout.offset))
    return int(struct.unpack(layout.offset, link)[0]) if len(link) == struct.calcsize(layout.offset) else 0


def _tags(file: BinaryIO, layout: Layout, offset: int) -> list[int]:
    """Return the tags of a directory, as far as the file contains them."""
    try:
        raws = _raw_entries(file, layout, offset)
    except (struct.error, OverflowError, OSError):
        return []
    return [tag for tag, raw in raws.items() if struct.unpack_from(layout.order + "H", raw, 2)[0] in TYPE_SIZES]


def _raw_entries(file: BinaryIO, layout: Layout, offset: int) -> dict[int, bytes]:
    """Return the entries of a directory as raw bytes, by tag."""
    file.seek(offset)
    (count,) = struct.unpack(layout.count, file.read(struct.calcsize(layout.count)))
    size = struct.calcsize(layout.entry)
    table = file.read(min(count, 65535) * size)
    raws = (table[at : at + size] for at in range(0, len(table) - size + 1, size))
    return {struct.unpack_from(layout.order + "H", raw)[0]: raw for raw in raws}


def _write(file: BinaryIO, position: int, data: bytes) -> None:
    file.seek(position)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
