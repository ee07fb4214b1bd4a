"""The image file formats that savl reads and writes, and what each can store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""Samples of an image: (H, W, bands); 1 band is gray, 2 gray and alpha, 3 RGB, 4 RGBA. Colour is not premultiplied."""


@dataclass(frozen=True)
class ImageFormat:
    """An image file format.

    Attributes:
        name: Value of `--format`, and suffix of new files.
        title: Name in messages.
        suffixes: File name suffixes, lower case, with the dot.
        vips_name: Name in libvips' operations `<name>load_source` and `<name>save_target`.
        max_side: Largest width or height that a file can store, in pixels.
        holds_alpha: Whether the format can store transparency.
        holds_16_bit: Whether the format can store 16-bit samples.
        holds_gray: Whether gray images are stored with one band.
        writable: Whether savl writes the format; it only reads the others.
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
        """Return the dtype of the samples in a file of this format, for an image of dtype `wanted`."""
        if wanted == np.uint16 and self.holds_16_bit:
            return np.dtype(np.uint16)
        return np.dtype(np.uint8)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as the name: formats are compared by identity, in other processes too."""
        return _format_named, (self.name,)


PNG = ImageFormat("png", "PNG", (".png",), "png", 2**31 - 1, True, True, True)
# libjpeg's limit, slightly below the 65535 that its 16-bit fields could store.
JPEG = ImageFormat("jpg", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), "jpeg", 65500, False, False, True)
WEBP = ImageFormat("webp", "WebP", (".webp",), "webp", 16383, True, False, False)
TIFF = ImageFormat("tiff", "TIFF", (".tiff", ".tif"), "tiff", 2**31 - 1, True, True, True)

GIF = ImageFormat("gif", "GIF", (".gif",), "gif", 65535, True, False, False, writable=False)
BMP = ImageFormat("bmp", "BMP", (".bmp", ".dib"), "", 2**31 - 1, True, False, True, writable=False)
AVIF = ImageFormat("avif", "AVIF", (".avif",), "heif", 65536, True, True, False, writable=False)
HEIC = ImageFormat("heic", "HEIC", (".heic", ".heif"), "heif", 65536, True, True, False, writable=False)

FORMATS = (PNG, JPEG, WEBP, TIFF)
"""The formats that savl writes."""
READABLE_FORMATS = (*FORMATS, GIF, BMP, AVIF, HEIC)
"""The formats that savl reads. HEIC and AVIF need a libvips that was built with a decoder for them."""
READABLE = ", ".join(image_format.title for image_format in READABLE_FORMATS)
HEAD_BYTES = 64
"""Number of bytes at the beginning of a file that `format_of_content` examines."""

_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
_BMP_HEADER_SIZES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))


def _format_named(name: str) -> ImageFormat:
    return next(image_format for image_format in READABLE_FORMATS if image_format.name == name)


def format_of_suffix(path: Path, formats: Sequence[ImageFormat] = FORMATS) -> ImageFormat | None:
    """Return the format in `formats` that the suffix of `path` stands for, in any case, or None."""
    suffix = path.suffix.lower()
    return next((image_format for image_format in formats if suffix in image_format.suffixes), None)


def format_of_content(head: bytes) -> ImageFormat | None:
    """Return the format of a file by its first `HEAD_BYTES` bytes, or None if it is none of these formats.

    The first 12 bytes are sufficient for the formats that savl writes.
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
        # The main brand and, after its version, the compatible brands.
        brands = {head[start : start + 4] for start in (8, *range(16, end - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return AVIF
        if brands & _HEIC_BRANDS:
            return HEIC
    return None
