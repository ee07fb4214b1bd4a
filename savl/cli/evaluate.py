"""`savl evaluate`: score networks, and images upscaled by other programs, on folders of image pairs."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.cli import options
from savl.command_line import report_errors
from savl.interrupts import raise_on_interrupt
from savl.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from savl.evaluation.comparison import Comparison, Method
    from savl.images.pairs import Pair

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl evaluate --lr Set14/LRx4 --hr Set14/HR --json set14.json --csv set14.csv",
        "savl evaluate --lr LR --hr HR --model savl-tiny --model HAT=HAT-S_SRx4.pth --sr OSEDiff=results/osediff "
        "--html comparison.html",
    ]
)
REPORTS_PANEL = "Reports"


def _report_option(name: str, help_text: str) -> Any:
    return typer.Option(name, metavar="FILE", help=help_text, rich_help_panel=REPORTS_PANEL)


def evaluate(
    lr: Annotated[Path, typer.Option("--lr", metavar="FOLDER", help="Folder of low-resolution images.")],
    hr: Annotated[
        Path,
        typer.Option(
            "--hr",
            metavar="FOLDER",
            help="Folder of their high-resolution originals; the file names may differ by a suffix, as in RealSR.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        options.model_option(
            "Name of shipped weights, or path of a file that `savl upscale` takes; may be repeated. LABEL=NAME gives "
            "it another name in the tables. Default: savl-tiny, unless there is --sr."
        ),
    ] = None,
    sr: Annotated[
        list[str] | None,
        typer.Option(
            "--sr",
            metavar="LABEL=FOLDER",
            help="Folder of images that another program upscaled, with the names of the pairs; may be repeated. "
            "The default LABEL is the name of the folder.",
        ),
    ] = None,
    reduce_lr: Annotated[
        bool,
        typer.Option(
            "--reduce-lr",
            help="Reduce low-resolution images that were enlarged to the size of their originals, by the scale of the "
            "networks. By default they are refused.",
        ),
    ] = False,
    strength: options.Strength = "auto",
    tile: options.Tile = None,
    tile_pad: options.TilePad = 32,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    eager: options.Eager = False,
    json_file: Annotated[
        Path | None, _report_option("--json", "Also write the mean scores and those of every image as JSON.")
    ] = None,
    csv_file: Annotated[Path | None, _report_option("--csv", "Also write a CSV file with one row per image.")] = None,
    markdown_file: Annotated[
        Path | None, _report_option("--markdown", "Also write the table of means as Markdown.")
    ] = None,
    html_file: Annotated[
        Path | None,
        _report_option(
            "--html", "Also write an HTML page, one file, with the tables and crops side by side. Needs jinja2."
        ),
    ] = None,
    crops: Annotated[
        int,
        typer.Option(
            "--crops",
            metavar="N",
            min=0,
            help="Number of images of which the page shows a crop: those in which the methods differ most.",
            rich_help_panel=REPORTS_PANEL,
        ),
    ] = 6,
    threads: options.Threads = None,
) -> None:
    """Measure PSNR, SSIM and other scores of networks, images upscaled by other programs, and bicubic interpolation.

    Y: luma, without a border as wide as the scale. RGB: all channels of the whole image. All values have 8 bits.

    LPIPS and DISTS (perceptual distances), NIQE and BRISQUE (scores without an original) are measured if the packages
    and weights that they need are on this machine. Nothing is downloaded; the last lines name what is missing. For
    all four, lower is better.

    Severity maps that `savl degrade` or `savl upscale` wrote into the folders are skipped.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from savl.atomic_write import atomic_write
    from savl.evaluation import comparison_report as report
    from savl.evaluation.comparison import OptionalMetrics, compare
    from savl.images.pairs import match_pairs
    from savl.inference.process_settings import use_threads
    from savl.ops.scopes import fused_by_default

    chosen_strength = options.strength_value(strength)
    use_threads(threads)
    console = Console(stderr=True)

    def skipped(paths: list[Path], one: str, several: str) -> None:
        if paths:
            which = f"{len(paths)} {several}, such as {paths[0]}" if paths[1:] else f"{one}, {paths[0]}"
            console.print(f"skipped {escape(printable(which))}", highlight=False, soft_wrap=True)

    outputs = {"--json": json_file, "--csv": csv_file, "--markdown": markdown_file, "--html": html_file}
    with report_errors():
        maps: list[Path] = []
        pairs = match_pairs(lr, hr, on_map=maps.append)
        skipped(maps, "a map of severity or strength", "maps of severity or strength")
        labelled = _labelled(["savl-tiny"] if not (model or sr) else model or [], sr or [])
        settings: dict[str, Any] = {"tile": tile, "tile_pad": tile_pad, "device": device, "dtype": dtype}
        methods, scale = _methods(labelled, pairs, settings | {"strength": chosen_strength}, reduce_lr, skipped)
        _check_outputs(outputs)
        page = report.page_template() if html_file is not None else None
        with raise_on_interrupt(), ExitStack() as stack:
            # The files are opened first, so that a folder that cannot be written is noticed before the evaluation.
            files = {
                option: stack.enter_context(atomic_write(path, overwrite=True))
                for option, path in outputs.items()
                if path is not None
            }
            metrics = OptionalMetrics.load()
            with fused_by_default(eager=eager), Progress(console=console) as progress:
                comparison = compare(
                    progress.track(pairs, description="evaluating"),
                    methods,
                    scale=scale,
                    metrics=metrics,
                    crops=0 if html_file is None else crops,
                    reduce_lr=reduce_lr,
                )
            contents = {
                "--json": lambda: report.to_json(comparison, lr, hr),
                "--csv": lambda: report.to_csv(comparison),
                "--markdown": lambda: report.to_markdown(comparison),
                "--html": lambda: report.to_html(comparison, lr, hr, page),
            }
            for option, file in files.items():
                file.write(contents[option]())
    _print_table(comparison)


