"""Options that commands on pictures share."""

from __future__ import annotations

from typing import Annotated

import typer

from savl.inference.process_settings import MOST_THREADS

OUTPUT_PANEL = "Output"

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
        help="A file for a single picture, - for standard output, else a folder, made if missing. Without it, results "
        "go beside the inputs.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Recursive = Annotated[
    bool,
    typer.Option("--recursive", "-r", help="Look into subfolders of the input folders, and keep them in OUT."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace existing outputs. If left out they are kept, and a file OUT that exists is an error.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=MOST_THREADS,
        help="Threads to compute with. If left out, what OMP_NUM_THREADS says, else one per processor, or the share of "
        "the processors that a container has.",
    ),
]
Page = Annotated[
    int | None,
    typer.Option(
        "--page",
        metavar="N",
        min=1,
        help="Which page of a TIFF file, or frame of an animation. If left out, the first page is taken, and "
        "animations are refused.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave out files and subfolders whose name, or path below the folder given, matches; can be repeated.",
    ),
]
IncludeResults = Annotated[
    bool,
    typer.Option(
        "--include-results",
        help="Take pictures from folders and globs that savl itself has made, which are left out otherwise.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show Python's traceback when something fails.")]
