"""Entries of a TIFF file, other than an ICC profile, that define the colours of its samples (TIFF 6.0, section 20)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from savl.images.icc_profile import primaries_are_sound, profile_of_tables
from savl.images.metadata_record import Stored, TiffEntries
from savl.images.tiff_directory import SHORT, Entry

_TRANSFER_FUNCTION, _WHITE, _PRIMARIES, _TRANSFER_RANGE = 301, 318, 319, 342
COLOUR_TAGS = frozenset({_TRANSFER_FUNCTION, _WHITE, _PRIMARIES, _TRANSFER_RANGE})
_NAMES = {
    _TRANSFER_FUNCTION: "the transfer function",
    _WHITE: "the white point",
    _PRIMARIES: "the primary chromaticities",
    _TRANSFER_RANGE: "the transfer range",
}
_WHITE_IS_ZERO, _CONVERTED = (
    0,
    (5, 8, 9),
)  # photometric interpretations; CMYK and both kinds of Lab are converted to sRGB
_D65 = (0.3127, 0.3290)
_SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)


def read_tiff_colour(entries: dict[int, Entry], order: str, photometric: int) -> tuple[TiffEntries | None, list[str]]:
    """Return the entries that apply to the samples as savl reads them, and the names of those that do not.

    Args:
        entries: Entries of a directory, by tag.
        order: Byte order of their data.
        photometric: Photometric interpretation of the directory.
    """
    held = [entries[tag] for tag in sorted(COLOUR_TAGS & entries.keys())]
    if photometric in _CONVERTED:
        return None, [_NAMES[entry.tag] for entry in held]
    if photometric == _WHITE_IS_ZERO:  # the samples are inverted when they are read
        held = [_turned_round(entry) if entry.tag == _TRANSFER_FUNCTION else entry for entry in held]
    return (TiffEntries(order, tuple(held)) if held else None), []


def fitting_entries(colour: TiffEntries, stored: Stored) -> TiffEntries | None:
    """Return the entries that fit the stored image: a transfer function is defined for one bit depth only."""
    tables = _tables(colour)
    fits = tables is not None and len(tables[0]) == 2**stored.bits and not (stored.is_gray and len(tables) == 3)
    kept = [entry for entry in colour.entries if fits or entry.tag in (_WHITE, _PRIMARIES)]
    return TiffEntries(colour.order, tuple(kept)) if kept else None


def has_transfer_function(colour: TiffEntries | None) -> bool:
    """Return whether there is a TransferFunction entry."""
    return colour is not None and any(entry.tag == _TRANSFER_FUNCTION for entry in colour.entries)


def profile_of_entries(colour: TiffEntries, *, gray: bool) -> tuple[bytes | None, list[str]]:
    """Build an equivalent ICC profile, and return it with the names of the entries that it cannot express.

    Without a transfer function, sRGB's curve is assumed, as viewers do; without a white point or primaries, sRGB's.

    Args:
        colour: The entries.
        gray: Whether the image has one colour channel.
    """
    tags = [entry.tag for entry in colour.entries]
    tables = _tables(colour)
    white, primaries = _numbers(colour, _WHITE, 2), _numbers(colour, _PRIMARIES, 6)
    expressed = {_TRANSFER_FUNCTION} if tables is not None else set()
    chromaticities = tuple(_rounded((*(white or _D65), *(primaries or _SRGB_PRIMARIES))))
    if primaries_are_sound(chromaticities):
        expressed |= {tag for tag, values in ((_WHITE, white), (_PRIMARIES, primaries)) if values is not None}
    else:
        chromaticities = tuple(_rounded((*_D65, *_SRGB_PRIMARIES)))
    if tables is not None and _numbers(colour, _TRANSFER_RANGE, 6) == (0, len(tables[0]) - 1) * 3:  # the default
        expressed.add(_TRANSFER_RANGE)
    if gray and tables is not None:
        expressed |= {_WHITE, _PRIMARIES}  # they do not concern gray
    if not expressed or (gray and tables is None):
        return None, [_NAMES[tag] for tag in tags]
    return profile_of_tables(chromaticities, tables, gray=gray), [_NAMES[tag] for tag in tags if tag not in expressed]


def _tables(colour: TiffEntries) -> list[NDArray[np.float64]] | None:
    """Return tables of linear light, 0 to 1, by sample value: one or three; None if missing or malformed."""
    entry = next((entry for entry in colour.entries if entry.tag == _TRANSFER_FUNCTION), None)
    if entry is None or entry.type != SHORT:
        return None
    values = np.frombuffer(entry.data, f"{colour.order}u2")
    parts = 3 if values.size % 3 == 0 else 1
    length = values.size // parts
    if length < 2 or length & (length - 1):
        return None
    return [table.astype(np.float64) / 65535 for table in np.split(values, parts)]


def _turned_round(entry: Entry) -> Entry:
    if entry.type != SHORT:
        return entry
    return Entry(entry.tag, SHORT, np.frombuffer(entry.data, "u2")[::-1].tobytes())


def _numbers(colour: TiffEntries, tag: int, count: int) -> tuple[float, ...] | None:
    entry = next((entry for entry in colour.entries if entry.tag == tag), None)
    values = () if entry is None else entry.numbers(colour.order)
    return (
        values
        if len(values) == count and all(math.isfinite(value) and abs(value) < 2**16 for value in values)
        else None
    )


def _rounded(values: tuple[float, ...]) -> list[int]:
    return [round(value * 100000) for value in values]
