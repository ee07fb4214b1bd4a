"""EXIF in TIFF files, which libvips neither reads nor writes.

A TIFF file is itself a chain of EXIF-like directories, so EXIF lives in it as entries of the first directory:
plain texts (camera, author, date) and links to the EXIF and GPS directories.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any, BinaryIO

_EXIF_DIRECTORY = 0x8769
_GPS_DIRECTORY = 0x8825
_PIXEL_WIDTH = 0xA002
_PIXEL_HEIGHT = 0xA003

# Entries that describe the picture; everything else in the first directory describes how its samples are
# stored.
_DESCRIPTIVE = (
    0x010E,  # ImageDescription
    0x010F,  # Make
    0x0110,  # Model
    0x0131,  # Software
    0x0132,  # DateTime
    0x013B,  # Artist
    0x013C,  # HostComputer
    0x4746,  # Rating
    0x4749,  # RatingPercent
    0x8298,  # Copyright
    *range(0x9C9B, 0x9CA0),  # Windows' title, comment, author, keywords, subject
)

# What Pillow raises over a block that is cut off, loops or lies about its types.
_UNINTELLIGIBLE = (OSError, SyntaxError, ValueError, KeyError, TypeError, RuntimeError, struct.error)


def read_tiff_exif(file: BinaryIO) -> bytes | None:
    """Gathers the EXIF of a TIFF file into one block with its six-byte `Exif` signature, as JPEG holds it.

    Returns:
        The block, or None when the file has no descriptive entry, or none that can be understood: a file
        whose samples are sound must not be refused for its description.
    """
    from PIL import Image

    source = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.seek(0)
            source.load_from_fp(file)
            block = _descriptive_part(source)
            return block.tobytes() if len(block) else None
    except _UNINTELLIGIBLE:
        return None


def append_tiff_exif(file: BinaryIO, exif: bytes, *, width: int, height: int) -> bool:
    """Adds an EXIF block to a finished TIFF file of one directory, in place.

    The file keeps every byte it has: a new first directory, old entries and new, is written at the end, and
    the header is pointed at it.

    Args:
        file: open for reading and writing.
        exif: block with its six-byte `Exif` signature.
        width: of the picture as it is now, pixels.
        height: likewise.

    Returns:
        False, and the file untouched, when the block cannot be understood or the file is a BigTIFF.
    """
    from PIL import Image
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file.seek(0)
    header = file.read(8)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(header[:4])
    if order is None:
        return False
    (directory,) = struct.unpack(order + "I", header[4:])
    file.seek(directory)
    (count,) = struct.unpack(order + "H", file.read(2))
    stored = [file.read(12) for _ in range(count)]

    end = file.seek(0, io.SEEK_END)
    end += end % 2  # directories start on even bytes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = Image.Exif()
            source.load(exif)
            block = _descriptive_part(source, width=width, height=height)
            added = ImageFileDirectory_v2(header)
            for tag, value in block.items():
                added[tag] = value
            data = added.tobytes(end)
    except _UNINTELLIGIBLE:
        return False
    (added_count,) = struct.unpack_from(order + "H", data)
    entries = {_tag(order, entry): entry for entry in stored}
    for index in range(added_count):
        entry = data[2 + 12 * index : 14 + 12 * index]
        entries[_tag(order, entry)] = entry

    first = end + len(data)
    first += first % 2
    merged = struct.pack(order + "H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    if first + len(merged) >= 2**32:
        return False
    file.seek(end)
    file.write(data)
    file.seek(first)
    file.write(merged)
    file.seek(4)
    file.write(struct.pack(order + "I", first))
    return True


def _tag(order: str, entry: bytes) -> int:
    tag: int = struct.unpack_from(order + "H", entry)[0]
    return tag


def _descriptive_part(source: Any, *, width: int | None = None, height: int | None = None) -> Any:
    """A new `PIL.Image.Exif` with the entries of `source` that describe the picture and not its storage."""
    from PIL import Image

    block = Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in source:
            block[tag] = source[tag]
    for tag in (_EXIF_DIRECTORY, _GPS_DIRECTORY):
        entries = dict(source.get_ifd(tag))
        if tag == _EXIF_DIRECTORY:
            for dimension, size in ((_PIXEL_WIDTH, width), (_PIXEL_HEIGHT, height)):
                if size is not None and dimension in entries:
                    entries[dimension] = size
        if entries:
            block[tag] = entries
    return block
