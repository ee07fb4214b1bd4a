"""The record in which readers of image formats hand metadata to writers, and the names of what cannot be kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from savl.images.tiff_directory import Entry


@dataclass(frozen=True)
class Stored:
    """How a picture will be stored.

    Attributes:
        width: pixels.
        height: pixels.
        bands: 1 gray, 2 gray+alpha, 3 RGB, 4 RGBA, as the file stores it.
        bits: per sample, 8 or 16.
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
        keyword: such as "Copyright", "parameters" or "workflow".
        text: the text.
        name: the chunk it stood in: b"tEXt", b"zTXt" or b"iTXt".
        data: the chunk's content, to be carried over as it is.
    """

    keyword: str
    text: str
    name: bytes
    data: bytes


@dataclass(frozen=True)
class PngColour:
    """What the chunks of a PNG file say of the meaning of its samples, other than an ICC profile.

    Attributes:
        cicp: primaries, transfer function, matrix and range as ITU-T H.273 numbers them (cICP).
        intent: rendering intent of sRGB samples (sRGB), 0 to 3.
        gamma: 100000 times the exponent that encoded the samples (gAMA).
        chromaticities: 100000 times x and y of white, red, green and blue (cHRM).
        significant_bits: of each channel of the original (sBIT).
        mastering: chunks mDCV and cLLI, which describe the display and the light levels of HDR pictures.
    """

    cicp: bytes | None = None
    intent: int | None = None
    gamma: int | None = None
    chromaticities: tuple[int, ...] | None = None
    significant_bits: bytes | None = None
    mastering: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class TiffEntries:
    """Entries of a TIFF file that only TIFF can hold: georeference, names, white point, primaries and curves.

    Attributes:
        order: byte order of their data, "<" or ">".
        entries: one a tag.
    """

    order: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Metadata:
    """Everything that travels from a file to the one made from it, for an upright picture.

    Attributes:
        icc: ICC profile.
        exif: EXIF block with its six-byte `Exif` signature; its orientation says nothing, its thumbnail is gone.
        xmp: XMP packet; the extended part that JPEG files may have is in it.
        iptc: IPTC-IIM block.
        photoshop: Photoshop's image resources other than IPTC, without thumbnails.
        resolution: horizontal and vertical samples per millimetre, None where the file tells none. With the unit
            "none" only their ratio means something.
        resolution_unit: "in", "cm" or "none": what the resolution is stored in.
        comments: of JPEG and GIF files.
        text: of PNG files.
        colour: of PNG files.
        png_chunks: names and contents of other chunks that stay true.
        tiff: entries that only TIFF holds.
        tiff_colour: entries of a TIFF file that say what the samples mean; an ICC profile ranks before them.
        size: width and height of the picture it was read with, upright; None where nothing depends on it.
        lost: what reading left behind, because no output can hold it truly; each a noun phrase.
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
        """Return new pixels per old pixel, horizontally and vertically; 1 where the old size is not known."""
        return (1.0, 1.0) if self.size is None else (stored.width / self.size[0], stored.height / self.size[1])

    def cropped(self, width: int, height: int) -> Metadata:
        """Return the metadata of a picture that was cut at the right and at the bottom, sides in pixels."""
        return replace(self, size=(width, height))


GAIN_MAP = "the HDR gain map"
DEPTH_MAP = "the depth map"
FILM = "the film of a motion photo"
MULTI_PICTURE = "the further pictures in the file (MPF)"
COLOUR_PROFILE = "the colour profile, which is damaged"
_BEHIND = "behind the first"


def pictures_behind(count: int) -> str:
    """Return the name of further pictures, one or more, of which nothing else is known."""
    return f"a further picture {_BEHIND}" if count == 1 else f"{count} further pictures {_BEHIND}"


def bytes_behind(count: int) -> str:
    """Return the name of data behind the end of a picture."""
    return "1 byte behind the picture" if count == 1 else f"{count} bytes behind the picture"


def without_repetitions(lost: list[str]) -> list[str]:
    """Return the names, each once, less general ones of what another names more exactly.

    Gain maps and depth maps are further pictures in the file.
    """
    names = list(dict.fromkeys(lost))
    if GAIN_MAP in names or DEPTH_MAP in names:
        names = [name for name in names if name != MULTI_PICTURE and not name.endswith(_BEHIND)]
    if MULTI_PICTURE in names:
        names = [name for name in names if not name.endswith(_BEHIND)]
    return names
