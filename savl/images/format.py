"""The image file formats savl reads and writes, and what each of them can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""An image file's samples: (H, W, bands), 1 gray, 2 gray+alpha, 3 RGB, 4 RGBA; alpha not premultiplied."""


@dataclass(frozen=True)
class ImageFormat:
    """One file format.

    Attributes:
        name: what the user types after `--format`, and the suffix of new files.
        title: how it is spelled in messages.
        suffixes: file name endings, lower case, with the dot.
        vips_name: libvips' word for it in `<word>load_source` and `<word>save_target`.
        max_side: pixels; the largest width or height a file can hold.
        holds_alpha: whether transparency can be stored.
        holds_16_bit: whether 16-bit samples can be stored.
        holds_gray: whether one-band pictures are stored as such.
        writable: whether savl writes it; the other formats are input only.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    vips_name: str
    max_side: int
    holds_alpha: bool
    holds_16_bit: bool
    holds_gray: bool
    writable: bool = True

    def sample_dtype(self, wanted: np.dtype[np.generic]) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """The sample type a file of this format gets for a picture of dtype `wanted`."""
        if wanted == np.uint16 and self.holds_16_bit:
            return np.dtype(np.uint16)
        return np.dtype(np.uint8)


PNG = ImageFormat("png", "PNG", (".png",), "png", 2**31 - 1, True, True, True)
# libjpeg stops a little short of the 65535 its 16-bit fields could say.
JPEG = ImageFormat("jpg", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), "jpeg", 65500, False, False, True)
WEBP = ImageFormat("webp", "WebP", (".webp",), "webp", 16383, True, False, False)
TIFF = ImageFormat("tiff", "TIFF", (".tiff", ".tif"), "tiff", 2**31 - 1, True, True, True)

GIF = ImageFormat("gif", "GIF", (".gif",), "gif", 65535, True, False, False, writable=False)
BMP = ImageFormat("bmp", "BMP", (".bmp", ".dib"), "", 2**31 - 1, True, False, True, writable=False)
AVIF = ImageFormat("avif", "AVIF", (".avif",), "heif", 65536, True, True, False, writable=False)
HEIC = ImageFormat("heic", "HEIC", (".heic", ".heif"), "heif", 65536, True, True, False, writable=False)

FORMATS = (PNG, JPEG, WEBP, TIFF)
"""The formats savl writes."""
READABLE_FORMATS = (*FORMATS, GIF, BMP, AVIF, HEIC)
"""The formats savl reads; HEIC, and AVIF, where libvips was built with a decoder for it."""
READABLE = ", ".join(image_format.title for image_format in READABLE_FORMATS)
HEAD_BYTES = 64
"""How many of a file's first bytes `format_of_content` looks at."""

_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
_BMP_HEADER_SIZES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))


def format_of_suffix(path: Path, formats: Sequence[ImageFormat] = FORMATS) -> ImageFormat | None:
    """Return the one of `formats` that a file name's ending stands for (any case), or None."""
    suffix = path.suffix.lower()
    return next((image_format for image_format in formats if suffix in image_format.suffixes), None)


def format_of_content(head: bytes) -> ImageFormat | None:
    """Return the format that a file's first `HEAD_BYTES` announce, whatever the file is called, or None.

    The first 12 bytes are enough for the formats that savl writes.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WEBP
    # Classic and BigTIFF, little and big endian.
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TIFF
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return BMP
    if head[4:8] == b"ftyp":
        end = min(len(head), int.from_bytes(head[:4], "big"))
        # The main brand and, behind its version, the compatible ones.
        brands = {head[start : start + 4] for start in (8, *range(16, end - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return AVIF
        if brands & _HEIC_BRANDS:
            return HEIC
    return None
