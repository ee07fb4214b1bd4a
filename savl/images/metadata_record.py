"""The record in which readers of image formats hand metadata to writers, and the names of what cannot be kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from savl.images.tiff_directory import Entry


@dataclass(frozen=True)
class Stored:
    """Size and sample format of an image in the file to be written.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        bands: Number of bands in the file: 1 for gray, 2 for gray and alpha, 3 for RGB, 4 for RGBA.
        bits: Bits per sample, 8 or 16.
    """

    width: int
    height: int
    bands: int
    bits: int

    @property
    def is_gray(self) -> bool:
        """Whether there is one colour channel."""
        return self.bands < 3


@dataclass(frozen=True)
class PngText:
    """A text of a PNG file.

    Attributes:
        keyword: Keyword, such as "Copyright", "parameters" or "workflow".
        text: The text.
        name: Name of the chunk: b"tEXt", b"zTXt" or b"iTXt".
        data: Content of the chunk, to be copied unchanged.
    """

    keyword: str
    text: str
    name: bytes
    data: bytes


@dataclass(frozen=True)
class PngColour:
    """Chunks of a PNG file, other than an ICC profile, that define the meaning of its samples.

    Attributes:
        cicp: Primaries, transfer function, matrix and range, numbered as in ITU-T H.273 (cICP).
        intent: Rendering intent of sRGB samples, 0 to 3 (sRGB).
        gamma: 100000 times the exponent with which the samples are encoded (gAMA).
        chromaticities: 100000 times x and y of white, red, green and blue (cHRM).
        significant_bits: Number of significant bits in each channel of the original (sBIT).
        mastering: Chunks mDCV and cLLI, which describe the display and the light levels of HDR images.
    """

    cicp: bytes | None = None
    intent: int | None = None
    gamma: int | None = None
    chromaticities: tuple[int, ...] | None = None
    significant_bits: bytes | None = None
    mastering: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class TiffEntries:
    """Entries of a TIFF file that only TIFF can store: georeference, names, white point, primaries and curves.

    Attributes:
        order: Byte order of their data, "<" or ">".
        entries: The entries, one per tag.
    """

    order: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Metadata:
    """Metadata that are copied from a file to a result made from it. They describe the upright image.

    Attributes:
        icc: ICC profile.
        exif: EXIF block with its six-byte `Exif` signature, without thumbnail; its orientation is to be ignored.
        xmp: XMP packet, including the extended part that JPEG files may have.
        iptc: IPTC-IIM block.
        photoshop: Photoshop's image resources other than IPTC, without thumbnails.
        resolution: Horizontal and vertical samples per millimetre, None if the file contains none. With the unit
            "none", only their ratio is defined.
        resolution_unit: Unit in which the resolution is stored: "in", "cm" or "none".
        comments: Comments of JPEG and GIF files.
        text: Texts of PNG files.
        colour: Colour chunks of PNG files.
        png_chunks: Names and contents of other PNG chunks that are still valid for the result.
        tiff: Entries that only TIFF can store.
        tiff_colour: Entries of a TIFF file that define its colours; an ICC profile has precedence over them.
        size: Width and height of the image that was read, upright; None if nothing depends on it.
        lost: Noun phrases for metadata that were dropped while reading, because no output could store them correctly.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    photoshop: bytes | None = None
    resolution: tuple[float, float] | None = None
    resolution_unit: str = "in"
    comments: tuple[str, ...] = ()
    text: tuple[PngText, ...] = ()
    colour: PngColour = field(default_factory=PngColour)
    png_chunks: tuple[tuple[bytes, bytes], ...] = ()
    tiff: TiffEntries | None = None
    tiff_colour: TiffEntries | None = None
    size: tuple[int, int] | None = None
    lost: tuple[str, ...] = ()

    def scale(self, stored: Stored) -> tuple[float, float]:
        """Return new pixels per old pixel, horizontally and vertically; 1 if the old size is not known."""
        return (1.0, 1.0) if self.size is None else (stored.width / self.size[0], stored.height / self.size[1])

    def cropped(self, width: int, height: int) -> Metadata:
        """Return the metadata for the image cropped at the right and bottom to `width` x `height` pixels."""
        return replace(self, size=(width, height))


GAIN_MAP = "the HDR gain map"
DEPTH_MAP = "the depth map"
FILM = "the film of a motion photo"
MULTI_PICTURE = "the further images in the file (MPF)"
COLOUR_PROFILE = "the colour profile, which is damaged"
_AFTER = "after the first"


def images_after(count: int) -> str:
    """Return the name of further images in a file, of which only the number (at least 1) is known."""
    return f"a further image {_AFTER}" if count == 1 else f"{count} further images {_AFTER}"


def bytes_after(count: int) -> str:
    """Return the name of data after the end of an image."""
    return "1 byte after the image" if count == 1 else f"{count} bytes after the image"


def without_repetitions(lost: list[str]) -> list[str]:
    """Return the names without repetitions, and without general names if a more exact name is present.

    For example, gain maps and depth maps are further images in a file.
    """
    names = list(dict.fromkeys(lost))
    if GAIN_MAP in names or DEPTH_MAP in names:
        names = [name for name in names if name != MULTI_PICTURE and not name.endswith(_AFTER)]
    if MULTI_PICTURE in names:
        names = [name for name in names if not name.endswith(_AFTER)]
    return names
