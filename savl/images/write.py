"""Write image files whole or not at all, with their metadata."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from savl.atomic_write import atomic_write, check_writable, raise_if_full, write_whole
from savl.images.errors import OutputExists, UnwritableImage
from savl.images.format import JPEG, PNG, TIFF, WEBP, ImageFormat, Pixels
from savl.images.jpeg_metadata import encode_jpeg, splice_jpeg
from savl.images.metadata import Metadata, Stored, fitted_metadata, stored_as
from savl.images.png_metadata import encode_png, splice_png
from savl.images.tiff_metadata import write_tiff
from savl.images.vips_decode import VIPS_BYTES, summarized_message, vips_operation
from savl.images.webp_metadata import encode_webp, splice_webp
from savl.out_of_memory import is_out_of_memory, require_memory

if TYPE_CHECKING:
    import pyvips


_INTERPRETATIONS = {
    "uchar": {1: "b-w", 2: "b-w", 3: "srgb", 4: "srgb"},
    "ushort": {1: "grey16", 2: "grey16", 3: "rgb16", 4: "rgb16"},
}
_Splice = Callable[[bytes], bytes | None]
"""A function from the beginning of an encoded file to its new beginning; it returns None if it needs more bytes."""
# Samples of this many bytes fit the 32-bit offsets of a classic TIFF file, however they are compressed.
_CLASSIC_TIFF_BYTES = 2**31


@dataclass(frozen=True)
class ProcessedFile:
    """Record of one image file that was upscaled or degraded.

    Attributes:
        old_size: Width and height of the input, in pixels.
        new_size: Width and height of the output, in pixels.
        notes: Sentences in lower case that name what the output could not keep, and other surprises.
        run_notes: Sentences about how images are computed. A command prints each of them once, not for every image.
    """

    old_size: tuple[int, int]
    new_size: tuple[int, int]
    notes: tuple[str, ...]
    run_notes: tuple[str, ...] = ()


def write_image(
    path: str | os.PathLike[str],
    pixels: Pixels,
    metadata: Metadata | None = None,
    *,
    image_format: ImageFormat,
    quality: int = 95,
    overwrite: bool = False,
    mark: str | None = None,
    origin: str | None = None,
) -> None:
    """Write an image file atomically: either the complete new file appears, or nothing changes.

    A TIFF of 2 GiB or more before compression is written as BigTIFF.

    Args:
        path: File to write. Its suffix does not determine the format.
        pixels: (H, W, bands) uint8 or uint16 that the format can store (`ImageFormat.holds_alpha`,
            `ImageFormat.sample_dtype`). WebP stores gray images as RGB.
        metadata: Metadata to store as far as the format supports it; `savl.images.metadata.losses` names the rest.
        image_format: Format to write.
        quality: 1 to 100, for JPEG and WebP; WebP at 100 is lossless.
        overwrite: Replace an existing file.
        mark: One of `savl.images.result_mark.MARKS` to store in a result of savl, or None.
        origin: Digest of the source to store with the mark, or None; see `savl.images.result_mark`.

    Raises:
        OutputExists: `path` exists and `overwrite` is False.
        UnwritableImage: The image does not fit the format, or the file cannot be written.
        MemoryError: The encoder cannot allocate memory.
        ValueError: The format cannot store the shape or dtype of `pixels`.
    """
    check_size(path, pixels.shape[1], pixels.shape[0], image_format)
    stored = stored_as(pixels, image_format)
    carried, _ = fitted_metadata(metadata or Metadata(), stored, image_format, mark=mark, origin=origin)
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    buffers = 4 if image_format is WEBP else 1  # each of the size of the image
    require_memory(VIPS_BYTES + buffers * pixels.nbytes, f"while {size} pixels become a {image_format.title}")
    try:
        with vips_operation(), output_errors(path), atomic_write(Path(path), overwrite=overwrite) as file:
            image = _wrap(pixels, image_format)
            try:
                _encode(image, file, image_format, quality, *_splicing(carried, stored, image_format))
            except _vips_error():
                raise_if_full(file)  # libvips does not report the reason
                raise
            if image_format is TIFF:
                write_tiff(file, carried, stored)
    except _vips_error() as error:
        if is_out_of_memory(error):
            raise MemoryError(f"out of memory while {size} pixels become a {image_format.title}; free some") from error
        raise UnwritableImage(
            path, f"cannot be written: {summarized_message(str(error)) or 'unknown reason'}"
        ) from error


def prepare_output(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Create the folder of an output, and check that `write_image` can create a file there.

    Raises:
        OutputExists: `path` exists and `overwrite` is False.
        UnwritableImage: The folder cannot be created or is not writable, or `path` is not a regular file.
    """
    try:
        os.makedirs(Path(path).parent, exist_ok=True)
    except OSError as error:
        raise UnwritableImage(path, f"its folder cannot be made: {error.strerror}") from error
    with output_errors(path):
        check_writable(Path(path), overwrite=overwrite)


def check_quality(quality: object) -> None:
    """Check the quality of a JPEG or WebP file.

    Raises:
        ValueError: It is not an int from 1 to 100.
    """
    if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
        raise ValueError(f"quality must be an int from 1 to 100, got {quality!r}")


