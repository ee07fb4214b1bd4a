"""Copy the metadata of an image from one file to another.

Samples are processed as they are encoded, and the metadata that define their colours are copied, so colours stay the
same. Other metadata are copied if they are still valid, updated (orientation, sizes, positions in pixels), or left out
(thumbnails). A message lists the metadata that the output format cannot store.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from savl.images import exif as exif_blocks
from savl.images.captions import put_captions
from savl.images.exif import ExifBlock, build_exif, rational, read_orientation, resized_exif, upright_exif
from savl.images.format import BMP, GIF, JPEG, PNG, TIFF, WEBP, ImageFormat, Pixels
from savl.images.geotiff import is_georeferenced
from savl.images.icc_profile import colour_space, fits, profile_of, profile_of_cicp
from savl.images.jpeg_metadata import encode_jpeg, read_jpeg
from savl.images.metadata_record import COLOUR_PROFILE, Metadata, PngColour, Stored, TiffEntries, without_repetitions
from savl.images.png_metadata import encode_png, read_png
from savl.images.read_only_metadata import read_bmp_profile, read_gif, read_heif
from savl.images.result_mark import add_mark
from savl.images.tiff_colour import fitting_entries, has_transfer_function, profile_of_entries
from savl.images.tiff_directory import SHORT, Entry
from savl.images.tiff_metadata import read_tiff, read_tiff_orientation, tiff_losses
from savl.images.webp_metadata import encode_webp, read_webp
from savl.images.xmp import clean_xmp, resize_xmp

if TYPE_CHECKING:
    import pyvips

__all__ = ["Metadata", "Stored", "losses", "fitted_metadata", "stored_as", "read_metadata", "with_orientation"]

_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


def with_orientation(
    image: pyvips.Image, file: BinaryIO, image_format: ImageFormat, *, page: int | None = None
) -> pyvips.Image:
    """Set the orientation of a decoded image from its file, also where libvips does not look for it.

    libvips ignores EXIF that comes after the samples of a PNG file or in one of its texts.

    Args:
        image: The image as decoded by libvips, not yet rotated.
        file: The file, seekable.
        image_format: Format of the file.
        page: Page number in a TIFF file, counted from 1; None selects the first page.

    Returns:
        The image with its orientation.
    """
    import pyvips

    orientation = _orientation(_read(file, image_format, page, image), file, image_format, page)
    if orientation == 1 or image.get_typeof("orientation"):
        return image
    image = image.copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    return image


def read_metadata(
    image: pyvips.Image, file: BinaryIO, image_format: ImageFormat, *, page: int | None = None
) -> Metadata:
    """Read the metadata that are copied to the output.

    Args:
        image: The decoded image, upright (orientation already applied).
        file: The file, seekable. Its position afterwards is undefined.
        image_format: Format of the file.
        page: Page number in a TIFF file, counted from 1; None selects the first page.
    """
    found = _read(file, image_format, page, image)
    orientation = _orientation(found, file, image_format, page)
    upright = (image.width, image.height)
    lost = list(found.lost)
    exif, xmp, tiff = found.exif, found.xmp, found.tiff
    if exif is not None:
        try:
            exif = upright_exif(exif, orientation, upright[::-1] if orientation >= 5 else upright)
        except ValueError:
            exif = None
            lost.append("EXIF, which is damaged")
    if xmp is not None:
        xmp, left = clean_xmp(xmp, turned=orientation != 1)
        lost += left
    if tiff is not None and orientation != 1:
        tiff = None
        lost.append("the georeference, as the image was turned")
    resolution, unit = found.resolution, found.resolution_unit
    if resolution is not None and orientation >= 5:
        resolution = resolution[::-1]
    if resolution is None and exif is not None:
        resolution, unit = _exif_resolution(exif)
    icc = _blob(image, "icc-profile-data") or found.icc
    if icc is not None:  # found by the decoder, or in a text
        lost = [what for what in lost if what != COLOUR_PROFILE]
    return replace(
        found,
        icc=icc,
        exif=exif,
        xmp=xmp,
        tiff=tiff,
        resolution=resolution,
        resolution_unit=unit,
        size=upright,
        lost=tuple(without_repetitions(lost)),
    )


def stored_as(pixels: Pixels, image_format: ImageFormat) -> Stored:
    """Return how a file of this format stores the pixels, (H, W, bands) uint8 or uint16."""
    height, width, bands = pixels.shape
    if bands < 3 and not image_format.holds_gray:
        bands += 2
    return Stored(width, height, bands, 16 if pixels.dtype == np.uint16 else 8)


def fitted_metadata(
    metadata: Metadata,
    stored: Stored,
    image_format: ImageFormat,
    *,
    mark: str | None = None,
    origin: str | None = None,
) -> tuple[Metadata, list[str]]:
    """Convert metadata to the form in which a format stores them.

    Sizes and positions are updated for the stored image. For formats other than PNG, PNG's colour chunks become a
    profile, and texts become EXIF and XMP fields of the same meaning.

    Args:
        metadata: Metadata as returned by `read_metadata`.
        stored: The image to be stored.
        image_format: Format of the file.
        mark: One of `savl.images.result_mark.MARKS`, or None.
        origin: Digest of the source to store with the mark, or None.

    Returns:
        The converted metadata, and the names of what the format cannot store.
    """
    lost = list(metadata.lost)
    settled = _with_profile(_resized(metadata, stored), stored, image_format, lost)
    settled = put_captions(settled, image_format, lost)
    if image_format is not TIFF and settled.resolution_unit == "none":
        square = settled.resolution is not None and settled.resolution[0] == settled.resolution[1]
        settled = replace(settled, resolution=None if square else settled.resolution)
    if image_format is not PNG:
        for name, _ in settled.png_chunks:
            lost.append("the background colour" if name == b"bKGD" else f"the PNG chunk {name.decode('latin-1')}")
        settled = replace(settled, png_chunks=())
    if image_format is not TIFF and settled.tiff is not None:
        lost.append("the georeference (GeoTIFF)" if is_georeferenced(settled.tiff) else "GDAL's metadata")
        settled = replace(settled, tiff=None)
    if image_format is WEBP and settled.resolution is not None and settled.resolution_unit == "none":
        lost.append("the proportions of pixels that are not square")
    elif image_format is WEBP:
        settled = _with_exif_resolution(settled)
    if mark is not None:
        settled = replace(settled, xmp=add_mark(settled.xmp, mark, origin))
    return settled, lost


def losses(
    metadata: Metadata,
    before: Pixels,
    after: Pixels,
    image_format: ImageFormat,
    *,
    transparency: str = "flattened onto white",
) -> list[str]:
    """Return notes on what is lost when an image is written: one lower-case sentence for each kind of loss.

    Args:
        metadata: Metadata of the image as it was read.
        before: Pixels as they were read.
        after: Pixels as they will be written.
        image_format: Format to write.
        transparency: How transparency was removed, as a participle, if the image had it and its result has none.
    """
    title = image_format.title
    sentences = []
    if before.shape[2] in (2, 4) and after.shape[2] not in (2, 4):
        sentences.append(
            f"the transparency was {transparency}"
            if image_format.holds_alpha
            else f"{title} holds no transparency: {transparency}"
        )
    if before.dtype == np.uint16 and after.dtype == np.uint8:
        sentences.append(
            "rounded from 16 bits per sample to 8"
            if image_format.holds_16_bit
            else f"{title} holds 8 bits per sample: rounded from 16"
        )
    stored = stored_as(after, image_format)
    settled, lost = fitted_metadata(metadata, stored, image_format)
    if metadata.icc is not None and not fits(metadata.icc, stored):
        kind = "gray" if stored.is_gray else "RGB"
        sentences.append(
            f"the colour profile was left out: it is for {colour_space(metadata.icc)}, "
            f"and {title} stores this as {kind}"
        )
    lost += _encoding_losses(settled, stored, image_format)
    if lost:
        sentences.append(f"left out: {_enumerated(list(dict.fromkeys(lost)))}")
    return sentences


def _read(file: BinaryIO, image_format: ImageFormat, page: int | None, image: pyvips.Image) -> Metadata:
    if image_format is PNG:
        return read_png(file)
    if image_format is JPEG:
        return read_jpeg(file)
    if image_format is WEBP:
        return read_webp(file)
    if image_format is TIFF:
        return read_tiff(file, page or 1)
    # libvips reports one sample per millimetre if the resolution is unknown.
    known = (image.xres, image.yres) != (1.0, 1.0)
    found = Metadata(
        exif=_blob(image, "exif-data"),
        xmp=_blob(image, "xmp-data"),
        resolution=(image.xres, image.yres) if known else None,
    )
    if image_format is GIF:
        more = read_gif(file)
        return replace(found, icc=more.icc, xmp=more.xmp, comments=more.comments)
    if image_format is BMP:
        return replace(found, icc=read_bmp_profile(file))
    more = read_heif(file)
    # In PNG files, code points have precedence over an ICC profile; here the profile is more exact.
    colour = PngColour() if image.get_typeof("icc-profile-data") else more.colour
    return replace(found, colour=colour, lost=more.lost)


def _blob(image: pyvips.Image, field: str) -> bytes | None:
    """Return a field that libvips has read, or None. `get_fields` fails if a keyword of a PNG text is not UTF-8."""
    return bytes(image.get(field)) or None if image.get_typeof(field) else None


def _orientation(found: Metadata, file: BinaryIO, image_format: ImageFormat, page: int | None) -> int:
    if image_format is TIFF:
        return read_tiff_orientation(file, page or 1)
    # The decoders of other formats have already applied the orientation.
    if image_format not in (PNG, JPEG, WEBP) or found.exif is None:
        return 1
    return read_orientation(found.exif)


def _resized(metadata: Metadata, stored: Stored) -> Metadata:
    size, scale = (stored.width, stored.height), metadata.scale(stored)
    exif = None if metadata.exif is None else _resized_block(metadata.exif, size, scale)
    xmp = None if metadata.xmp is None else resize_xmp(metadata.xmp, size, scale)
    return replace(metadata, exif=exif, xmp=xmp)


def _resized_block(exif: bytes, size: tuple[int, int], scale: tuple[float, float]) -> bytes | None:
    try:
        return resized_exif(exif, size, scale)
    except ValueError:
        return None


def _with_profile(metadata: Metadata, stored: Stored, image_format: ImageFormat, lost: list[str]) -> Metadata:
    """Return the metadata with a profile for the stored channels, built from PNG's chunks if necessary."""
    icc = metadata.icc if metadata.icc is not None and fits(metadata.icc, stored) else None
    if icc is None and metadata.tiff_colour is not None:
        return _with_tiff_colour(metadata, metadata.tiff_colour, stored, image_format, lost)
    if image_format is PNG:
        return replace(metadata, icc=icc)
    colour = metadata.colour
    made = profile_of_cicp(colour, gray=stored.is_gray)
    if colour.cicp is not None and made is None:
        lost.append(f"the colour code points {colour.cicp[0]}/{colour.cicp[1]} (cICP)")
    elif colour.cicp is not None and colour.cicp[1] in _HDR_TRANSFERS:
        transfer = _HDR_TRANSFERS[colour.cicp[1]]
        lost.append(f"light above {transfer}'s white for viewers that do not read the profile's cicp tag")
    if colour.significant_bits is not None:
        lost.append("the number of significant bits (sBIT)")
    if colour.mastering:
        lost.append("the mastering display and light levels (mDCV, cLLI)")
    if made is None and icc is None:
        made = profile_of(replace(colour, cicp=None), gray=stored.is_gray)
    kept = (
        None
        if metadata.tiff_colour is None or image_format is not TIFF
        else fitting_entries(metadata.tiff_colour, stored)
    )
    return replace(metadata, icc=made or icc, colour=PngColour(), tiff_colour=kept)


