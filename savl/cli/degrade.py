"""`savl degrade`: make low-resolution images of high-resolution ones."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from savl.cli import options
from savl.command_line import UsageError, exit_with_error

if TYPE_CHECKING:
    from savl.degradation import DegradationConfig
    from savl.images.job import Job
    from savl.images.write import ProcessedFile
    from savl.inference.enlarge import OnTile

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl degrade photo.png   [dim]writes photo_lr.png in the same folder[/dim]",
        "savl degrade photographs/ -r -o lr/   [dim]a folder with its subfolders[/dim]",
        "savl degrade hr/ -o lr/ --seed 7 --spatial --severity-map",
        "savl degrade hr/ -o lr/ --config configs/savl_tiny.toml",
    ]
)

_DEGRADATION = "Degradation"


def degrade(
    inputs: options.Inputs,
    output: options.Output = None,
    recursive: options.Recursive = False,
    exclude: options.Exclude = None,
    include_results: options.IncludeResults = False,
    page: options.Page = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Seed of the random draws. Those of an image follow from it and from the image's name without "
            "folder and extension, and not from the order or other images.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="TOML file with a table \\[degradation], such as a training configuration, whose other tables are "
            "ignored. Default: the settings of Real-ESRGAN.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = None,
    scale: Annotated[
        int,
        typer.Option(
            "--scale",
            "-s",
            metavar="X",
            min=1,
            help="Input size divided by output size. Pixels that are left over at the right and bottom are cut off.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = 4,
    spatial: Annotated[
        bool,
        typer.Option(
            "--spatial",
            help="Degrade every image through a random mask, more strongly in some places than in others.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = False,
    severity_map: Annotated[
        bool,
        typer.Option(
            "--severity-map",
            help="Also write how strongly each pixel was degraded (the ground truth), from 0 to 1: as a plot, "
            "OUTPUT_severity.png, and as a float32 array, OUTPUT_severity.npy.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    image_format: Annotated[
        Literal["png", "webp", "tiff"] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="png (the default), webp or tiff, all lossless: JPEG is part of the degradation already.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            metavar="TEXT",
            help="Text added to the names: out gives photo_out.png. Default: lr beside the inputs, nothing in a "
            "folder OUT.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Make low-resolution images from high-resolution ones: blur, resizing, noise and JPEG, in two stages.

    Results are 8-bit RGB with the colour profile and EXIF of the input, and files are written atomically.

    An image that cannot be read is reported and skipped, and makes the exit code 1.
    """
    started = time.monotonic()
    from savl.cli.loop import Operation, process_files
    from savl.degradation import Degradation, DegradationUnavailable
    from savl.degradation.degrade_file import degrade_file
    from savl.images.errors import ImageFileError
    from savl.images.job import Work
    from savl.images.result_mark import DEGRADED
    from savl.inference.process_settings import use_threads

    use_threads(threads)

    def prepare() -> tuple[str, Work]:
        settings = _load_config(config)
        if spatial:
            settings = replace(settings, spatial=replace(settings.spatial, probability=1.0))
        try:
            degradation = Degradation(settings, scale)
        except DegradationUnavailable as error:
            raise UsageError(str(error)) from error

        def work(job: Job, target: Path | None, maps: tuple[Path | None, ...], on_tile: OnTile) -> ProcessedFile:
            outputs = (job.target, *job.maps)
            missing = [path for path in (target, *maps) if path is not None]
            # An existing output may be from another seed. An image and the mask of another draw must not be combined.
            if len(missing) < len(outputs):
                existing = next(path for path in outputs if path not in missing)
                raise ImageFileError(
                    existing,
                    f"exists already without {missing[0].name}, which belongs to it; --overwrite writes both",
                )
            assert job.format is not None, job
            mask_image, mask_array = job.maps or (None, None)
            return degrade_file(
                job.open(),
                job.target,
                degradation,
                seed=seed,
                name=job.source,
                page=page,
                image_format=job.format,
                mask_image=mask_image,
                mask_array=mask_array,
                overwrite=overwrite,
                origin=job.origin(page),
            )

        return "lr", work

    endings = ("_severity.png", "_severity.npy") if severity_map else ()
    operation = Operation(DEGRADED, r"(?:_p\d+)?_lr", lossless=True, map_endings=endings, prepare=prepare)
    try:
        done = process_files(
            operation,
            inputs,
            output,
            recursive=recursive,
            exclude=exclude,
            include_results=include_results,
            suffix=suffix,
            format_name=image_format,
            overwrite=overwrite,
            page=page,
            debug=debug,
            started=started,
        )
    except UsageError as error:
        exit_with_error(error, 2)
    raise typer.Exit(0 if done else 1)


def _load_config(path: Path | None) -> DegradationConfig:
    """Read the settings of `--config`, or return the defaults.

    Raises:
        UsageError: The file cannot be read, or a setting is not accepted.
    """
    from savl.degradation.config import DegradationConfig, load_degradation_config

    if path is None:
        return DegradationConfig()
    try:
        return load_degradation_config(path)
    except OSError as error:
        raise UsageError(f"--config {path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
