"""`savl analyze`: test what the degradation field of a network represents, and write a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from savl.cli import options
from savl.command_line import report_errors
from savl.interrupts import raise_on_interrupt

if TYPE_CHECKING:
    from savl.network import SAVL

PAGE = "index.html"
NUMBERS = "report.json"
TYPES = "types.svg"
HEAD_BYTES = 4096
"""Bytes at the beginning of a file by which a report of savl is recognised."""
EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl analyze --hr photographs/ -o report/",
        "savl analyze --hr photographs/ --table shots.csv --real snapshots/ -o report/",
        "savl analyze --table MANIFEST.tsv --only real/T3i_iso --only real/City100 -o report/",
        "savl analyze --hr photographs/ --compare runs/baseline/model.safetensors -o report/   [dim]side by side[/dim]",
        "savl analyze --hr photographs/ -n first.safetensors -n second.safetensors -o report/",
    ]
)

_DATA = "Images"


def analyze(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help=f"Folder of {PAGE}, {NUMBERS} and, with --hr, {TYPES}; created if missing. An older one is replaced.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        options.model_option(
            "Name of shipped weights, or path of a savl file; savl-tiny by default. May be repeated for weights of one "
            "configuration that were trained with different seeds: their mean and range are reported."
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="NAME",
            help="Further weights, measured on the same images and listed in the same tables; may be repeated.",
            rich_help_panel=options.NETWORK_PANEL,
        ),
    ] = None,
    hr: Annotated[
        list[Path] | None,
        typer.Option(
            "--hr",
            metavar="FOLDER",
            help="High-resolution photographs, subfolders included; may be repeated. They are degraded in known ways.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    table: Annotated[
        list[Path] | None,
        typer.Option(
            "--table",
            metavar="FILE",
            help="CSV or TSV file with a column path (relative to the file) and a column for each factor, such as "
            "camera, iso or scene, or a column metadata with all of them: camera=Nikon;iso=100. May be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="PATH",
            help="Take only the rows of the tables below this path, as a separate table; may be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    real: Annotated[
        list[Path] | None,
        typer.Option(
            "--real",
            metavar="FOLDER",
            help="Photographs whose severity maps are shown, subfolders included; may be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Seed of all random draws.")
    ] = 0,
    scenes: Annotated[
        int,
        typer.Option("--scenes", metavar="N", min=2, help="Largest number of photographs of --hr, evenly spaced."),
    ] = 24,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use fewer images and repeats: a first impression within a minute or two.")
    ] = False,
    device: options.Device = "auto",
    eager: options.Eager = False,
    threads: options.Threads = None,
) -> None:
    r"""Test what the degradation field of a network represents, and what it does not.

    Writes a page, index.html, and its numbers, report.json: probes, types, MINE, CLUB, HSIC, severity, t-SNE, channels.
    The figure of the types is also written as types.svg.

    Without --hr and --table it degrades a few photographs of scikit-learn, which is a demonstration and no evidence.

    Takes minutes. Needs optional packages: pip install 'savl\[analyze,train]'
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from savl.inference.process_settings import use_threads
    from savl.ops.scopes import fused_by_default

    use_threads(threads)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    with report_errors():
        from savl.analysis.factor_table import read_tables
        from savl.analysis.photographs import sample_photographs
        from savl.analysis.report import page_template, render_page, report_json, types_svg
        from savl.analysis.run import AnalysisConfig
        from savl.analysis.run import analyze as run
        from savl.atomic_write import write_whole
        from savl.images.folder import find_images

        if only and not table:
            raise ValueError("--only picks rows of a --table, and there is none")
        page_template()  # It is needed last; if a package for it is missing, that is reported now.
        config = AnalysisConfig(seed=seed, scenes=scenes)
        tables = read_tables(table or (), only or ())
        if not hr and not table:
            photographs = sample_photographs()
            console.print(
                "no --hr and no --table: a demonstration with a few photographs of scikit-learn", soft_wrap=True
            )
        else:
            photographs = find_images(hr, argument="--hr") if hr else []
        snapshots = find_images(real, argument="--real") if real else []
        trainings = model or ["savl-tiny"]
        models = _load([*trainings, *(compare or ())], device)
        names = [PAGE, NUMBERS, *([TYPES] if photographs else [])]
        with raise_on_interrupt(), _report_files(output, names) as files, bar, fused_by_default(eager=eager):
            analysis = run(
                models,
                hr=photographs,
                tables=tables,
                real=snapshots,
                trainings=len(trainings),
                config=config.quick() if quick else config,
                on_progress=on_progress,
            )
            write_whole(files[0], render_page(analysis, on_progress))
            write_whole(files[1], report_json(analysis))
            if svg := types_svg(analysis):
                write_whole(files[2], svg)
    print(output / PAGE)


def _load(names: list[str], device: str) -> dict[str, SAVL]:
    """Load the networks onto their device; the keys are their names on the page.

    Raises:
        ValueError: A name is given twice, or the device is not available.
        OSError: A file cannot be read.
    """
    from savl.analysis.features import check_has_field
    from savl.analysis.photographs import distinct_names
    from savl.inference.device import checked_device
    from savl.weights import load_savl, shipped

    place = checked_device(device)
    # Paths are shortened to their last parts, because the page and the JSON file are shown to others.
    files = {name: Path(name).resolve() for name in names if name not in shipped()}
    if len(set(names)) < len(names) or len(set(files.values())) < len(files):
        raise ValueError(f"--model and --compare must name different weights, got {', '.join(names)}")
    ends = dict(zip(files, distinct_names([*files.values()], folder=True), strict=True))
    models: dict[str, SAVL] = {}
    for name in names:
        network = load_savl(name)
        check_has_field(network, name)
        models[ends.get(name, name)] = network.to(place)
    return models


@contextmanager
def _report_files(folder: Path, names: list[str]) -> Iterator[list[BinaryIO]]:
    """Open the files of a report, so that a folder that cannot be written is noticed before the analysis.

    All are written if the block ends without an error, and none otherwise; a folder that was created for them is
    removed then.

    Raises:
        ValueError: The folder cannot be created, or contains files of these names that savl did not write.
        OSError: The files cannot be written.
    """
    from savl.analysis.figures import GENERATOR
    from savl.atomic_write import atomic_write

    signs = {PAGE: f'content="{GENERATOR}"', NUMBERS: '"savl"', TYPES: f"<dc:title>{GENERATOR}</dc:title>"}
    for name in names:
        sign = signs[name]
        if (folder / name).is_file() and sign.encode() not in (folder / name).read_bytes()[:HEAD_BYTES]:
            raise ValueError(f"--output: {folder / name} is there and was not written by savl; choose another folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output must be a folder, or a new one: {folder}: {error.strerror}") from error
        with ExitStack() as stack:
            yield [stack.enter_context(atomic_write(folder / name, overwrite=True)) for name in names]
    except BaseException:
        for each in made:
            with suppress(OSError):  # The folder is no longer empty.
                each.rmdir()
        raise