def _with_tiff_colour(
    metadata: Metadata, colour: TiffEntries, stored: Stored, image_format: ImageFormat, lost: list[str]
) -> Metadata:
    """Return the metadata with TIFF's colour entries if they still fit, else with an equivalent profile."""
    kept = fitting_entries(colour, stored) if image_format is TIFF else None
    if kept is not None and has_transfer_function(kept) == has_transfer_function(colour):
        return replace(metadata, icc=None, tiff_colour=kept)
    icc, names = profile_of_entries(colour, gray=stored.is_gray)
    lost += names
    return replace(metadata, icc=icc, tiff_colour=kept)


def _with_exif_resolution(metadata: Metadata) -> Metadata:
    """Return the metadata with the resolution in EXIF, for a format without another field for it."""
    if metadata.resolution is None:
        return metadata
    if metadata.exif is not None and _exif_resolution(metadata.exif)[0] is not None:
        return metadata
    number, factor = (3, 10.0) if metadata.resolution_unit == "cm" else (2, 25.4)
    order = "<" if metadata.exif is None else ExifBlock(metadata.exif).order
    entries = [
        rational(tag, round(value * factor, 2), order)
        for tag, value in zip((exif_blocks.X_RESOLUTION, exif_blocks.Y_RESOLUTION), metadata.resolution, strict=True)
    ]
    unit = number.to_bytes(2, "little" if order == "<" else "big")
    entries.append(Entry(exif_blocks.RESOLUTION_UNIT, SHORT, unit))
    if metadata.exif is None:
        return replace(metadata, exif=build_exif({exif_blocks.IMAGE: entries}, order))
    block = ExifBlock(metadata.exif)
    for entry in entries:
        block.put(exif_blocks.IMAGE, entry)
    return replace(metadata, exif=block.to_bytes())


