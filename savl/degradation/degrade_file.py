"""Degrade one image file into another, as `savl degrade` does for each input."""

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
from savl.images.write import ProcessedFile, check_size, output_errors, prepare_output, write_image


def file_seed(seed: int, source: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the seed of a file's draws: the given seed, and the CRC-32 of the file name without folder and suffix.

    A file is therefore degraded in the same way alone or among others, in any order and folder.
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
    mask_image: str | os.PathLike[str] | None = None,
    mask_array: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    origin: str | None = None,
) -> ProcessedFile:
    """Read an image, degrade it, and write the result as 8-bit RGB with its metadata.

    Gray images become RGB, because noise has colour. Transparency is dropped. Images whose sides are not multiples of
    the scale are cropped at the right and at the bottom.

    Args:
        source: File to read: its path, its content, or a binary file object.
        target: File to write; missing folders are created.
        degradation: The pipeline to apply.
        seed: Seed of the random draws, at least 0; see `file_seed`.
        name: File name for `file_seed`. If None, `source` is used, which then must be a path.
        page: Page of a file with several pages, counted from 1. If None, the first page is used.
        image_format: Format of `target`. WebP is written lossless; JPEG would compress the result once more.
        mask_image: PNG file to draw the degradation mask to, or None.
        mask_array: NumPy file (.npy) to write the degradation mask to, as (h, w) float32 in [0, 1], or None.
        overwrite: Replace existing files.
        origin: Digest of the source, to store in the results (`savl.images.result_mark.digest_origin`); None for none.

    Returns:
        The sizes in pixels, and notes in full sentences.

    Raises:
        ImageFileError: A file cannot be read or written, or the image is smaller than one low-resolution pixel.
        TypeError: `source` is not a path and `name` is missing.
    """
    if name is None:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"name must be given if source is not a path, got {type(source).__name__}")
        name = source
    picture = read_image(source, page=page)
    height, width, _ = picture.pixels.shape
    scale = degradation.scale
    new_width, new_height = width // scale, height // scale
    if new_width == 0 or new_height == 0:
        raise UnsupportedImage(name, f"measures {width}x{height} pixels; scale {scale} needs {scale} on both sides")
    check_size(target, new_width, new_height, image_format)
    for output in (target, mask_image, mask_array):
        if output is not None:
            prepare_output(output, overwrite=overwrite)
    notes = list(picture.notes)
    if width % scale or height % scale:
        notes.append(f"cut at the right and bottom to {new_width * scale}x{new_height * scale}, for scale {scale}")

    x = _colour(picture)[:, :, : new_height * scale, : new_width * scale]
    degraded = degradation(x, file_seed(seed, name))
    mask = degraded.degradation_mask[0].numpy()
    if (mask_image or mask_array) and bool((mask == mask[0, 0]).all()):
        notes.append(f"the severity map is {mask[0, 0]:g} everywhere: nothing varies within the image")
    pixels = (degraded.y[0] * 255.0).round().byte().permute(1, 2, 0).numpy()
    metadata = picture.metadata.cropped(new_width * scale, new_height * scale)
    notes += losses(metadata, picture.pixels, pixels, image_format, transparency="dropped")
    marked = partial(write_image, overwrite=overwrite, origin=origin)
    # The image is written last: if it exists, the masks that were asked for exist too.
    with _all_or_none() as written:
        if mask_image is not None:
            drawn = draw_severity(mask, limits=(0.0, 1.0), label="degradation mask")
            marked(mask_image, drawn, image_format=PNG, mark=SEVERITY_MAP)
            written.append(mask_image)
        if mask_array is not None:
            _write_array(mask_array, mask, overwrite=overwrite)
            written.append(mask_array)
        marked(target, pixels, metadata, image_format=image_format, quality=100, mark=DEGRADED)
    return ProcessedFile((width, height), (new_width, new_height), tuple(notes))


@contextlib.contextmanager
def _all_or_none() -> Iterator[list[str | os.PathLike[str]]]:
    """Yield a list of files, which are removed if the block fails or is interrupted."""
    written: list[str | os.PathLike[str]] = []
    try:
        yield written
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(path))  # the target of a symbolic link, which is the file that was written
        raise


def _colour(picture: ImageFile) -> Tensor:
    """Return ``(1, 3, H, W)`` float32 in [0, 1], in which transparent pixels have the colours of their surroundings."""
    samples = np.array(picture.pixels.transpose(2, 0, 1), dtype=np.float32, order="C")
    planes = torch.from_numpy(samples)[None].div_(sample_peak(picture.pixels.dtype))
    if planes.shape[1] in (2, 4):
        planes = fill_transparent(planes[:, :-1], planes[:, -1:])
    return planes.expand(-1, 3, -1, -1).contiguous()


def _write_array(path: str | os.PathLike[str], array: NDArray[np.float32], *, overwrite: bool) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with output_errors(path):
        write_atomically(Path(path), buffer.getbuffer(), overwrite=overwrite)
