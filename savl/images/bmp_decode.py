"""Decode BMP files with Pillow, because libvips does not read them."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from savl.images.vips_decode import DecodeFailure, UnsupportedKind, check_page, vips_operation

if TYPE_CHECKING:
    import pyvips

_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA"}
_CORE_HEADER = 12
_UNPACKED = (0, 3, 6)  # compressions in which every row has its full length
_COMPRESSIONS = {4: "JPEG", 5: "PNG", 11: "CMYK", 12: "CMYK", 13: "CMYK"}
# Errors that Pillow raises for a truncated or inconsistent file.
_UNINTELLIGIBLE = (
    OSError,
    OverflowError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
    struct.error,
)


def decode_bmp(file: BinaryIO, page: int | None = None) -> pyvips.Image:
    """Decode a BMP file to an image in memory, 8-bit gray, RGB or RGBA.

    Raises:
        DecodeFailure: The file is truncated or corrupt.
        UnsupportedKind: Pillow does not support its compression, or `page` is above 1.
    """
    import pyvips
    from PIL.BmpImagePlugin import BmpImageFile

    check_page(page, 1)
    _check_length(file)
    file.seek(0)
    try:
        # Not Image.open, which refuses large images, and warns through filters that all threads share.
        with BmpImageFile(file) as picture:
            dpi = picture.info.get("dpi", (0.0, 0.0))
            samples = np.array(picture.convert(_MODES[picture.mode]))
    except _UNINTELLIGIBLE as error:
        raise DecodeFailure(str(error)) from error
    with vips_operation():
        image = pyvips.Image.new_from_array(samples)
        known = all(per_inch > 0 for per_inch in dpi)
        return image.copy(xres=dpi[0] / 25.4, yres=dpi[1] / 25.4) if known else image


def bmp_size(file: BinaryIO) -> tuple[int, int]:
    """Return width and height from the header, in pixels."""
    header = _read_header(file)
    return header.width, abs(header.height)


@dataclass(frozen=True)
class _Header:
    offset: int  # position of the samples in the file
    width: int
    height: int  # negative if rows are stored from top to bottom
    bits: int
    compression: int


def _read_header(file: BinaryIO) -> _Header:
    file.seek(0)
    head = file.read(54).ljust(54, b"\0")
    offset, size = struct.unpack_from("<II", head, 10)
    if size == _CORE_HEADER:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
        return _Header(offset, width, height, bits, 0)
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", head, 18)
    return _Header(offset, width, height, bits, compression)


def _check_length(file: BinaryIO) -> None:
    """Raise DecodeFailure if the file is shorter than its header says: Pillow may fill in missing samples silently."""
    header = _read_header(file)
    if header.compression in _COMPRESSIONS:
        raise UnsupportedKind(
            f"is a BMP file compressed by {_COMPRESSIONS[header.compression]}; convert it to PNG first"
        )
    row = (header.width * header.bits + 31) // 32 * 4
    end = header.offset + row * (abs(header.height) - 1) + header.width * header.bits // 8
    if header.compression in _UNPACKED and end > file.seek(0, os.SEEK_END):
        raise DecodeFailure("the file ends before its last row")
