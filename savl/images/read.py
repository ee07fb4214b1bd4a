"""Read image files: samples as they are encoded, and metadata.

Colours are converted only from spaces that the networks cannot process: CMYK, CIELab and YCbCr become RGB. The bit
depth is that of the file's sample type, never guessed from the values.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from savl.images.bmp_decode import bmp_size, decode_bmp
from savl.images.errors import ImageFileError, ImageNotFound, UnreadableImage, UnsupportedImage
from savl.images.format import (
    AVIF,
    BMP,
    HEAD_BYTES,
    HEIC,
    JPEG,
    PNG,
    READABLE,
    TIFF,
    ImageFormat,
    Pixels,
    format_of_content,
)
from savl.images.jpeg_decode import decode_jpeg
from savl.images.metadata import Metadata, read_metadata, with_orientation
from savl.images.read_only_metadata import heif_frames
from savl.images.tiff_decode import decode_tiff, tiff_size
from savl.images.tiff_kind import TiffKind
from savl.images.vips_decode import (
    VIPS_BYTES,
    DecodeFailure,
    UnsupportedKind,
    check_page,
    decode,
    reports_out_of_memory,
    summarized_message,
    vips_operation,
)
from savl.out_of_memory import can_allocate, require_memory

if TYPE_CHECKING:
    import pyvips

_NO_MEMORY = "out of memory while it is read; free some"
_NO_DECODER = re.compile("not been built in|unsupported|no decoder|decoding plugin", re.IGNORECASE)
_SAMPLE_NAMES = {"uchar": np.uint8, "ushort": np.uint16}


@dataclass(frozen=True)
class ImageFile:
    """A decoded image file.

    Attributes:
        pixels: (H, W, bands) uint8 or uint16, upright; 1 band is gray, 2 gray and alpha, 3 RGB, 4 RGBA.
        metadata: Metadata to copy to the output.
        format: Format of the file, by its content.
        notes: Notes for the user: one lower-case sentence for each kind of data that was left out or assumed.
    """

    pixels: Pixels
    metadata: Metadata
    format: ImageFormat
    notes: tuple[str, ...] = ()


ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""Sources of `read_image`: a path, the bytes of a file, or a binary file object."""


def read_image(source: ImageSource, *, page: int | None = None) -> ImageFile:
    """Read a PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF or HEIC file. The format is recognised by content, not by suffix.

    The result is gray, gray and alpha, RGB or RGBA, with 8 or 16 bits. Palettes are converted to RGB (RGBA with
    transparency), 1 to 4 bits to 8 bits, CMYK and CIELab to sRGB, YCbCr to RGB, and premultiplied colour to straight
    colour. EXIF orientation is applied.

    Args:
        source: A path, the file's bytes, or a binary file object, which is read to its end.
        page: Page of a TIFF file or frame of an animation, counted from 1. With None, the first of several pages is
            read and `notes` say so, but an animation is refused.

    Raises:
        ImageNotFound: The file does not exist.
        UnreadableImage: The file is empty, truncated, corrupt, not an image or not a regular file, or there is no
            permission to read it.
        UnsupportedImage: The file is an animation, has no such page, or has a sample type or colour space that is not
            supported.
        TypeError: `source` is none of these kinds, or `page` is not an int.
        ValueError: `page` is below 1.
    """
    if page is not None and (isinstance(page, bool) or not isinstance(page, (int, np.integer))):
        raise TypeError(f"page must be an int, counted from 1, got {type(page).__name__} {page!r}")
    if page is not None and page < 1:
        raise ValueError(f"page must be at least 1, got {page}")
    with _opened(source) as (name, file):
        return _read(name, file, None if page is None else int(page))


def read_size(source: ImageSource, *, page: int | None = None) -> tuple[int, int] | None:
    """Return width and height from the header of a file, in pixels, before orientation; None without a valid header.

    Nothing is decoded, so a file with a valid header may still be corrupt.

    Args:
        source: A path, the file's bytes, or a binary file object, which is read to its end.
        page: Page whose size is returned, as for `read_image`.
    """
    import pyvips

    try:
        with _opened(source) as (name, file), vips_operation():
            image_format = _identify(name, file)
            if image_format is BMP:
                return bmp_size(file)
            if image_format is TIFF:
                return tiff_size(file, page, _vips_source)
            image = _loader(image_format)(_vips_source(file))
            if page is not None and image.get_typeof("n-pages") and 1 < page <= image.get("n-pages"):
                image = _loader(image_format)(_vips_source(file), page=page - 1)
            return image.width, image.height
    except (ImageFileError, UnsupportedKind, DecodeFailure, pyvips.Error, UnicodeDecodeError):
        return None