def _labelled(models: list[str], folders: list[str]) -> list[tuple[str, str, str]]:
    """Return option, label and value of every method. The text before = is a label unless a file has the whole name.

    Raises:
        ValueError: Two methods have the same label, or a label is that of a column of the reports.
    """
    found = []
    for option, given in [("--model", text) for text in models] + [("--sr", text) for text in folders]:
        label, equals, value = given.partition("=")
        if not equals or Path(given).exists():
            label, value = given, given
            if option == "--sr":
                label = Path(given).resolve().name
        if not label or not value:
            raise ValueError(f"{option} {given}: a label is expected before =, and a value after it")
        found.append((option, label, value))
    counts = Counter(label for _, label, _ in found)
    if len(models) == 1 and counts["model"]:
        counts["model"] += 1  # the column of the only network
    for taken in ("bicubic", "original", "name"):
        counts[taken] += 1
    if twice := sorted(label for _, label, _ in found if counts[label] > 1):
        raise ValueError(
            f"--model and --sr: the name {twice[0]} is already used; choose another one with LABEL={twice[0]}"
        )
    return found


def _methods(
    labelled: list[tuple[str, str, str]],
    pairs: list[Pair],
    settings: dict[str, Any],
    reduce_lr: bool,
    skipped: Callable[[list[Path], str, str], None],
) -> tuple[list[Method], int]:
    """Load the networks and find the results; return the methods, bicubic interpolation first, and the scale.

    Args:
        labelled: Option, label and value of every method.
        pairs: The pairs.
        settings: Keyword arguments of `as_upscaler`.
        reduce_lr: Whether low-resolution images of the size of their originals are reduced.
        skipped: Reports images of a folder of results that belong to no pair.

    Raises:
        ValueError: The scales of the networks differ, or a folder does not hold the results of all pairs.
    """
    from savl.evaluation import comparison
    from savl.images.pairs import match_results
    from savl.inference.upscale_image import as_upscaler

    scales: dict[str, int] = {}
    methods: list[Method] = []
    found: list[dict[str, Path]] = []
    networks = sum(option == "--model" for option, _, _ in labelled)
    for option, label, value in labelled:
        if option == "--sr":
            extra: list[Path] = []
            files = match_results(pairs, value, argument=f"--sr {label}", on_extra=extra.append)
            skipped(extra, "an image that belongs to no pair", "images that belong to no pair")
            found.append(files)
            methods.append(comparison.results(label, files, source=value))
        else:
            upscaler = as_upscaler(value, **settings)
            scales[label] = upscaler.scale
            methods.append(
                comparison.network(label, upscaler, source=value, only=networks == 1, strength=settings["strength"])
            )
    if len(set(scales.values())) > 1:
        listed = ", ".join(f"{label} ×{scale}" for label, scale in scales.items())
        raise ValueError(f"--model: the networks must have the same scale, got {listed}")
    scale = next(iter(scales.values())) if scales else comparison.common_scale(pairs, reduce_lr=reduce_lr)
    for files in found:
        comparison.check_result_sizes(pairs, files, scale, reduce_lr=reduce_lr)
    return [comparison.bicubic(scale), *methods], scale


def _check_outputs(outputs: dict[str, Path | None]) -> None:
    """Raise an error if two reports have the same file."""
    places: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is not None and (other := places.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{other} and {option} must name two files, got {path} for both")


def _print_table(comparison: Comparison) -> None:
    """Print the means, and what was not measured."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from savl.evaluation import comparison_report as report
    from savl.evaluation.comparison import OPTIONAL

    table = Table(title=f"{len(comparison.images)} images", title_justify="left")
    table.add_column("")
    for column in report.measured(comparison):
        table.add_column(column.title, justify="right")
    for row in report.rows(comparison):
        table.add_row(escape(printable(row.label)), *row.cells)
    output = Console()
    output.print(table)
    for sentence in report.settings(comparison):
        output.print(Text(printable(sentence)), soft_wrap=True)
    for name, note in comparison.notes.items():
        # Text instead of markup, because of brackets; soft_wrap keeps a command that is to be copied on one line.
        output.print(Text(printable(f"no {OPTIONAL[name]}: {note}"), style="dim"), soft_wrap=True)