def _exif_resolution(exif: bytes) -> tuple[tuple[float, float] | None, str]:
    """Return the resolution in an EXIF block, in samples per millimetre, and the unit in which it is stored."""
    try:
        block = ExifBlock(exif)
    except ValueError:
        return None, "in"
    held = [block.get(exif_blocks.IMAGE, tag) for tag in (exif_blocks.X_RESOLUTION, exif_blocks.Y_RESOLUTION)]
    values = [entry.numbers(block.order)[:1] for entry in held if entry is not None]
    if len(values) != 2 or not all(value and 0 < value[0] < 1e9 for value in values):
        return None, "in"
    unit = block.get(exif_blocks.IMAGE, exif_blocks.RESOLUTION_UNIT)
    number = (2,) if unit is None else unit.numbers(block.order)[:1]
    if number not in ((2,), (3,)):
        return None, "in"
    per_mm = 25.4 if number == (2,) else 10.0
    return (values[0][0] / per_mm, values[1][0] / per_mm), "in" if number == (2,) else "cm"


def _encoding_losses(settled: Metadata, stored: Stored, image_format: ImageFormat) -> list[str]:
    if image_format is PNG:
        return encode_png(settled, stored)[1]
    if image_format is JPEG:
        return encode_jpeg(settled)[1]
    if image_format is WEBP:
        return encode_webp(settled)[2]
    return tiff_losses(settled)


def _enumerated(names: list[str]) -> str:
    """Join names for use in a sentence, without control characters that a file may put into them."""
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return "".join(character if character.isprintable() else "?" for character in text)
