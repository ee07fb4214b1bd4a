"""Decode one page of a TIFF file to gray or RGB."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from savl.images.tiff_kind import COMPRESSION, ORIENTATION, TiffKind, tiff_kind
from savl.images.tiff_pages import TiffPage, choose_page
from savl.images.tiff_rebuild import check_tiles, is_complete, rewrite_page
from savl.images.vips_decode import (
    DecodeFailure,
    Load,
    UnsupportedKind,
    decode,
    decode_alone,
    decode_shared,
    reports_out_of_memory,
    summarized_message,
)

if TYPE_CHECKING:
    import pyvips

_WIDTH, _HEIGHT = 256, 257  # tags
# libtiff's message for a compression that it knows but was built without.
_COMPRESSIONS = {
    6: "old-style JPEG",
    33003: "JPEG 2000",
    33004: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG of camera data",
    34925: "LZMA",
    34933: "PNG",
    34934: "JPEG XR",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_NOT_BUILT_IN = re.compile(
    r"(compression|decoding|scheme).*not (configured|implemented|supported)|no \w+ (support|codec)", re.IGNORECASE
)


def tiff_size(
    file: BinaryIO, page: int | None, open_source: Callable[[BinaryIO | bytes], pyvips.Source]
) -> tuple[int, int] | None:
    """Return width and height of the page that `decode_tiff` decodes, in pixels; None if they are missing.

    Arguments and errors are those of `decode_tiff`. Nothing is decoded.
    """
    import pyvips

    chosen, _, _ = choose_page(file, page)
    try:
        image = pyvips.Image.tiffload_source(open_source(file), page=chosen.index)
        return image.width, image.height
    except pyvips.Error:  # `decode_tiff` may still be able to rewrite the page
        width, height = chosen.number(_WIDTH, 0), chosen.number(_HEIGHT, 0)
        return (width, height) if width > 0 and height > 0 else None


def decode_tiff(
    file: BinaryIO, page: int | None, open_source: Callable[[BinaryIO | bytes], pyvips.Source]
) -> tuple[pyvips.Image, TiffKind, int, tuple[str, ...]]:
    """Decode a page of a TIFF file.

    Args:
        file: The TIFF file, seekable.
        page: Page number, counted from 1; None selects the first page.
        open_source: Creates a libvips source from a file or bytes.

    Returns:
        The image in memory; the kind of its samples, whose `TiffKind.to_rgb` converts them to RGB; the number of its
        directory, counted from 1; and notes for the user.

    Raises:
        DecodeFailure: The file is truncated or corrupt.
        UnsupportedKind: The file has no such page, or savl does not read pages of this kind.
    """
    import pyvips

    chosen, pages, masked = choose_page(file, page)
    kind = tiff_kind(chosen)
    content: bytes | None = None
    if kind.split_samples is not None:
        content = kind.split_samples.split(file, chosen)
    elif kind.fields or kind.without:
        content = rewrite_page(file, chosen, kind.fields, without=kind.without)
    elif chosen.is_tiled:
        check_tiles(file, chosen)

    def load(fail_on: str) -> pyvips.Image:
        if content is None:
            return kind.select(_open(open_source(file), fail_on, chosen.index))
        images = [
            _open(open_source(content), fail_on, index)
            for index in range(kind.split_samples.pages if kind.split_samples else 1)
        ]
        image = images[0].copy() if kind.split_samples is None else kind.split_samples.join(images)
        orientation = chosen.number(ORIENTATION, 1)
        image.set_type(pyvips.GValue.gint_type, "orientation", orientation if orientation in range(1, 9) else 1)
        return kind.select(image)

    try:
        image = _decode_page(load, kind, chosen)
    except DecodeFailure as failure:
        if _NOT_BUILT_IN.search(str(failure)):
            number = chosen.number(COMPRESSION, 1)
            name = _COMPRESSIONS.get(number, f"scheme {number}")
            raise UnsupportedKind(f"is compressed by {name}, which this build of libvips cannot read") from None
        if content is not None or reports_out_of_memory(str(failure)) or not is_complete(file, chosen):
            raise
        # libtiff also fails on fields that do not concern the samples, such as an invalid orientation.
        content = rewrite_page(file, chosen)
        try:
            image = _decode_page(load, kind, chosen)
        except DecodeFailure:
            raise failure from None
    notes = kind.notes
    if masked:
        notes = ("its transparency mask is left out", *notes)
    if page is None and pages > 1:
        notes = (f"page 1 of {pages}; --page picks another", *notes)
    return image, kind, chosen.index + 1, notes


def _open(source: pyvips.Source, fail_on: str, index: int) -> pyvips.Image:
    import pyvips

    image: pyvips.Image = pyvips.Image.tiffload_source(source, fail_on=fail_on, page=index)
    return image


def _decode_page(load: Load, kind: TiffKind, page: TiffPage) -> pyvips.Image:
    """Decode a page in memory."""
    if kind.is_jpeg:
        return _decode_jpeg_streams(load)
    if not page.is_tiled:
        return decode(load)
    # Unless warnings count as failures, libvips leaves tiles black that libtiff cannot decode; so does libtiff itself
    # when it converts to RGBA.
    if not kind.by_libtiff:
        attempt = decode_shared(load, fail_on="warning")
        if attempt.image is not None:
            return attempt.image
    attempt = decode_alone(load)
    errors = [line for line in attempt.messages.splitlines() if line.startswith("tiff2vips: ")]
    if attempt.image is None or errors:
        raise DecodeFailure(summarized_message(errors[0] if errors else attempt.messages))
    return attempt.image


def _decode_jpeg_streams(load: Load) -> pyvips.Image:
    """Decode a page of JPEG streams in memory, and refuse it if the image data is corrupt.

    For strips, libtiff decodes and logs warnings. For tiles, libvips decodes and adds warnings to its messages.
    """
    attempt = decode_alone(load)
    if attempt.image is None:
        raise DecodeFailure(summarized_message(attempt.messages))
    for line in (*attempt.messages.splitlines(), *attempt.logged):
        if "Corrupt JPEG data" in line and "extraneous bytes" not in line:
            raise DecodeFailure(summarized_message(line))
    return attempt.image
