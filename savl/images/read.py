"""Reading image files: the samples as encoded, and all that travels with them.

No colour is ever transformed, CMYK apart, which the networks do not know and which becomes sRGB. Bit depth is
the sample type of the file, never guessed from its values.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from savl.images.errors import ImageFileError, ImageNotFound, UnreadableImage, UnsupportedImage
from savl.images.format import JPEG, PNG, READABLE, TIFF, ImageFormat, Pixels, format_of_content
from savl.images.metadata import Metadata, take_metadata
from savl.images.vips_messages import tidy

if TYPE_CHECKING:
    import pyvips

_SAMPLE_NAMES = {"uchar": np.uint8, "ushort": np.uint16}


@dataclass(frozen=True)
class ImageFile:
    """A decoded image file.

    Attributes:
        pixels: (H, W, bands) uint8 or uint16, upright; bands 1 gray, 2 gray+alpha, 3 RGB, 4 RGBA.
        metadata: what is to travel to the output.
        format: the format of the file, by its content.
        notes: one lower-case sentence for each thing that reading left out or assumed.
    """

    pixels: Pixels
    metadata: Metadata
    format: ImageFormat
    notes: tuple[str, ...] = ()


ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""What `read_image` reads: a path, the bytes of a file, or a binary file object."""


def read_image(source: ImageSource, *, page: int | None = None) -> ImageFile:
    """Return the picture of a PNG, JPEG, WebP or TIFF file, whatever its name ends in.

    Gray, gray+alpha, RGB, RGBA, palette and 1-bit files of 8 or 16 bits per sample; palettes become RGB (RGBA
    with transparency), 1 to 4 bits become 8, CMYK becomes sRGB. EXIF orientation is applied.

    Args:
        source: A path, the file's bytes, or a binary file object, which is read to its end.
        page: The page of a TIFF file of several, counted from 1; None takes the first and says so in `notes`.

    Raises:
        ImageNotFound: There is no such file.
        UnreadableImage: The file is empty, truncated, corrupt, not permitted, no image, or no regular file.
        UnsupportedImage: The file is animated, has no such page, has samples that are not 8 or 16 bit, or an exotic
            colour space.
        TypeError: `source` is none of the kinds above.
    """
    if page is not None and page < 1:
        raise ValueError(f"page must be at least 1, got {page}")
    with _opened(source) as (name, file):
        return _read(name, file, page)


