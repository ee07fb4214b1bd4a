"""What a picture carries besides its samples, taken from one file and put onto another.

The samples are processed as encoded and the ICC profile travels with them, so colours mean the same before
and after. EXIF and XMP travel too, less what upscaling makes untrue: the orientation (applied to the
samples), the pixel dimensions and the embedded thumbnail.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from savl.images.format import TIFF, ImageFormat
from savl.images.tiff_exif import read_tiff_exif

if TYPE_CHECKING:
    import pyvips

_DEFAULT_RESOLUTION = 72 / 25.4
_EXIF_PREFIX = b"Exif\0\0"
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|\s*>\s*))[2-8]""")


@dataclass(frozen=True)
class Metadata:
    """Colour profile, EXIF, XMP, IPTC and print resolution.

    Attributes:
        icc: ICC profile.
        exif: EXIF block with its six-byte `Exif` signature; its orientation says nothing.
        xmp: XMP packet.
        iptc: IPTC block.
        resolution: horizontal and vertical samples per millimetre.
        resolution_unit: "in" or "cm": what the resolution is stored in.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    resolution: tuple[float, float] = (_DEFAULT_RESOLUTION, _DEFAULT_RESOLUTION)
    resolution_unit: str = "in"


_BLOBS = {"icc": "icc-profile-data", "exif": "exif-data", "xmp": "xmp-data", "iptc": "iptc-data"}


def take_metadata(image: pyvips.Image, file: BinaryIO, image_format: ImageFormat) -> Metadata:
    """Return what is to travel to the output.

    Args:
        image: the decoded picture, upright (orientation already applied).
        file: the file it was decoded from, seekable; its position afterwards is anywhere.
        image_format: the format of the file.
    """
    fields = set(image.get_fields())
    blobs = {name: bytes(image.get(field)) for name, field in _BLOBS.items() if field in fields}
    if "exif" in blobs:
        blobs["exif"] = _without_thumbnail(blobs["exif"])
    if "xmp" in blobs:
        blobs["xmp"] = _XMP_ORIENTATION.sub(rb"\g<1>1", blobs["xmp"])
    if image_format is TIFF:
        exif = read_tiff_exif(file)
        blobs.pop("exif", None)
        if exif is not None:
            blobs["exif"] = exif
    unit = image.get("resolution-unit") if "resolution-unit" in fields else "in"
    return Metadata(**blobs, resolution=_resolution(image, fields), resolution_unit=unit)


def put_metadata(image: pyvips.Image, metadata: Metadata) -> pyvips.Image:
    """Returns `image` carrying `metadata`, with the orientation set to upright.

    On saving, libvips brings the EXIF block's own width, height, resolution and orientation into line.
    """
    import pyvips

    xres, yres = metadata.resolution
    image = image.copy(xres=xres, yres=yres)
    for name, field in _BLOBS.items():
        blob = getattr(metadata, name)
        if blob is not None:
            image.set_type(pyvips.GValue.blob_type, field, blob)
    image.set_type(pyvips.GValue.gstr_type, "resolution-unit", metadata.resolution_unit)
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    return image


def _resolution(image: pyvips.Image, fields: set[str]) -> tuple[float, float]:
    """Samples per millimetre; where the file format says nothing, what EXIF says, else 72 per inch."""
    if (image.xres, image.yres) != (1.0, 1.0):
        return image.xres, image.yres
    # One sample per millimetre is libvips' way of saying "unknown", as always for WebP.
    unit_mm = 10.0 if _exif_field(image, fields, "exif-ifd0-ResolutionUnit") == "3" else 25.4
    per_unit = [_exif_field(image, fields, f"exif-ifd0-{axis}Resolution") for axis in "XY"]
    try:
        xres, yres = (_rational(text) / unit_mm for text in per_unit)
    except (ValueError, ZeroDivisionError):
        return _DEFAULT_RESOLUTION, _DEFAULT_RESOLUTION
    return (xres, yres) if xres > 0 and yres > 0 else (_DEFAULT_RESOLUTION, _DEFAULT_RESOLUTION)


def _exif_field(image: pyvips.Image, fields: set[str], name: str) -> str:
    """The value of an EXIF field, without libvips' "(…, Rational, 1 component, 8 bytes)"; "" when absent."""
    return str(image.get(name)).split(" (")[0] if name in fields else ""


def _rational(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def _without_thumbnail(exif: bytes) -> bytes:
    """Cuts the link to the thumbnail's directory: it shows the old picture, perhaps lying on its side."""
    order = {b"II": "<", b"MM": ">"}.get(exif[6:8])
    if not exif.startswith(_EXIF_PREFIX) or order is None:
        return exif
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 6 + 4)
        (entries,) = struct.unpack_from(order + "H", exif, 6 + directory)
        link = 6 + directory + 2 + 12 * entries
        struct.unpack_from(order + "I", exif, link)
    except struct.error:
        return exif
    return exif[:link] + bytes(4) + exif[link + 4 :]
