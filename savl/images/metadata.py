"""What a picture carries besides its samples, taken from one file and put into another.

The samples are processed as encoded and what says how to understand them travels along, so colours mean the same
before and after. So does all else that stays true; what does not is corrected (orientation, sizes, positions in
pixels) or left out (thumbnails), and what a format cannot hold is named.
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

__all__ = ["Metadata", "Stored", "losses", "settle", "stored_as", "take_metadata", "with_orientation"]

_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


def with_orientation(
    image: pyvips.Image, file: BinaryIO, image_format: ImageFormat, *, page: int | None = None
) -> pyvips.Image:
    """Return the decoded picture with the orientation that its file tells, also where libvips does not look.

    That is EXIF behind the samples of a PNG file or in one of its texts.

    Args:
        image: the picture as libvips decoded it, not yet turned.
        file: the file it was decoded from, seekable.
        image_format: the format of the file.
        page: of a TIFF file, counted from 1; None is the first.
    """
    import pyvips

    orientation = _orientation(_read(file, image_format, page, image), file, image_format, page)
    if orientation == 1 or image.get_typeof("orientation"):
        return image
    image = image.copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    return image


def take_metadata(
    image: pyvips.Image, file: BinaryIO, image_format: ImageFormat, *, page: int | None = None
) -> Metadata:
    """Return what is to travel to the output.

    Args:
        image: the decoded picture, upright (orientation already applied).
        file: the file it was decoded from, seekable; its position afterwards is anywhere.
        image_format: the format of the file.
        page: of a TIFF file, counted from 1; None is the first.
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
        lost.append("the georeference, as the picture was turned")
    resolution, unit = found.resolution, found.resolution_unit
    if resolution is not None and orientation >= 5:
        resolution = resolution[::-1]
    if resolution is None and exif is not None:
        resolution, unit = _exif_resolution(exif)
    icc = _blob(image, "icc-profile-data") or found.icc
    if icc is not None:  # the decoder, or a text, had one all the same
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
    """Return how a file of a format stores the pixels, (H, W, bands) uint8 or uint16."""
    height, width, bands = pixels.shape
    if bands < 3 and not image_format.holds_gray:
        bands += 2
    return Stored(width, height, bands, 16 if pixels.dtype == np.uint16 else 8)


def settle(
    metadata: Metadata,
    stored: Stored,
    image_format: ImageFormat,
    *,
    mark: str | None = None,
    origin: str | None = None,
) -> tuple[Metadata, list[str]]:
    """Return the metadata as a file of a format holds them for a picture, and the names of what it cannot hold.

    Sizes and positions are those of the picture as it is stored. Colour chunks of PNG become a profile for other
    formats, texts become EXIF and XMP where these have a place for them.

    Args:
        metadata: as `take_metadata` returned it.
        stored: the picture.
        image_format: the format.
        mark: what the picture is, of `savl.images.result_mark.MARKS`, or None.
        origin: with a mark, the digest of the picture that it was made of, or None.
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
    """Return what a picture loses on its way into a file: one sentence a kind of thing, lower case.

    Args:
        metadata: of the picture as it was read.
        before: the picture as it was read.
        after: the picture as it is to be written.
        image_format: the format to write.
        transparency: what became of it, where the picture had it and the result has not.
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
    settled, lost = settle(metadata, stored, image_format)
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
    # One sample per millimetre is libvips' way of saying that nothing is known.
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
    # An ICC profile, which ranks behind the code points in PNG files, is the more exact one here.
    colour = PngColour() if image.get_typeof("icc-profile-data") else more.colour
    return replace(found, colour=colour, lost=more.lost)


def _blob(image: pyvips.Image, field: str) -> bytes | None:
    """What libvips read of a file, or None; `get_fields` would fail over the keyword of a PNG text that is no UTF-8."""
    return bytes(image.get(field)) or None if image.get_typeof(field) else None


def _orientation(found: Metadata, file: BinaryIO, image_format: ImageFormat, page: int | None) -> int:
    if image_format is TIFF:
        return read_tiff_orientation(file, page or 1)
    # Others' decoders have turned the picture themselves, whatever a block says.
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
    """The metadata with a profile that suits the stored channels, made of PNG's chunks where there is need."""
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
    """The metadata with what a TIFF file says of colours, as its entries where they still fit, else as a profile."""
    kept = fitting_entries(colour, stored) if image_format is TIFF else None
    if kept is not None and has_transfer_function(kept) == has_transfer_function(colour):
        return replace(metadata, icc=None, tiff_colour=kept)
    icc, names = profile_of_entries(colour, gray=stored.is_gray)
    lost += names
    return replace(metadata, icc=icc, tiff_colour=kept)


def _with_exif_resolution(metadata: Metadata) -> Metadata:
    """The metadata with the resolution in EXIF, for a format that has no other place for it."""
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
    """Samples per millimetre by an EXIF block, and the unit they are stored in."""
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
    """The names as part of a sentence, without the control characters that a file may put into them."""
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return "".join(character if character.isprintable() else "?" for character in text)
