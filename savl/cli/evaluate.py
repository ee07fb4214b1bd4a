"""`savl evaluate`: score a network on folders of image pairs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.cli import options
from savl.command_line import report_errors
from savl.interrupts import raise_on_interrupt
from savl.printable import printable

if TYPE_CHECKING:
    from savl.evaluation import Fidelity, PairScores

EXAMPLES = "\n".join(
    [
        "[bold]Example[/bold]",
        "savl evaluate --lr Set14/LRx4 --hr Set14/HR --json set14.json --csv set14.csv",
    ]
)


def evaluate(
    lr: Annotated[Path, typer.Option("--lr", metavar="FOLDER", help="Folder of low-resolution images.")],
    hr: Annotated[
        Path,
        typer.Option(
            "--hr", metavar="FOLDER", help="Folder of their high-resolution originals, with the same file names."
        ),
    ],
    model: options.Model = "savl-tiny",
    tile: options.Tile = None,
    tile_pad: options.TilePad = 32,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    eager: options.Eager = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the mean scores and those of every image as JSON."),
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write a CSV file with one row per image.")
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Measure PSNR, SSIM and LPIPS of a network and of bicubic interpolation.

    Y: luma, without a border as wide as the scale. RGB: all channels of the whole image. All values have 8 bits.

    LPIPS (AlexNet, RGB, lower is better) is measured if torchvision and torchmetrics are installed and the weights of
    AlexNet are in the cache of torch.hub. Nothing is downloaded; the last line says what is missing.

    Severity maps that `savl degrade` or `savl upscale` wrote into the folders are skipped.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table
    from rich.text import Text

    from savl.atomic_write import atomic_write
    from savl.evaluation import Fidelity, Lpips, LpipsUnavailable, evaluate_pair, match_pairs
    from savl.inference.process_settings import use_threads
    from savl.inference.upscale_image import as_upscaler
    from savl.ops.scopes import fused_by_default

    use_threads(threads)
    console = Console(stderr=True)
    with report_errors():
        maps: list[Path] = []
        pairs = match_pairs(lr, hr, on_map=maps.append)
        if maps:
            which = f"{len(maps)} severity maps, such as {maps[0]}" if maps[1:] else f"a severity map, {maps[0]}"
            console.print(f"skipped {escape(printable(which))}", highlight=False, soft_wrap=True)
        upscaler = as_upscaler(model, tile=tile, tile_pad=tile_pad, device=device, dtype=dtype)
        if json_file is not None and csv_file is not None and json_file.resolve() == csv_file.resolve():
            raise ValueError(f"--json and --csv must name two files, got {csv_file} for both")
        lpips, missing, note = None, None, None
        try:
            lpips = Lpips()
        except LpipsUnavailable as error:
            missing, note = error.reason, str(error)
        with raise_on_interrupt(), ExitStack() as stack:
            # The files are opened first, so that a folder that cannot be written is noticed before the evaluation.
            to_json, to_csv = (
                None if path is None else stack.enter_context(atomic_write(path, overwrite=True))
                for path in (json_file, csv_file)
            )
            with fused_by_default(eager=eager):
                scores = [
                    evaluate_pair(pair, upscaler, lpips=lpips) for pair in track(pairs, "evaluating", console=console)
                ]
            means = {
                "bicubic": Fidelity.mean([score.bicubic for score in scores]),
                model: Fidelity.mean([score.model for score in scores]),
            }
            if lpips is not None and (small := [score.name for score in scores if score.model.lpips is None]):
                missing = note = f"too small for AlexNet: {', '.join(small)}"
            if to_json is not None:
                to_json.write(_report(model, lr, hr, means, scores, missing))
            if to_csv is not None:
                to_csv.write(_rows(scores))

    table = Table(title=f"{len(scores)} images", title_justify="left")
    for column in ("", "PSNR Y", "SSIM Y", "PSNR RGB", "SSIM RGB", "LPIPS"):
        table.add_column(column, justify="left" if not column else "right")
    for name, mean in means.items():
        table.add_row(
            escape(printable(name)),
            f"{mean.psnr_y:.2f}",
            f"{mean.ssim_y:.4f}",
            f"{mean.psnr_rgb:.2f}",
            f"{mean.ssim_rgb:.4f}",
            "-" if mean.lpips is None else f"{mean.lpips:.4f}",
        )
    output = Console()
    output.print(table)
    if note is not None:
        # Text instead of markup, because of brackets; soft_wrap keeps a command that is to be copied on one line.
        output.print(Text(printable(f"no LPIPS: {note}"), style="dim"), soft_wrap=True)


def _report(
    model: str, lr: Path, hr: Path, means: dict[str, Fidelity], scores: list[PairScores], missing: str | None
) -> bytes:
    """Return the scores as JSON; null stands for the infinite PSNR of identical images and for missing LPIPS.

    ``missing`` is the reason why there is no mean LPIPS; None if there is one.
    """
    import json
    import math
    from dataclasses import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    report = {
        "model": model,
        "lr": "/".join(lr.resolve().parts[-2:]),
        "hr": "/".join(hr.resolve().parts[-2:]),
        "lpips_missing": missing,
        "mean": {name: plain(asdict(mean)) for name, mean in means.items()},
        "images": [plain(asdict(score)) for score in scores],
    }
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()


def _rows(scores: list[PairScores]) -> bytes:
    """Return the scores as CSV, a row per image: `inf` for the PSNR of identical images, empty for missing LPIPS."""
    import csv
    import io
    from dataclasses import asdict

    rows = [
        {"name": score.name}
        | {f"bicubic_{name}": value for name, value in asdict(score.bicubic).items()}
        | {f"model_{name}": value for name, value in asdict(score.model).items()}
        for score in scores
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # Bytes of a file name that are not UTF-8 are written unchanged.
    return text.getvalue().encode(errors="surrogateescape")
