"""`savl upscale`: its options and its help. What it does is in `savl.cli.batch`."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from savl.cli import fused, options
from savl.printable import printable

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl upscale photo.jpg   [dim]writes photo_x4.jpg beside it[/dim]",
        "savl upscale photo.jpg -o large.png",
        "savl upscale holiday/ -r -o large/   [dim]a folder with its subfolders[/dim]",
        "savl upscale '*.png' -o out/ --scale 2",
        "savl upscale - -o - -f png <photo.jpg >large.png   [dim]standard input and output[/dim]",
        "savl upscale scan.tif --model Real_HAT_GAN_SRx4.pth --tile 256",
    ]
)

_NETWORK = "Network"


def upscale(
    inputs: options.Inputs,
    output: options.Output = None,
    recursive: options.Recursive = False,
    exclude: options.Exclude = None,
    include_results: options.IncludeResults = False,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            "-s",
            metavar="X",
            help="Output size over input size, any number above 0; the network's own if left out.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    image_format: Annotated[
        Literal["auto", "png", "jpg", "webp", "tiff"],
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="png, jpg, webp, tiff, or auto: the input's. JPEG has no transparency, it is flattened onto "
            "white; JPEG and WebP hold 8 bits.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = "auto",
    quality: Annotated[
        int,
        typer.Option(
            "--quality",
            "-q",
            metavar="Q",
            min=1,
            max=100,
            help="1 to 100, for JPEG and WebP; WebP at 100 is lossless.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = 95,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            metavar="TEXT",
            help="Added to the names: out makes photo_out.jpg. If left out: x4 (the scale) beside the "
            "inputs, nothing in a folder OUT.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    severity_map: Annotated[
        bool,
        typer.Option(
            "--severity-map",
            help="Also write a plot of how degraded each pixel was found, as OUTPUT_severity.png.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    page: options.Page = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-n",
            metavar="NAME",
            help="Shipped weights, or the path of a savl or HAT file.",
            rich_help_panel=_NETWORK,
        ),
    ] = "savl-tiny",
    tile: Annotated[
        int | None,
        typer.Option(
            "--tile",
            "-t",
            metavar="PIXELS",
            min=0,
            help="Side of the tiles, in input pixels; 0 does not tile. If left out, what fits the machine.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    tile_pad: Annotated[
        int,
        typer.Option(
            "--tile-pad",
            metavar="PIXELS",
            min=0,
            help="How far tiles overlap, in input pixels.",
            rich_help_panel=_NETWORK,
        ),
    ] = 32,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, or bfloat16: computes under autocast, faster where the hardware has it.",
            rich_help_panel=_NETWORK,
        ),
    ] = "float32",
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, cuda, cuda:1, mps, or auto: cuda if there is one, else mps, else cpu.",
            rich_help_panel=_NETWORK,
        ),
    ] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help=fused.HELP, rich_help_panel=_NETWORK)] = False,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Upscale pictures.

    Bit depth, transparency, colour profile and EXIF are kept, and files appear whole or not at all.

    A picture that cannot be read is named and skipped, and makes the exit code 1.
    """
    started = time.monotonic()
    from savl.inference.device import checked_dtype

    try:
        checked_dtype(dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dtype") from error

    from savl.cli.batch import Settings, upscale_batch
    from savl.cli.sources import UsageMistake
    from savl.inference.process_settings import use_threads

    use_threads(threads)
    settings = Settings(
        output=output,
        model=model,
        tile=tile,
        tile_pad=tile_pad,
        scale=scale,
        dtype=dtype,
        device=device,
        suffix=suffix,
        format=image_format,
        quality=quality,
        overwrite=overwrite,
        recursive=recursive,
        exclude=tuple(exclude or ()),
        include_results=include_results,
        severity_map=severity_map,
        page=page,
        debug=debug,
        started=started,
    )
    try:
        with fused.fused_unless(eager):
            fine = upscale_batch(inputs, settings)
    except UsageMistake as error:
        raise typer.BadParameter(printable(str(error))) from error
    raise typer.Exit(0 if fine else 1)
