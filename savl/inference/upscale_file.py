"""`savl.upscale_file`: upscale one image file to another, as `savl upscale` does for each of its inputs."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from savl.images.format import FORMATS, PNG, ImageFormat, format_of_suffix
from savl.images.metadata import losses
from savl.images.result_mark import SEVERITY_MAP, STRENGTH_MAP, UPSCALED
from savl.images.severity_map import draw_severity
from savl.images.write import ProcessedFile, check_quality, check_size, prepare_output, write_image
from savl.inference.enlarge import ByBitDepth, ImageUpscaler, OnTile, Strength, check_scale, enlarge, output_size
from savl.inference.upscale_image import as_upscaler, is_image_source, read_source

if TYPE_CHECKING:
    import torch

    from savl.images.job import Job
    from savl.images.read import ImageSource
    from savl.inference.upscale_image import Model

IN_BFLOAT16 = (
    "results with 8 bits per sample are computed in bfloat16, which is faster on this processor and within one "
    "level of float32; --dtype float32 turns this off"
)
"""Note about images that are computed in bfloat16 without a request."""

SEVERITY_ENDING = "_severity.png"
"""What the name of a severity map has after the name of the result."""
STRENGTH_ENDING = "_strength.png"
"""What the name of a map of the strength has after the name of the result."""


def upscale_file(
    source: ImageSource,
    target: str | os.PathLike[str],
    *,
    model: Model = "savl-tiny",
    format: str | None = None,
    scale: float | None = None,
    strength: Strength | None = None,
    quality: int = 95,
    severity_map: str | os.PathLike[str] | None = None,
    strength_map: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    page: int | None = None,
    tile: int | None = None,
    tile_pad: int = 32,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    on_tile: OnTile | None = None,
) -> ProcessedFile:
    """Upscale an image file to another file, as `savl upscale` does.

    Bit depth, transparency, colour profile and metadata are kept as far as the output format supports them; the `notes`
    of the result name what is lost. The output appears complete or not at all.

    Args:
        source: File to read: its path, its content as bytes, or a binary file object, which is read to its end.
        target: File to write. Missing folders are created.
        model: As for `savl.upscale`.
        format: "png", "jpg", "webp" or "tiff"; None selects the format by the suffix of `target`. JPEG cannot store
            transparency, which is flattened onto white; JPEG and WebP store 8 bits per sample.
        scale: Output pixels per input pixel, any number above 0. If None, the scale of the network is used.
        strength: How strongly the image is restored, as for `savl.upscale`.
        quality: 1 to 100, for JPEG and WebP; WebP at 100 is lossless.
        severity_map: Where to write the severity map as an image (PNG), or None.
        strength_map: Where to write the map of the strength as an image (PNG), or None.
        overwrite: Replace existing files.
        page: Page of a file with several pages, counted from 1; None selects the first, and the `notes` say so.
        tile: Side of the tiles in input pixels. None chooses it by the free memory; 0 disables tiling.
        tile_pad: Context around each tile, in input pixels.
        device: Where to compute, as for `savl.upscale`.
        dtype: Dtype in which the network computes, as for `savl.upscale`; the samples of `target` count.
        on_tile: Callback, called with (tiles done, number of tiles) after every tile.

    Returns:
        The sizes in pixels, and notes in full sentences.

    Raises:
        TypeError, ValueError: An argument is not accepted; the message names it.
        OutputExists: A file to write exists, and `overwrite` is false.
        ImageFileError: A file cannot be read or written.
        RuntimeError: Memory ran out, or the network returned NaN.
    """
    if not is_image_source(source):
        raise TypeError(f"source must be a path, bytes or a binary file object, got {type(source).__name__}")
    image_format = _format_of(target, format)
    check_quality(quality)
    named = {"target": target, "severity_map": severity_map, "strength_map": strength_map}
    files = {name: path for name, path in named.items() if path is not None}
    for first, second in itertools.combinations(files, 2):
        if os.path.realpath(files[first]) == os.path.realpath(files[second]):
            raise ValueError(f"{second} and {first} must be two files, got {os.fspath(files[first])!r} for both")
    return enlarge_file(
        source,
        target,
        as_upscaler(model, strength=strength, tile=tile, tile_pad=tile_pad, device=device, dtype=dtype),
        image_format=image_format,
        scale=scale,
        quality=quality,
        severity_map=severity_map,
        strength_map=strength_map,
        overwrite=overwrite,
        page=page,
        on_tile=on_tile,
    )


def _format_of(target: object, name: str | None) -> ImageFormat:
    if not isinstance(target, (str, os.PathLike)):
        raise TypeError(f"target must be a path, got {type(target).__name__}")
    by_suffix = format_of_suffix(Path(target))
    if name is None:
        if by_suffix is None:
            endings = " ".join(suffix for image_format in FORMATS for suffix in image_format.suffixes)
            raise ValueError(f"target must end in one of {endings}, or format must be given, got {os.fspath(target)!r}")
        return by_suffix
    named = format_of_suffix(Path(f"x.{name}")) if isinstance(name, str) else None
    if named is None:
        names = ", ".join(image_format.name for image_format in FORMATS)
        raise ValueError(f"format must be one of {names}, or None, got {name!r}")
    if by_suffix not in (None, named):
        raise ValueError(f"format {name!r} contradicts the suffix of target {os.fspath(target)!r}")
    return named


@dataclass(frozen=True)
class EnlargeWork:
    """Work of `savl upscale` on one image, in this process or in a worker of a cluster.

    Attributes:
        upscaler: The network.
        map_endings: What the names of the maps of a job end in, in the order of `Job.maps`: `SEVERITY_ENDING`,
            `STRENGTH_ENDING`.
        scale: Output pixels per input pixel; None is that of the upscaler.
        quality: 1 to 100, for JPEG and WebP.
        overwrite: Replace existing files.
        page: Page number in a file with several pages, counted from 1; None selects the first page.
    """

    upscaler: ImageUpscaler
    map_endings: tuple[str, ...] = ()
    scale: float | None = None
    quality: int = 95
    overwrite: bool = False
    page: int | None = None

    def __call__(self, job: Job, target: Path | None, maps: tuple[Path | None, ...], on_tile: OnTile) -> ProcessedFile:
        """Upscale the image of a job; see `savl.images.job.Work`."""
        assert job.format is not None, job
        map_paths = dict(zip(self.map_endings, maps, strict=True))
        return enlarge_file(
            job.open(),
            target,
            self.upscaler,
            image_format=job.format,
            scale=self.scale,
            quality=self.quality,
            severity_map=map_paths.get(SEVERITY_ENDING),
            strength_map=map_paths.get(STRENGTH_ENDING),
            overwrite=self.overwrite,
            page=self.page,
            origin=job.origin(self.page),
            on_tile=on_tile,
        )


def enlarge_file(
    source: ImageSource,
    target: str | os.PathLike[str] | None,
    upscaler: ImageUpscaler,
    *,
    image_format: ImageFormat,
    scale: float | None = None,
    quality: int = 95,
    severity_map: str | os.PathLike[str] | None = None,
    strength_map: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    page: int | None = None,
    origin: str | None = None,
    on_tile: OnTile | None = None,
) -> ProcessedFile:
    """Read an image, upscale it, and write it with its metadata.

    Samples keep their bit depth if the format supports it. For JPEG, transparency is flattened onto white: an error
    would leave the user without a result, and black, which many tools use, spoils cut-out images meant for print.

    Args:
        source: File to read: its path, its content, or a binary file object.
        target: File to write, or None to write none. Missing folders are created.
        upscaler: The network.
        image_format: Format of `target`.
        scale: Output pixels per input pixel; None is that of the upscaler.
        quality: 1 to 100, for JPEG and WebP.
        severity_map: Where to write the severity map (PNG), or None.
        strength_map: Where to write the map of the strength (PNG), or None.
        overwrite: Replace existing files.
        page: Page number in a file with several pages, counted from 1; None selects the first page.
        origin: Digest of the source to store in the results (`savl.images.result_mark.digest_origin`); None for none.
        on_tile: Callback, called with (tiles done, number of tiles) after every tile.

    Raises:
        ImageFileError: A file cannot be read or written.
        TypeError, ValueError: `scale` is not a finite number above 0, or the result would have too many pixels; or
            `severity_map` is given and the network has no degradation field.
        RuntimeError: Memory ran out, or the network returned NaN.
    """
    if severity_map is not None and not getattr(upscaler, "has_field", True):
        raise ValueError(
            "severity_map must be None, because the model has no degradation field and estimates no severity"
        )
    picture = read_source(source, page, argument="source")
    height, width, bands = picture.pixels.shape
    new_size = output_size(width, height, upscaler.scale if scale is None else check_scale(scale))
    # Check everything that can fail before the network runs, which may take minutes.
    if target is not None:
        check_size(target, *new_size, image_format)
    for output in (target, severity_map, strength_map):
        if output is not None:
            prepare_output(output, overwrite=overwrite)
    samples = image_format.sample_dtype(picture.pixels.dtype)
    flatten = bands in (2, 4) and not image_format.holds_alpha
    enlarged = enlarge(
        picture.pixels,
        upscaler,
        scale=scale,
        dtype=samples,
        background=1.0 if flatten else None,
        on_tile=on_tile,
    )
    notes = list(picture.notes)
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
            origin=origin,
        )
    if severity_map is not None:
        if bool((enlarged.severity == 1).all()):
            notes.append("the severity map is 1 everywhere: this network has no degradation field, or sees none")
        drawn = draw_severity(enlarged.severity)
        write_image(severity_map, drawn, image_format=PNG, overwrite=overwrite, mark=SEVERITY_MAP, origin=origin)
    if strength_map is not None:
        if bool((enlarged.strength == 1).all()):
            notes.append("the strength map is 1 everywhere: the whole image is fully restored")
        drawn = draw_severity(enlarged.strength, (0.0, 1.0), "strength")
        write_image(strength_map, drawn, image_format=PNG, overwrite=overwrite, mark=STRENGTH_MAP, origin=origin)
    in_bfloat16 = isinstance(upscaler, ByBitDepth) and upscaler.for_samples(samples) is upscaler.eight_bit
    return ProcessedFile((width, height), new_size, tuple(notes), (IN_BFLOAT16,) if in_bfloat16 else ())