def check_size(path: str | os.PathLike[str], width: int, height: int, image_format: ImageFormat) -> None:
    """Raise UnwritableImage if an image of this size does not fit the format."""
    if max(width, height) > image_format.max_side:
        raise UnwritableImage(
            path,
            f"{image_format.title} holds at most {image_format.max_side} pixels a side, "
            f"and the image would be {width}x{height}; write PNG or TIFF instead",
        )


@contextlib.contextmanager
def output_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors of writing a file to OutputExists and UnwritableImage, which name the file."""
    try:
        yield
    except FileExistsError as error:
        raise OutputExists(path, "exists already") from error
    except OSError as error:
        raise UnwritableImage(path, f"cannot be written: {error.strerror or error}") from error


def _wrap(pixels: Pixels, image_format: ImageFormat) -> pyvips.Image:
    """Return a libvips image that shares the memory of the array, which may be hundreds of megabytes."""
    import pyvips

    height, width, bands = pixels.shape
    sample = {np.dtype(np.uint8): "uchar", np.dtype(np.uint16): "ushort"}.get(pixels.dtype)
    if sample is None or bands not in (1, 2, 3, 4):
        raise ValueError(f"pixels: {pixels.dtype} of {bands} bands; uint8 or uint16 of 1 to 4 bands are accepted")
    if sample == "ushort" and not image_format.holds_16_bit:
        raise ValueError(f"pixels: {image_format.title} holds no 16-bit samples")
    if bands in (2, 4) and not image_format.holds_alpha:
        raise ValueError(f"pixels: {image_format.title} holds no alpha")
    contiguous = np.ascontiguousarray(pixels)
    image = pyvips.Image.new_from_memory(contiguous.data, width, height, bands, sample)
    return image.copy(interpretation=_INTERPRETATIONS[sample][bands])


def _splicing(metadata: Metadata, stored: Stored, image_format: ImageFormat) -> tuple[_Splice | None, bytes]:
    """Return a function that inserts metadata into the beginning of an encoded file, and the bytes to append.

    For TIFF there are none, because metadata are added to the finished file.
    """
    if image_format is PNG:
        chunks, _ = encode_png(metadata, stored)
        return lambda head: splice_png(head, chunks), b""
    if image_format is JPEG:
        segments, _ = encode_jpeg(metadata)
        return lambda head: splice_jpeg(head, segments), b""
    if image_format is WEBP:
        before, after, _ = encode_webp(metadata)
        return lambda head: splice_webp(head, before, after, stored), after
    return None, b""


def _encode(
    image: pyvips.Image,
    file: BinaryIO,
    image_format: ImageFormat,
    quality: int,
    splice: _Splice | None = None,
    tail: bytes = b"",
) -> None:
    """Encode the samples without metadata: libvips supports only some of it, and would add resolution and EXIF."""
    import pyvips

    options: dict[str, Any] = {"keep": "none"}
    if image_format is JPEG:
        options["Q"] = quality
    elif image_format is WEBP:
        options.update({"lossless": True} if quality >= 100 else {"Q": quality})
    elif image_format is TIFF:
        size = image.width * image.height * image.bands * (2 if image.format == "ushort" else 1)
        options.update(compression="deflate", predictor="horizontal", bigtiff=size >= _CLASSIC_TIFF_BYTES)
        # libtiff seeks in the file while it writes.
        target = pyvips.Target.new_to_descriptor(file.fileno())
        _run_killably(image, lambda: image.tiffsave_target(target, **options))
        return
    stream = _SplicedStream(file, splice or (lambda head: head))
    target = pyvips.TargetCustom()
    target.on_write(stream.write)
    save = getattr(image, f"{image_format.vips_name}save_target")
    try:
        _run_killably(image, lambda: save(target, **options))
    except _vips_error() as error:
        raise stream.failure or error from None
    stream.finish(tail)


class _SplicedStream:
    """Output of an encoder whose beginning is replaced on the way to the file; the rest is not kept in memory."""

    def __init__(self, file: BinaryIO, splice: _Splice) -> None:
        self.failure: OSError | MemoryError | None = None
        self._file = file
        self._splice = splice
        self._head: bytes | None = b""

    def write(self, data: bytes) -> int:
        """Write bytes from the encoder; return their number, or -1 if the file cannot be written."""
        try:
            if self._head is None:
                write_whole(self._file, memoryview(data))
                return len(data)
            self._head += bytes(data)
            begun = self._splice(self._head)
            if begun is not None:
                self._head = None
                write_whole(self._file, begun)
        except (OSError, MemoryError) as error:  # must not propagate into C code
            self.failure = error
            return -1
        return len(data)

    def finish(self, tail: bytes) -> None:
        """Append `tail` after the encoder's last byte."""
        write_whole(self._file, (self._head or b"") + tail)


def _run_killably(image: pyvips.Image, work: Callable[[], object]) -> None:
    """Run a long libvips call so that Ctrl-C stops it at once instead of after the whole file.

    Python handles signals only between its own instructions, so the call runs in a thread for which this one waits.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="savl-encode")
    try:
        thread.start()
    except RuntimeError:  # no memory for the thread's stack, or a limit on threads
        work()
        return
    try:
        thread.join()
    except BaseException:
        image.set_kill(True)
        thread.join()
        raise
    if failures:
        raise failures[0]


def _vips_error() -> type[Exception]:
    import pyvips

    error: type[Exception] = pyvips.Error
    return error
