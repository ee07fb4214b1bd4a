"""Determine what the samples of a TIFF page mean: which bands are colour and alpha, and how to convert them to sRGB.

libvips returns the samples of some colour spaces as they are stored. Each kind of page is therefore converted here,
left to libvips if that converts it, or refused by name (TIFF 6.0, sections 3 to 6 and 16 to 23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from savl.images.colour_spaces import YCbCrCoding, cielab_to_srgb, icclab_to_srgb, ycbcr_to_rgb
from savl.images.tiff_pages import TiffPage
from savl.images.tiff_rebuild import SplitSamples
from savl.images.vips_decode import DecodeFailure, UnsupportedKind

_BITS, COMPRESSION, _PHOTOMETRIC, ORIENTATION, _SAMPLES = 258, 259, 262, 274, 277
_PREDICTOR, _COLOUR_MAP = 317, 320
_PLANAR, _INK_SET, _INKS, _DOT_RANGE, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 284, 332, 334, 336, 338, 339
_COEFFICIENTS, _SUBSAMPLING, _BLACK_WHITE, _MATTEING = 529, 530, 532, 32995

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, SEPARATED, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 3, 4, 5, 6, 8, 9
_REFUSED = {
    MASK: "is a transparency mask, not an image",
    10: "is in the ITULAB colour space",
    32803: "is a colour filter array of raw camera data",
    32844: "holds LogL samples of high dynamic range",
    32845: "holds LogLuv samples of high dynamic range",
    34892: "is LinearRaw camera data",
    51177: "is a depth map, not an image",
    52527: "is a semantic mask, not an image",
}
_COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, SEPARATED: 4, YCBCR: 3, CIELAB: 3, ICCLAB: 3}
_NAMES = {RGB: "RGB", PALETTE: "palette", SEPARATED: "CMYK", YCBCR: "YCbCr", CIELAB: "CIELab", ICCLAB: "ICCLab"}
_FEW_BITS = {WHITE_IS_ZERO: (1, 2, 4), BLACK_IS_ZERO: (1, 2, 4), PALETTE: (1, 2, 4)}
_OLD_JPEG, _JPEG = 6, 7
_WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)  # LZW, Deflate under its two numbers, LZMA, Zstandard
_ASSOCIATED, _UNASSOCIATED, _COREL = 1, 2, 999  # values of ExtraSamples; Corel Draw uses its own number for alpha
_ALPHA = (_ASSOCIATED, _UNASSOCIATED, _COREL)
_PIXELS_AT_ONCE = 2**20
_LIBTIFF_SUBSAMPLING = {(4, 4), (4, 2), (4, 1), (2, 2), (2, 1), (1, 2)}

if TYPE_CHECKING:
    import pyvips

Convert = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class TiffKind:
    """Instructions for reading a page.

    Attributes:
        extra: Number of bands that libvips returns after the colour bands.
        alpha: Index of alpha among these extra bands, or None.
        convert: Function that converts colours to RGB, (rows, W, 3) uint8 or uint16; None if libvips has done it.
        to_srgb: Whether `convert` converts to sRGB, so that the file's profile does not apply any more.
        fields: Values that replace fields of the page before libvips reads it.
        without: Fields to remove before libvips reads the page.
        is_jpeg: Whether the samples are JPEG streams.
        by_libtiff: Whether libtiff converts the samples to RGBA.
        notes: Notes for the user about data that are left out or assumed.
        split_samples: How to read a page whose sample layout libvips cannot read, or None.
    """

    extra: int = 0
    alpha: int | None = None
    convert: Convert | None = None
    to_srgb: bool = False
    fields: Mapping[int, int] = field(default_factory=dict)
    without: tuple[int, ...] = ()
    is_jpeg: bool = False
    by_libtiff: bool = False
    notes: tuple[str, ...] = ()
    split_samples: SplitSamples | None = None

    def select(self, image: pyvips.Image) -> pyvips.Image:
        """Return libvips' image without the bands that are neither colour nor alpha."""
        if self.extra == (0 if self.alpha is None else 1):
            return image
        colours = image.bands - self.extra
        kept = image.extract_band(0, n=colours)
        if self.alpha is not None:
            kept = kept.bandjoin(image.extract_band(colours + self.alpha))
        return kept.copy(interpretation=image.interpretation)

    def to_rgb(self, samples: NDArray[Any]) -> None:
        """Convert the samples (H, W, bands) of `select` in place to gray or RGB, with or without alpha."""
        if self.convert is None:
            return
        # In strips, because the conversion computes in floats, which take several times the memory of the samples.
        rows = max(1, _PIXELS_AT_ONCE // samples.shape[1])
        for top in range(0, samples.shape[0], rows):
            strip = samples[top : top + rows, :, :3]
            strip[...] = self.convert(strip)


def tiff_kind(page: TiffPage) -> TiffKind:
    """Determine how to read a page.

    Raises:
        UnsupportedKind: savl does not read this kind of page; the message names the kind.
        DecodeFailure: It is a palette image without a palette.
    """
    photometric = page.number(_PHOTOMETRIC, BLACK_IS_ZERO)
    if photometric in _REFUSED:
        raise UnsupportedKind(f"{_REFUSED[photometric]}; convert it to RGB first")
    if photometric not in _COLOURS:
        raise UnsupportedKind(f"has photometric interpretation {photometric}, which savl does not know")
    bits = _check_samples(page, photometric)
    colours, samples = _COLOURS[photometric], page.number(_SAMPLES, 1)
    if samples < colours:
        raise UnsupportedKind(f"is {_NAMES.get(photometric, 'gray')} with {samples} of {colours} samples per pixel")
    compression = page.number(COMPRESSION, 1)
    if compression in _WITH_PREDICTOR:
        _check_predictor(page, bits)
    if compression == _OLD_JPEG:
        return _rgba_of_libtiff
    extra = samples - colours
    alpha, notes = _alpha(page, colours, extra)
    premultiplied = alpha is not None and _ASSOCIATED in page.numbers(_EXTRA_SAMPLES)
    palette = _palette(page, bits) if photometric == PALETTE else None
    # libvips would divide by the last colour band if the file declares an alpha band that it does not have.
    unfounded = extra == 0 and any(page.number(tag, 0) for tag in (_EXTRA_SAMPLES, _MATTEING))
    without = (_EXTRA_SAMPLES, _MATTEING) if unfounded else ()
    kind = TiffKind(extra, alpha, is_jpeg=compression == _JPEG, notes=notes, without=without)
    planar = page.number(_PLANAR, 1) == 2
    if photometric == YCBCR and kind.is_jpeg and planar:
        raise UnsupportedKind("is YCbCr in JPEG streams, one a plane; convert it to RGB first")
    # libvips assembles planes only if they are stored in strips and have one of these interpretations.
    by_plane = planar and (page.is_tiled or kind.is_jpeg or photometric not in (RGB, SEPARATED, YCBCR, CIELAB, ICCLAB))
    if by_plane or (samples > 1 and bits < 8):
        split_samples = SplitSamples(
            by_plane,
            samples,
            inverted=photometric == WHITE_IS_ZERO,
            colours=palette,
            premultiplied=(colours if palette is None else 3) + (alpha or 0) if premultiplied else None,
            interpretation={WHITE_IS_ZERO: "b-w", BLACK_IS_ZERO: "b-w", SEPARATED: "cmyk"}.get(photometric, "srgb"),
        )
        kind = replace(kind, split_samples=split_samples)
    if photometric == SEPARATED:
        _check_inks(page, bits)
        if premultiplied and bits == 16:  # libvips would divide by an 8-bit alpha
            raise UnsupportedKind("is 16-bit CMYK with premultiplied alpha; convert it to RGB first")
    elif photometric == YCBCR and not kind.is_jpeg:
        return _ycbcr(page, bits, kind)
    elif photometric == YCBCR and extra:
        raise UnsupportedKind("is YCbCr in JPEG streams with extra bands; convert it to RGB first")
    elif photometric in (CIELAB, ICCLAB):
        if premultiplied:
            raise UnsupportedKind(f"is {_NAMES[photometric]} with premultiplied alpha; convert it to RGB first")
        convert = cielab_to_srgb if photometric == CIELAB else icclab_to_srgb
        return replace(kind, convert=convert, to_srgb=True, fields={_PHOTOMETRIC: RGB})
    return kind


def _check_samples(page: TiffPage, photometric: int) -> int:
    """Check the type of the samples and return the number of bits per sample."""
    every = {int(bits) for bits in page.numbers(_BITS)} or {1}
    if len(every) > 1:
        raise UnsupportedKind(f"has samples of {', '.join(map(str, sorted(every)))} bits in one pixel")
    (bits,) = every
    formats = {int(number) for number in page.numbers(_SAMPLE_FORMAT)} or {1}
    # CIELab's a* and b* are signed, and some programs declare that.
    if photometric in (CIELAB, ICCLAB):
        formats -= {2}
    for number, name in ((2, "signed integer"), (3, "float"), (5, "complex integer"), (6, "complex float")):
        if number in formats:
            raise UnsupportedKind(f"has {bits}-bit {name} samples; savl reads 8-bit and 16-bit unsigned ones")
    if bits not in (8, 16, *_FEW_BITS.get(photometric, ())) or (photometric == PALETTE and bits > 8):
        name = _NAMES.get(photometric, "gray")
        raise UnsupportedKind(f"has {bits}-bit {name} samples; savl reads 8-bit and 16-bit unsigned ones")
    return bits


def _check_predictor(page: TiffPage, bits: int) -> None:
    predictor = page.number(_PREDICTOR, 1)
    if predictor == 3:
        raise UnsupportedKind(f"has the predictor of floating-point samples on {bits}-bit integers")
    if predictor not in (1, 2):
        raise UnsupportedKind(f"has predictor {predictor}, which savl does not know")
    if predictor == 2 and bits < 8:
        raise UnsupportedKind(f"has a predictor on {bits}-bit samples, which this build of libvips cannot read")


def _palette(page: TiffPage, bits: int) -> NDArray[np.uint8]:
    """Return the palette (256, 3) for sample values scaled to 8 bits."""
    numbers = page.numbers(_COLOUR_MAP)
    if len(numbers) != 3 * 2**bits:
        raise DecodeFailure(
            f"its colour map has {len(numbers)} numbers and not {3 * 2**bits}"
            if numbers
            else "its colour map is missing"
        )
    shift = 8 if max(numbers) > 255 else 0  # some programs write 8-bit colours instead of 16-bit ones
    colours = np.zeros((256, 3), np.uint8)
    colours[:: 255 // (2**bits - 1)] = np.reshape(numbers, (3, -1)).T.astype(np.uint16) >> shift
    return colours


def _alpha(page: TiffPage, colours: int, extra: int) -> tuple[int | None, tuple[str, ...]]:
    """Return the index of alpha among the extra bands, or None, and notes for the user."""
    if extra == 0:
        return None, ()
    kinds = [int(kind) for kind in page.numbers(_EXTRA_SAMPLES)][:extra]
    if not kinds and extra == 1:
        # Old programs write alpha without declaring it, and other readers accept that.
        return 0, ("its last band is used as transparency, because the file does not declare its meaning",)
    alpha = next((index for index, kind in enumerate(kinds) if kind in _ALPHA), None)
    others = extra - (alpha is not None)
    # A gray image with many extra bands is multispectral; several alpha bands have no defined meaning.
    if (colours == 1 and others > 1) or sum(kind in _ALPHA for kind in kinds) > 1:
        raise UnsupportedKind(f"has {colours + extra} bands; savl reads gray and RGB, with or without alpha")
    if others == 0:
        return alpha, ()
    if others == 1:
        return alpha, ("1 extra band is left out, because it is not transparency",)
    return alpha, (f"{others} extra bands are left out, because they are not transparency",)


def _check_inks(page: TiffPage, bits: int) -> None:
    if page.number(_INK_SET, 1) != 1:
        raise UnsupportedKind(
            f"is separated into {page.number(_INKS, 4)} inks other than CMYK; convert it to RGB first"
        )
    dots = page.numbers(_DOT_RANGE)
    if dots and any(pair != (0, 2**bits - 1) for pair in zip(dots[::2], dots[1::2], strict=False)):
        raise UnsupportedKind(
            f"is CMYK with the dot range {', '.join(f'{dot:g}' for dot in dots)}; convert it to RGB first"
        )


def _ycbcr(page: TiffPage, bits: int, kind: TiffKind) -> TiffKind:
    numbers = page.numbers(_SUBSAMPLING) or (2, 2)
    subsampling = (int(numbers[0]), int(numbers[-1]))
    if subsampling == (1, 1):
        coding = YCbCrCoding.of_tiff(bits, page.numbers(_COEFFICIENTS), page.numbers(_BLACK_WHITE))
        # libvips accepts extra bands and planes for RGB only; it returns their samples unchanged.
        fields = {_PHOTOMETRIC: RGB} if kind.extra or page.number(_PLANAR, 1) == 2 else {}
        return replace(kind, convert=partial(ycbcr_to_rgb, coding=coding), fields=fields)
    if page.is_tiled and page.number(COMPRESSION, 1) == 1:
        raise UnsupportedKind("is YCbCr with subsampled chroma in uncompressed tiles; convert it to RGB first")
    planar = page.number(_PLANAR, 1) == 2
    if bits != 8 or planar or kind.extra or subsampling not in _LIBTIFF_SUBSAMPLING:
        layout = f"{bits}-bit YCbCr" + (" in planes" if planar else "") + (" with extra bands" if kind.extra else "")
        raise UnsupportedKind(
            f"is {layout} and chroma subsampled {subsampling[0]}x{subsampling[1]}; convert it to RGB first"
        )
    return _rgba_of_libtiff


# libtiff converts these to RGBA with a meaningless alpha. It also applies an orientation itself.
_rgba_of_libtiff = TiffKind(extra=1, fields={ORIENTATION: 1}, by_libtiff=True)
