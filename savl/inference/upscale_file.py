"""One image file to another: what the command line does for each input."""

from __future__ import annotations

import os

from savl.images.format import PNG, ImageFormat
from savl.images.metadata import losses
from savl.images.processed_file import ProcessedFile
from savl.images.read import read_image
from savl.images.result_mark import SEVERITY_MAP, UPSCALED
from savl.images.severity_map import draw_severity
from savl.images.write import check_size, prepare_output, write_image
from savl.inference.enlarge import ImageUpscaler, OnTile, check_scale, enlarge, output_size


def upscale_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    upscaler: ImageUpscaler,
    *,
    image_format: ImageFormat,
    scale: float | None = None,
    quality: int = 95,
    severity_map: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_tile: OnTile | None = None,
) -> ProcessedFile:
    """Reads a picture, upscales it, and writes it with its metadata.

    Samples keep their depth where the format can hold it. Transparency is flattened onto white for JPEG,
    which has none: refusing would cost the user the file, and black (what many tools do) ruins cut-outs made
    for paper.

    Args:
        source: the file to read.
        target: the file to write, or None to write none; missing folders are made.
        upscaler: the network.
        image_format: the format of `target`.
        scale: output pixels per input pixel; None is the upscaler's own.
        quality: 1 to 100, for JPEG and WebP.
        severity_map: where to write the severity map (PNG), or None.
        overwrite: replace existing files.
        on_tile: called with (tiles done, tiles in all).

    Raises:
        ImageFileError: a file cannot be read or written.
        TypeError, ValueError: `scale` is not a finite number above 0, or gives more pixels than memory can hold.
        RuntimeError: the network ran out of memory or gave NaN.
    """
    picture = read_image(source)
    height, width, bands = picture.pixels.shape
    new_size = output_size(width, height, upscaler.scale if scale is None else check_scale(scale))
    # What can be known before the minutes of work is not left for after.
    if target is not None:
        check_size(target, *new_size, image_format)
    for output in (target, severity_map):
        if output is not None:
            prepare_output(output, overwrite=overwrite)
    flatten = bands in (2, 4) and not image_format.holds_alpha
    enlarged = enlarge(
        picture.pixels,
        upscaler,
        scale=scale,
        dtype=image_format.sample_dtype(picture.pixels.dtype),
        background=1.0 if flatten else None,
        on_tile=on_tile,
    )
    notes = []
    if target is not None:
        notes += losses(picture.metadata, picture.pixels, enlarged.pixels, image_format)
        write_image(
            target,
            enlarged.pixels,
            picture.metadata,
            image_format=image_format,
            quality=quality,
            overwrite=overwrite,
            mark=UPSCALED,
        )
    if severity_map is not None:
        if bool((enlarged.severity == 1).all()):
            notes.append("the severity map is 1 everywhere: this network has no degradation field, or sees none")
        drawn = draw_severity(enlarged.severity)
        write_image(severity_map, drawn, image_format=PNG, overwrite=overwrite, mark=SEVERITY_MAP)
    return ProcessedFile((width, height), new_size, tuple(notes))
