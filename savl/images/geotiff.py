"""Update the georeference of a TIFF file for a new image size (OGC GeoTIFF 1.1, and tags of GDAL)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from savl.images.metadata_record import TiffEntries
from savl.images.tiff_directory import DOUBLE, Entry

_PIXEL_SCALE, _TIEPOINTS, _TRANSFORMATION, _KEYS = 33550, 33922, 34264, 34735
_DOUBLES, _TEXTS, _GDAL_METADATA, _GDAL_NODATA = 34736, 34737, 42112, 42113
GEO_TAGS = frozenset({_PIXEL_SCALE, _TIEPOINTS, _TRANSFORMATION, _KEYS, _DOUBLES, _TEXTS, _GDAL_METADATA, _GDAL_NODATA})
_RASTER_TYPE_KEY, _PIXEL_IS_POINT = 1025, 2


def scaled_georeference(tiff: TiffEntries, scale: tuple[float, float]) -> Iterator[Entry]:
    """Yield the entries for the image at another size, in their byte order.

    The image as a whole covers the same ground as before, so each pixel covers less. If pixels represent areas, (0, 0)
    is the corner of the first pixel, which does not move. If pixels represent points, (0, 0) is the centre of the first
    pixel, which moves.

    Args:
        tiff: The entries of the image at its old size.
        scale: New pixels per old pixel, horizontally and vertically.
    """
    order = tiff.order
    # Offset that converts a raster coordinate of the old image to one counted from the corner.
    shift = 0.5 if _pixels_are_points(tiff) else 0.0
    for entry in tiff.entries:
        values = entry.numbers(order)
        if entry.tag == _PIXEL_SCALE and entry.type == DOUBLE and len(values) >= 2:
            yield _doubles(entry.tag, [values[0] / scale[0], values[1] / scale[1], *values[2:]], order)
        elif entry.tag == _TIEPOINTS and entry.type == DOUBLE:
            moved = list(values)
            for at in range(0, len(moved) - 5, 6):
                for axis in (0, 1):
                    moved[at + axis] = (moved[at + axis] + shift) * scale[axis] - shift
            yield _doubles(entry.tag, moved, order)
        elif entry.tag == _TRANSFORMATION and entry.type == DOUBLE and len(values) == 16:
            yield _doubles(entry.tag, _scaled_matrix(list(values), scale, shift), order)
        else:
            yield entry


def is_georeferenced(tiff: TiffEntries) -> bool:
    """Return whether the entries contain a georeference, not only GDAL's metadata."""
    return any(entry.tag not in (_GDAL_METADATA, _GDAL_NODATA) for entry in tiff.entries)


def _scaled_matrix(matrix: list[float], scale: tuple[float, float], shift: float) -> list[float]:
    """Return the row-major matrix from raster to ground coordinates for old = (new + shift) / scale - shift."""
    for row in range(3):
        first = 4 * row
        x, y = matrix[first], matrix[first + 1]
        matrix[first], matrix[first + 1] = x / scale[0], y / scale[1]
        matrix[first + 3] += (x / scale[0] - x + y / scale[1] - y) * shift
    return matrix


def _pixels_are_points(tiff: TiffEntries) -> bool:
    """Return whether pixels represent points, by the raster type in the GeoKeys (four numbers each, after a header)."""
    for entry in tiff.entries:
        keys = entry.numbers(tiff.order) if entry.tag == _KEYS else ()
        for at in range(4, len(keys) - 3, 4):
            if keys[at] == _RASTER_TYPE_KEY and keys[at + 1] == 0:
                return bool(keys[at + 3] == _PIXEL_IS_POINT)
    return False


def _doubles(tag: int, values: list[float], order: str) -> Entry:
    return Entry(tag, DOUBLE, struct.pack(f"{order}{len(values)}d", *values))