@contextmanager
def _opened(source: ImageSource) -> Iterator[tuple[str, BinaryIO]]:
    """Yield what errors call the source, and an open, seekable file at its beginning."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield "<bytes>", io.BytesIO(source)
        return
    if not isinstance(source, (str, os.PathLike)):
        yield _stream_name(source), io.BytesIO(_drained(source))
        return
    path = os.fspath(source)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # to open a pipe could wait forever
            raise UnreadableImage(path, "is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
        # Unbuffered: libvips reads through the same descriptor, and must find it where seek() left it.
        with open(path, "rb", buffering=0) as file:
            yield path, file
    except ImageFileError:
        raise
    except FileNotFoundError as error:
        raise ImageNotFound(path, "no such file") from error
    except OSError as error:
        raise UnreadableImage(path, (error.strerror or str(error)).lower()) from error


def _stream_name(stream: BinaryIO) -> str:
    name = getattr(stream, "name", None)
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else "<stream>"


def _drained(stream: BinaryIO) -> bytes:
    read = getattr(stream, "read", None)
    content = read() if callable(read) else None
    if not isinstance(content, bytes):
        raise TypeError(
            f"source must be a path, bytes or a binary file object, got {type(stream).__name__}"
            + (f", which reads {type(content).__name__}" if callable(read) else "")
        )
    return content


def _read(path: str, file: BinaryIO, page: int | None) -> ImageFile:
    import pyvips

    image_format = _identify(path, file)
    try:
        _take_vips_messages()
        load = getattr(pyvips.Image, f"{image_format.vips_name}load_source")
        image = load(_vips_source(file), fail_on="error")
        notes = _check_pages(path, image, image_format, page)
        if page is not None and page > 1:
            file.seek(0)
            image = load(_vips_source(file), fail_on="error", page=page - 1)
        _check_kind(path, image)
        image = image.copy_memory()
        _check_decoder_messages(path, image_format)
        image = _upright_rgb(image)
        metadata = take_metadata(image, file, image_format)
        # Copied, so that the array outlives libvips' buffer and can be written to.
        pixels = np.array(image.numpy()).reshape(image.height, image.width, image.bands)
    except pyvips.Error as error:
        detail = tidy(str(error)) or "its header cannot be read"
        reason = f"truncated or corrupt {image_format.title} ({detail})"
        raise UnreadableImage(path, reason) from error
    return ImageFile(pixels, metadata, image_format, notes)


def _vips_source(file: BinaryIO) -> pyvips.Source:
    import pyvips

    if isinstance(file, io.BytesIO):
        return pyvips.Source.new_from_memory(file.getvalue())
    return pyvips.Source.new_from_descriptor(file.fileno())


def _check_pages(path: str, image: pyvips.Image, image_format: ImageFormat, page: int | None) -> tuple[str, ...]:
    """Return what is to be said of the pages that are left out."""
    fields = image.get_fields()
    pages = image.get("n-pages") if "n-pages" in fields else 1
    if image_format is TIFF:
        if page is None and pages > 1:
            return (f"page 1 of {pages}; --page picks another",)
    elif pages > 1:
        raise UnsupportedImage(path, f"holds {pages} frames (animated); savl reads single pictures")
    if page is not None and page > pages:
        raise UnsupportedImage(path, f"has no page {page}; it holds {pages} page{'' if pages == 1 else 's'}")
    return ()


def _identify(path: str, file: BinaryIO) -> ImageFormat:
    head = file.read(12)
    if not head:
        raise UnreadableImage(path, "the file is empty")
    image_format = format_of_content(head)
    if image_format is None:
        raise UnreadableImage(path, f"not an image savl can read ({READABLE})")
    if image_format is PNG and _is_animated_png(file):
        raise UnsupportedImage(path, "animated PNG; savl reads single pictures")
    file.seek(0)
    return image_format


def _is_animated_png(file: BinaryIO) -> bool:
    """Whether an animation chunk stands before the samples; libvips would quietly read the first frame."""
    file.seek(8)
    while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
        if header[4:] == b"acTL":
            return True
        file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    return False


def _check_kind(path: str, image: pyvips.Image) -> None:
    if image.format not in _SAMPLE_NAMES:
        raise UnsupportedImage(path, f"has {image.format} samples; savl reads 8-bit and 16-bit unsigned ones")
    if image.interpretation in ("lab", "labs", "labq", "xyz", "lch"):
        raise UnsupportedImage(path, f"is in the {image.interpretation} colour space; convert it to RGB first")
    most = 5 if image.interpretation == "cmyk" else 4
    if image.bands > most:
        raise UnsupportedImage(path, f"has {image.bands} bands; savl reads gray and RGB, with or without alpha")


def _upright_rgb(image: pyvips.Image) -> pyvips.Image:
    """Applies the orientation, and turns CMYK into sRGB by its own profile or, lacking one, a generic one."""
    image = image.autorot()
    if image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
    return image


def _take_vips_messages() -> str:
    """Returns and clears what libvips has noted since the last look; warnings stay there unseen otherwise."""
    import pyvips

    text: str = pyvips.ffi.string(pyvips.vips_lib.vips_error_buffer()).decode(errors="replace")
    pyvips.vips_lib.vips_error_clear()
    return text


def _check_decoder_messages(path: str, image_format: ImageFormat) -> None:
    """Refuses JPEG files whose decoder met broken data and went on with made-up blocks.

    libjpeg calls that a warning, and so does it call the stray bytes that many cameras leave before a marker,
    which harm nothing: only the former are refused.
    """
    for message in _take_vips_messages().splitlines():
        if image_format is JPEG and "Corrupt JPEG data" in message and "extraneous bytes" not in message:
            raise UnreadableImage(path, f"truncated or corrupt JPEG ({tidy(message)})")
