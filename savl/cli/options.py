"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from savl.inference.process_settings import MAX_THREADS

OUTPUT_PANEL = "Output"
EAGER_HELP = "Compute with PyTorch's own operations instead of the fused kernels: slower, the same result."

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="IN",
        help="Pictures (PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF, HEIC), folders, quoted globs; - is standard input.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="A file for a single picture, - for standard output, or a folder, which is created if missing. Default: "
        "results are written beside the inputs.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Recursive = Annotated[
    bool,
    typer.Option("--recursive", "-r", help="Search subfolders of the input folders too; OUT gets the same subfolders."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace existing outputs. By default they are kept, and a file OUT that exists is an error.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=MAX_THREADS,
        help="Number of threads. Default: the value of OMP_NUM_THREADS, else one per processor that the process or its "
        "container may use.",
    ),
]
Page = Annotated[
    int | None,
    typer.Option(
        "--page",
        metavar="N",
        min=1,
        help="Page of a TIFF file, or frame of an animation. By default the first page is taken, and animations are "
        "refused.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave out files and subfolders whose name, or path below the given folder, matches; may be repeated.",
    ),
]
IncludeResults = Annotated[
    bool,
    typer.Option(
        "--include-results",
        help="Include pictures in folders and globs that savl has made, which are left out by default.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")]
