"""`savl degrade`: its options and its help. What it does is in `savl.cli.degrade_batch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from savl.cli import options
from savl.printable import printable

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl degrade photo.png   [dim]writes photo_lr.png beside it[/dim]",
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
            help="What is drawn for a picture follows from this number and the picture's name, less folder and "
            "ending: not from the order or the other pictures.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="TOML with a table \\[degradation], as in a training configuration, whose other tables are not "
            "looked at. Real-ESRGAN's settings if left out.",
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
            help="Input size over output size. What is left over at the right and bottom is cut off.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = 4,
    spatial: Annotated[
        bool,
        typer.Option(
            "--spatial",
            help="Degrade every picture through a mask, more in some places than in others.",
            rich_help_panel=_DEGRADATION,
        ),
    ] = False,
    severity_map: Annotated[
        bool,
        typer.Option(
            "--severity-map",
            help="Also write how strongly each pixel was degraded, from 0 to 1: drawn as OUTPUT_severity.png, and as "
            "float32 numbers in OUTPUT_severity.npy.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    image_format: Annotated[
        Literal["png", "webp", "tiff"] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="png (if left out), webp or tiff, all lossless: JPEG is in the degradation already.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            metavar="TEXT",
            help="Added to the names: out makes photo_out.png. If left out: lr beside the inputs, nothing in a "
            "folder OUT.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Make low-resolution pictures of high-resolution ones: blur, resizing, noise and JPEG, twice over.

    Results are 8-bit RGB with the colour profile and EXIF of the input, and files appear whole or not at all.

    A picture that cannot be read is named and skipped, and makes the exit code 1.
    """
    started = time.monotonic()
    from savl.cli.degrade_batch import Settings, degrade_batch
    from savl.cli.sources import UsageMistake
    from savl.inference.process_settings import use_threads

    use_threads(threads)
    settings = Settings(
        output=output,
        config=config,
        seed=seed,
        scale=scale,
        spatial=spatial,
        suffix=suffix,
        format=image_format,
        overwrite=overwrite,
        recursive=recursive,
        exclude=tuple(exclude or ()),
        include_results=include_results,
        page=page,
        severity_map=severity_map,
        debug=debug,
        started=started,
    )
    try:
        fine = degrade_batch(inputs, settings)
    except UsageMistake as error:
        raise typer.BadParameter(printable(str(error))) from error
    raise typer.Exit(0 if fine else 1)
