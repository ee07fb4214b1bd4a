"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.command_line import option_value
from savl.inference.process_settings import MAX_THREADS

if TYPE_CHECKING:
    from savl.inference.enlarge import Strength as StrengthValue

OUTPUT_PANEL = "Output"
NETWORK_PANEL = "Network"
CLUSTER_PANEL = "Cluster"
VIDEO_PANEL = "Video"

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="IN",
        help="Images (PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF, HEIC), folders, quoted globs; - is standard input.",
    ),
]
ImagesAndVideos = Annotated[
    list[str],
    typer.Argument(
        metavar="IN",
        help="Images (PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF, HEIC), folders of images, videos, quoted globs; - is an "
        "image on standard input.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="A file for a single input, - for standard output, or a folder, which is created if missing. Default: "
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
        help="Also process images in folders and globs that savl made. By default, they are skipped.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Divide the files among the workers of a Ray cluster; needs pip install 'savl\\[cluster]'. ADDRESS is "
        "auto, the cluster that this machine belongs to, or host:port. Without it, the workers use the cores and GPUs "
        "of this machine. OUT may be a URL such as s3://bucket/folder.",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="Number of workers of --ray. Default: one per GPU, or one per --threads cores (up to 4).",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")]


def model_option(help_text: str) -> Any:
    """Return the option ``--model``, for the annotation of a name or of a list of names."""
    return typer.Option("--model", "-n", metavar="NAME", help=help_text, rich_help_panel=NETWORK_PANEL)


Model = Annotated[
    str,
    model_option(
        "Name of shipped weights, or path of a savl, HAT or other file. ESRGAN, Compact, SwinIR, DAT and other "
        "architectures need pip install 'savl\\[models]'."
    ),
]
Strength = Annotated[
    str,
    typer.Option(
        "--strength",
        metavar="S",
        help="How strongly images are restored, from 0 (bicubic interpolation) to 1 (the network's full restoration). "
        "auto: the strength that the network has learned for each pixel, or 1 if none.",
        rich_help_panel=NETWORK_PANEL,
    ),
]


def strength_value(text: str) -> StrengthValue:
    """Return the value of ``--strength``: "auto" or a number.

    Raises:
        typer.BadParameter: It is neither "auto" nor a number from 0 to 1.
    """
    from savl.inference.enlarge import check_strength

    try:
        number: float | str = float(text)
    except ValueError:
        number = text
    with option_value("--strength"):
        return check_strength(number)


Tile = Annotated[
    int | None,
    typer.Option(
        "--tile",
        "-t",
        metavar="PIXELS",
        min=0,
        help="Width and height of the tiles in input pixels; 0 disables tiling. Default: what fits into memory.",
        rich_help_panel=NETWORK_PANEL,
    ),
]
TilePad = Annotated[
    int,
    typer.Option(
        "--tile-pad",
        metavar="PIXELS",
        min=0,
        help="Overlap of tiles with their surroundings, in input pixels.",
        rich_help_panel=NETWORK_PANEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, or bfloat16: computes under autocast, faster on hardware that supports it.",
        rich_help_panel=NETWORK_PANEL,
    ),
]
AutomaticDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16, or auto: bfloat16 for results of savl-tiny with 8 bits per sample on a CPU that is "
        "faster in it, float32 otherwise.",
        rich_help_panel=NETWORK_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, or auto: cuda if available, else mps, else cpu.",
        rich_help_panel=NETWORK_PANEL,
    ),
]
Eager = Annotated[
    bool,
    typer.Option(
        "--eager",
        help="Compute with PyTorch's own operations instead of the fused kernels: slower, the same result.",
        rich_help_panel=NETWORK_PANEL,
    ),
]
