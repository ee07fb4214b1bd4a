"""One high-resolution image file to a low-resolution one: what `savl degrade` does for each input."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.atomic_write import write_atomically
from savl.degradation.pipeline import Degradation
from savl.images.errors import UnsupportedImage
from savl.images.format import PNG, ImageFormat
from savl.images.metadata import losses
from savl.images.planes import fill_transparent, sample_peak
from savl.images.read import ImageFile, ImageSource, read_image
from savl.images.result_mark import DEGRADED, SEVERITY_MAP
from savl.images.severity_map import draw_severity
from savl.images.write import ProcessedFile, check_size, naming_output, prepare_output, write_image


def file_seed(seed: int, source: str | os.PathLike[str]) -> tuple[int, int]:
    """What a file's draws follow from: the seed, and the CRC-32 of the file's name without folder and suffix.

    So a file is degraded the same alone or among others, in whatever order and folder.
    """
    return seed, zlib.crc32(os.fsencode(Path(source).stem))


def degrade_file(
    source: ImageSource,
    target: str | os.PathLike[str],
    degradation: Degradation,
    *,
    seed: int,
    name: str | os.PathLike[str] | None = None,
    page: int | None = None,
    image_format: ImageFormat = PNG,
    severity_map: str | os.PathLike[str] | None = None,
    severity_values: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    origin: str | None = None,
) -> ProcessedFile:
    """Read a picture, degrade it, and write it with its metadata as 8-bit RGB.

    Gray becomes RGB, because noise has colour. Transparency is dropped. Sides that are no multiples of the scale are
    cut at the right and at the bottom.

    Args:
        source: the file to read: its path, its content, or a binary file object.
        target: the file to write; missing folders are made.
        degradation: what becomes of the picture.
        seed: at least 0; see `file_seed`.
        name: what the draws follow from besides the seed; None is `source`, which then must be a path.
        page: page of a file of several, counted from 1; None is the first.
        image_format: the format of `target`. WebP is written lossless; JPEG would compress the result once more.
        severity_map: where to draw the ground truth of the severity (PNG), or None.
        severity_values: where to write it as (h, w) float32 in [0, 1], 1 the most degraded (NumPy's .npy), or None.
        overwrite: replace existing files.
        origin: digest of the source to store in the results (`savl.images.result_mark.digest_origin`); None for none.

    Raises:
        ImageFileError: a file cannot be read or written, or the picture is smaller than one low-resolution pixel.
        TypeError: `source` is no path and there is no `name`.
    """
    if name is None:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"name must be given where source is no path, got {type(source).__name__}")
        name = source
    picture = read_image(source, page=page)
    height, width, _ = picture.pixels.shape
    scale = degradation.scale
    new_width, new_height = width // scale, height // scale
    if new_width == 0 or new_height == 0:
        raise UnsupportedImage(name, f"measures {width}x{height} pixels; scale {scale} needs {scale} on both sides")
    check_size(target, new_width, new_height, image_format)
    for output in (target, severity_map, severity_values):
        if output is not None:
            prepare_output(output, overwrite=overwrite)
    notes = list(picture.notes)
    if width % scale or height % scale:
        notes.append(f"cut at the right and bottom to {new_width * scale}x{new_height * scale}, for scale {scale}")

    x = _colour(picture)[:, :, : new_height * scale, : new_width * scale]
    degraded = degradation(x, file_seed(seed, name))
    severity = degraded.severity[0].numpy()
    if (severity_map or severity_values) and bool((severity == severity[0, 0]).all()):
        notes.append(f"the severity map is {severity[0, 0]:g} everywhere: nothing varies within the picture")
    pixels = (degraded.y[0] * 255.0).round().byte().permute(1, 2, 0).numpy()
    metadata = picture.metadata.cropped(new_width * scale, new_height * scale)
    notes += losses(metadata, picture.pixels, pixels, image_format, transparency="dropped")
    marked = partial(write_image, overwrite=overwrite, origin=origin)
    # The picture comes last: where it stands, the maps that were asked for stand too.
    with _all_or_none() as written:
        if severity_map is not None:
            drawn = draw_severity(severity, limits=(0.0, 1.0), label="true severity")
            marked(severity_map, drawn, image_format=PNG, mark=SEVERITY_MAP)
            written.append(severity_map)
        if severity_values is not None:
            _write_array(severity_values, severity, overwrite=overwrite)
            written.append(severity_values)
        marked(target, pixels, metadata, image_format=image_format, quality=100, mark=DEGRADED)
    return ProcessedFile((width, height), (new_width, new_height), tuple(notes))


@contextlib.contextmanager
def _all_or_none() -> Iterator[list[str | os.PathLike[str]]]:
    """Remove the files in the list that it gives where the block fails or is interrupted."""
    written: list[str | os.PathLike[str]] = []
    try:
        yield written
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(path))  # a link stays, as it stays where it is written through
        raise


def _colour(picture: ImageFile) -> Tensor:
    """``(1, 3, H, W)`` float32 in [0, 1], with no hidden colours of transparent pixels."""
    samples = np.array(picture.pixels.transpose(2, 0, 1), dtype=np.float32, order="C")
    planes = torch.from_numpy(samples)[None].div_(sample_peak(picture.pixels.dtype))
    if planes.shape[1] in (2, 4):
        planes = fill_transparent(planes[:, :-1], planes[:, -1:])
    return planes.expand(-1, 3, -1, -1).contiguous()


def _write_array(path: str | os.PathLike[str], array: NDArray[np.float32], *, overwrite: bool) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with naming_output(path):
        write_atomically(Path(path), buffer.getbuffer(), overwrite=overwrite)
