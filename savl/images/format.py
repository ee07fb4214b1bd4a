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

FORMATS = (PNG, JPEG, WEBP, TIFF)
"""The formats savl writes."""
READABLE_FORMATS = FORMATS
"""The formats savl reads."""
READABLE = ", ".join(image_format.title for image_format in READABLE_FORMATS)


def format_of_suffix(path: Path, formats: Sequence[ImageFormat] = FORMATS) -> ImageFormat | None:
    """Return the one of `formats` that a file name's ending stands for (any case), or None."""
    suffix = path.suffix.lower()
    return next((image_format for image_format in formats if suffix in image_format.suffixes), None)


def format_of_content(head: bytes) -> ImageFormat | None:
    """Return the format that a file's first 12 bytes announce, whatever the file is called, or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WEBP
    # Classic and BigTIFF, little and big endian.
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TIFF
    return None
