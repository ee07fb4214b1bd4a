"""Reading and writing image files: the samples as encoded, and all that travels with them.

No colour is ever transformed, CMYK apart, which the networks do not know and which becomes sRGB. Bit depth is
the sample type of the file, never guessed from its values.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from savl.atomic_write import atomic_write, check_writable
from savl.inference.errors import (
    ImageFileError,
    ImageNotFound,
    OutputExists,
    UnreadableImage,
    UnsupportedImage,
    UnwritableImage,
)
from savl.inference.image_format import (
    JPEG,
    PNG,
    READABLE,
    TIFF,
    WEBP,
    ImageFormat,
    Pixels,
    format_of_content,
)
from savl.inference.image_metadata import Metadata, put_metadata, take_metadata
from savl.inference.tiff_exif import append_tiff_exif, read_tiff_exif

if TYPE_CHECKING:
    import pyvips

_INTERPRETATIONS = {
    "uchar": {1: "b-w", 2: "b-w", 3: "srgb", 4: "srgb"},
    "ushort": {1: "grey16", 2: "grey16", 3: "rgb16", 4: "rgb16"},
}
_SAMPLE_NAMES = {"uchar": np.uint8, "ushort": np.uint16}
# Data that fits a classic TIFF's 32-bit offsets whatever the compression makes of it.
_CLASSIC_TIFF_BYTES = 2**31


@dataclass(frozen=True)
class ImageFile:
    """A decoded image file.

    Attributes:
        pixels: (H, W, bands) uint8 or uint16, upright; bands 1 gray, 2 gray+alpha, 3 RGB, 4 RGBA.
        metadata: what is to travel to the output.
        format: the format of the file, by its content.
    """

    pixels: Pixels
    metadata: Metadata
    format: ImageFormat


def read_image(path: str | os.PathLike[str]) -> ImageFile:
    """Reads a PNG, JPEG, WebP or TIFF file, whatever its name ends in.

    Gray, gray+alpha, RGB, RGBA, palette and 1-bit files of 8 or 16 bits per sample; palettes become RGB (RGBA
    with transparency), 1 to 4 bits become 8, CMYK becomes sRGB. EXIF orientation is applied.

    Raises:
        ImageNotFound: no such file.
        UnreadableImage: empty, truncated, corrupt, not permitted, no image, or no regular file.
        UnsupportedImage: animated or many-paged, samples that are not 8 or 16 bit, or exotic colour spaces.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # to open a pipe could wait forever
            raise UnreadableImage(path, "is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
        # Unbuffered: libvips reads through the same descriptor, and must find it where seek() left it.
        with open(path, "rb", buffering=0) as file:
            return _read(path, file)
    except ImageFileError:
        raise
    except FileNotFoundError as error:
        raise ImageNotFound(path, "no such file") from error
    except OSError as error:
        raise UnreadableImage(path, (error.strerror or str(error)).lower()) from error


def write_image(
    path: str | os.PathLike[str],
    pixels: Pixels,
    metadata: Metadata | None = None,
    *,
    image_format: ImageFormat,
    quality: int = 95,
    overwrite: bool = False,
) -> None:
    """Writes an image file atomically: it appears whole, or the old one stays.

    Args:
        path: where to; its name does not decide the format.
        pixels: (H, W, bands) uint8 or uint16 of what the format can hold (`ImageFormat.holds_alpha`,
            `ImageFormat.sample_dtype`); one-band pictures are stored as RGB by WebP.
        metadata: what travels with it; orientation is written as upright.
        image_format: the format to write.
        quality: 1 to 100, for JPEG and WebP; WebP at 100 is lossless.
        overwrite: replace an existing file.

    A TIFF of 2 GiB or more before compression is written as BigTIFF and goes without EXIF.

    Raises:
        OutputExists: `path` is there and `overwrite` is False.
        UnwritableImage: the picture does not fit the format, or the disk refuses.
        ValueError: `pixels` are of a shape or dtype that the format cannot hold.
    """
    check_size(path, pixels.shape[1], pixels.shape[0], image_format)
    image = put_metadata(_wrap(pixels, image_format), metadata or Metadata())
    try:
        with naming_output(path), atomic_write(Path(path), overwrite=overwrite) as file:
            _encode(image, file, image_format, quality)
            if image_format is TIFF and metadata is not None and metadata.exif is not None:
                append_tiff_exif(file, metadata.exif, width=image.width, height=image.height)
    except _vips_error() as error:
        raise UnwritableImage(path, f"cannot be written: {_tidy(str(error)) or 'unknown reason'}") from error


def prepare_output(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Makes the folder of an output, and tries whether `write_image` could begin a file there.

    Raises:
        OutputExists: `path` is there and `overwrite` is False.
        UnwritableImage: the folder cannot be made or written, or `path` is no regular file.
    """
    try:
        os.makedirs(Path(path).parent, exist_ok=True)
    except OSError as error:
        raise UnwritableImage(path, f"its folder cannot be made: {error.strerror}") from error
    with naming_output(path):
        check_writable(Path(path), overwrite=overwrite)


def check_size(path: str | os.PathLike[str], width: int, height: int, image_format: ImageFormat) -> None:
    """Raises UnwritableImage when a picture of that many pixels does not fit the format."""
    if max(width, height) > image_format.max_side:
        raise UnwritableImage(
            path,
            f"{image_format.title} holds at most {image_format.max_side} pixels a side, "
            f"and the picture would be {width}x{height}; write PNG or TIFF instead",
        )


@contextlib.contextmanager
def naming_output(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what goes wrong in writing a file into OutputExists and UnwritableImage, which name it."""
    try:
        yield
    except FileExistsError as error:
        raise OutputExists(path, "exists already") from error
    except OSError as error:
        raise UnwritableImage(path, f"cannot be written: {error.strerror or error}") from error


def _read(path: str | os.PathLike[str], file: BinaryIO) -> ImageFile:
    import pyvips

    image_format = _identify(path, file)
    try:
        _take_vips_messages()
        source = pyvips.Source.new_from_descriptor(file.fileno())
        load = getattr(pyvips.Image, f"{image_format.vips_name}load_source")
        image = load(source, fail_on="error")
        _check_kind(path, image)
        image = image.copy_memory()
        _check_decoder_messages(path, image_format)
        image = _upright_rgb(image)
        metadata = take_metadata(image)
        # Copied, so that the array outlives libvips' buffer and can be written to.
        pixels = np.array(image.numpy()).reshape(image.height, image.width, image.bands)
    except pyvips.Error as error:
        detail = _tidy(str(error)) or "its header cannot be read"
        reason = f"truncated or corrupt {image_format.title} ({detail})"
        raise UnreadableImage(path, reason) from error
    if image_format is TIFF:
        metadata = replace(metadata, exif=read_tiff_exif(file))
    return ImageFile(pixels, metadata, image_format)


def _identify(path: str | os.PathLike[str], file: BinaryIO) -> ImageFormat:
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


def _check_kind(path: str | os.PathLike[str], image: pyvips.Image) -> None:
    fields = image.get_fields()
    pages = image.get("n-pages") if "n-pages" in fields else 1
    if pages > 1:
        what = "frames (animated)" if "delay" in fields else "pages"
        raise UnsupportedImage(path, f"holds {pages} {what}; savl reads single pictures")
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


def _wrap(pixels: Pixels, image_format: ImageFormat) -> pyvips.Image:
    """A libvips image over the array's own memory: no copy of what may be hundreds of megabytes."""
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


def _encode(image: pyvips.Image, file: BinaryIO, image_format: ImageFormat, quality: int) -> None:
    options: dict[str, Any] = {}
    if image_format is JPEG:
        options = {"Q": quality}
    elif image_format is WEBP:
        options = {"lossless": True} if quality >= 100 else {"Q": quality}
    elif image_format is TIFF:
        size = image.width * image.height * image.bands * (2 if image.format == "ushort" else 1)
        options = {
            "compression": "deflate",
            "predictor": "horizontal",
            "bigtiff": size >= _CLASSIC_TIFF_BYTES,
        }
    import pyvips

    target = pyvips.Target.new_to_descriptor(file.fileno())
    save = getattr(image, f"{image_format.vips_name}save_target")
    _run_killably(image, lambda: save(target, **options))


def _run_killably(image: pyvips.Image, work: Callable[[], object]) -> None:
    """Runs a long libvips call so that Ctrl-C stops it at once, not when the file is finished.

    Python sees a signal only between its own instructions, so the call goes to a thread and this one waits.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="savl-encode")
    thread.start()
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


def _take_vips_messages() -> str:
    """Returns and clears what libvips has noted since the last look; warnings stay there unseen otherwise."""
    import pyvips

    text: str = pyvips.ffi.string(pyvips.vips_lib.vips_error_buffer()).decode(errors="replace")
    pyvips.vips_lib.vips_error_clear()
    return text


def _check_decoder_messages(path: str | os.PathLike[str], image_format: ImageFormat) -> None:
    """Refuses JPEG files whose decoder met broken data and went on with made-up blocks.

    libjpeg calls that a warning, and so does it call the stray bytes that many cameras leave before a marker,
    which harm nothing: only the former are refused.
    """
    for message in _take_vips_messages().splitlines():
        if image_format is JPEG and "Corrupt JPEG data" in message and "extraneous bytes" not in message:
            raise UnreadableImage(path, f"truncated or corrupt JPEG ({_tidy(message)})")


def _tidy(message: str) -> str:
    """libvips' several lines of 'unable to call …' and 'domain: text', down to the most telling text, or ""."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("unable to call") and not line.endswith(": load error")]
    most = min(telling, key=lambda line: line.startswith("unable to"), default="")
    return re.sub(r"^\w+: ", "", most)