def _loader(image_format: ImageFormat) -> Callable[..., pyvips.Image]:
    import pyvips

    name = f"{image_format.vips_name}load_source"
    if not pyvips.type_find("VipsOperation", name):
        raise _no_decoder(image_format)
    loader: Callable[..., pyvips.Image] = getattr(pyvips.Image, name)
    return loader


@contextlib.contextmanager
def _opened(source: ImageSource) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the name of the source for error messages, and an open, seekable file at its beginning."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield "<bytes>", io.BytesIO(source)
        return
    if not isinstance(source, (str, os.PathLike)):
        yield _stream_name(source), io.BytesIO(_drained(source))
        return
    path = os.fspath(source)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe could block forever
            raise UnreadableImage(path, "is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
        # Unbuffered, because libvips reads through the same descriptor and needs it at the position set by seek().
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
    try:
        content = read() if callable(read) else None
    except OSError as error:
        raise UnreadableImage(_stream_name(stream), (error.strerror or str(error)).lower()) from error
    if not isinstance(content, bytes):
        raise TypeError(
            f"source must be a path, bytes or a binary file object, got {type(stream).__name__}"
            + (f", which reads {type(content).__name__}" if callable(read) else "")
        )
    return content


def _read(path: str, file: BinaryIO, page: int | None) -> ImageFile:
    require_memory(VIPS_BYTES, "while it is read")  # otherwise loading a library could fail as if it did not exist
    import pyvips

    image_format = _identify(path, file)
    try:
        kind, directory = TiffKind(), None
        if image_format is TIFF:
            image, kind, directory, notes = decode_tiff(file, page, _vips_source)
        elif image_format is BMP:
            image, notes = decode_bmp(file, page), ()
        else:
            image, notes = _decode(file, image_format, page)
        with vips_operation():
            image = with_orientation(image, file, image_format, page=directory).autorot()
            if image.interpretation == "cmyk":
                image, more = _cmyk_to_srgb(image)
                notes += more
            elif kind.to_srgb:
                image = _with_srgb_profile(image)
            metadata = read_metadata(image, file, image_format, page=directory)
            # Copied, so that the array is writable and does not depend on libvips' buffer.
            pixels = np.array(image.numpy()).reshape(image.height, image.width, image.bands)
            known = image_format in (AVIF, HEIC) and "bits-per-sample" in image.get_fields()
            bits = image.get("bits-per-sample") if known else 16
        _scale_to_16_bits(pixels, bits)
        kind.to_rgb(pixels)
    except UnsupportedKind as refusal:
        raise UnsupportedImage(path, str(refusal)) from refusal
    except DecodeFailure as failure:
        raise UnreadableImage(path, _reason(str(failure), image_format)) from failure
    except (pyvips.Error, UnicodeDecodeError) as error:  # UnicodeDecodeError: a message quotes bytes of the file
        raise UnreadableImage(path, _reason(summarized_message(str(error)), image_format)) from error
    except MemoryError as error:
        raise UnreadableImage(path, _NO_MEMORY) from error
    return ImageFile(pixels, metadata, image_format, notes)


def _decode(file: BinaryIO, image_format: ImageFormat, page: int | None) -> tuple[pyvips.Image, tuple[str, ...]]:
    """Return the decoded image in memory, and notes for the user."""
    open_image = _loader(image_format)
    several = 1

    def load(fail_on: str) -> pyvips.Image:
        nonlocal several
        image = open_image(_vips_source(file), fail_on=fail_on)
        several = _check_pages(image, image_format, page)
        if page is not None:
            image = open_image(_vips_source(file), fail_on=fail_on, page=page - 1) if several > 1 else image
        _check_kind(image, image_format)
        return image

    if image_format is JPEG:
        return decode_jpeg(file, load), ()
    if image_format is PNG:
        _check_first_frame(_frames_of_png(file), page)
        page = None
    elif image_format in (AVIF, HEIC) and (frames := heif_frames(file)) > 1:
        _check_first_frame(frames, page)
        page = None
    try:
        image = decode(load)
    except DecodeFailure as failure:
        if image_format in (AVIF, HEIC) and _NO_DECODER.search(str(failure)):
            raise _no_decoder(image_format) from None
        raise
    if several > 1 and page is None:
        return image, (f"the main image of {several}; --page picks another",)
    return image, ()


def _no_decoder(image_format: ImageFormat) -> UnsupportedKind:
    return UnsupportedKind(
        f"is {image_format.title}, which this build of libvips cannot read; convert it to PNG or JPEG first"
    )


def _reason(detail: str, image_format: ImageFormat) -> str:
    # Not every decoder reports this.
    if reports_out_of_memory(detail) or not can_allocate(2**26):
        return _NO_MEMORY
    return f"truncated or corrupt {image_format.title} ({detail or 'its header cannot be read'})"


def _vips_source(file: BinaryIO | bytes) -> pyvips.Source:
    import pyvips

    if isinstance(file, bytes):
        return pyvips.Source.new_from_memory(file)
    if isinstance(file, io.BytesIO):
        return pyvips.Source.new_from_memory(file.getvalue())
    file.seek(0)
    return pyvips.Source.new_from_descriptor(file.fileno())


def _check_pages(image: pyvips.Image, image_format: ImageFormat, page: int | None) -> int:
    """Check that the file has the page, or is no animation if no page is given; return the number of its images."""
    # Not get_fields(), which fails if the keyword of a PNG text is not UTF-8.
    pages: int = image.get("n-pages") if image.get_typeof("n-pages") else 1
    if pages > 1 and page is None and image_format not in (AVIF, HEIC):  # these mark one image as the main one
        raise UnsupportedKind(f"holds {pages} frames (animated); savl reads single images, and --page picks one")
    check_page(page, pages)
    return pages


def _identify(path: str, file: BinaryIO) -> ImageFormat:
    head = file.read(HEAD_BYTES)
    if not head:
        raise UnreadableImage(path, "the file is empty")
    image_format = format_of_content(head)
    if image_format is None:
        raise UnreadableImage(path, f"not an image savl can read ({READABLE})")
    file.seek(0)
    return image_format


def _frames_of_png(file: BinaryIO) -> int:
    file.seek(8)
    while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
        if header[4:] == b"acTL":
            return int.from_bytes(file.read(4), "big")
        file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    return 1


def _check_first_frame(frames: int, page: int | None) -> None:
    """Raise an error unless the first frame is requested: libvips would read that one without a warning."""
    check_page(page, frames)
    if frames > 1 and page != 1:
        raise UnsupportedKind(f"holds {frames} frames (animated); savl reads single images, and here --page 1 only")


def _check_kind(image: pyvips.Image, image_format: ImageFormat) -> None:
    if image.format not in _SAMPLE_NAMES:
        raise UnsupportedKind(f"has {image.format} samples; savl reads 8-bit and 16-bit unsigned ones")
    # JPEG has no alpha, and the meaning of two components is not defined.
    if image.bands > 4 or (image_format is JPEG and image.bands == 2):
        raise UnsupportedKind(f"has {image.bands} bands; savl reads gray and RGB, with or without alpha")


def _scale_to_16_bits(pixels: Pixels, bits: int) -> None:
    """Scale 16-bit samples in place so that white is 65535: libvips fills only their upper bits."""
    if pixels.dtype == np.uint16 and bits < 16:
        codes = np.arange(2**16) >> (16 - bits)
        table = np.rint(codes * (65535 / (2**bits - 1))).astype(np.uint16)
        np.take(table, pixels, out=pixels)


def _cmyk_to_srgb(image: pyvips.Image) -> tuple[pyvips.Image, tuple[str, ...]]:
    """Convert CMYK to sRGB with its profile, or with a generic one if there is none that works; also return notes."""
    import pyvips

    depth = 16 if image.format == "ushort" else 8
    inks = image.extract_band(0, n=4).copy(interpretation="cmyk")
    notes: tuple[str, ...] = ("it has no CMYK profile; a generic one was used",)
    rgb = None
    if inks.get_typeof("icc-profile-data"):
        profile = bytes(inks.get("icc-profile-data"))
        notes = ("its CMYK profile is damaged; a generic one was used",)
        # Check signature and colour space in the header, because libvips falls back to a generic profile silently.
        if profile[36:40] == b"acsp" and profile[16:20] == b"CMYK":
            with contextlib.suppress(pyvips.Error):
                rgb = inks.icc_transform("srgb", embedded=True, depth=depth).copy_memory()
                notes = ()
        inks.remove("icc-profile-data")
    if rgb is None:
        rgb = inks.icc_transform("srgb", input_profile="cmyk", depth=depth)
    # Alpha is handled separately, because libvips would treat it as 8 bits beside 16-bit inks.
    return rgb.bandjoin(image.extract_band(4)) if image.bands > 4 else rgb, notes


def _with_srgb_profile(image: pyvips.Image) -> pyvips.Image:
    import pyvips

    image = image.copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", bytes(pyvips.Operation.call("profile_load", "srgb")))
    return image
