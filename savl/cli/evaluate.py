"""`savl evaluate`: score a network on folders of image pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
[bold]Example[/bold]\n
\n
savl evaluate --lr Set14/LRx4 --hr Set14/HR --json set14.json
"""


def evaluate(
    lr: Annotated[Path, typer.Option("--lr", metavar="FOLDER", help="Low-resolution images.")],
    hr: Annotated[Path, typer.Option("--hr", metavar="FOLDER", help="Their originals, with the same names.")],
    model: Annotated[
        str,
        typer.Option("--model", "-n", metavar="NAME", help="Shipped weights, or the path of a savl or HAT file."),
    ] = "savl-tiny",
    tile: Annotated[
        int | None,
        typer.Option("--tile", "-t", metavar="PIXELS", min=0, help="Side of the tiles; 0 does not tile."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the scores of every image.")
    ] = None,
) -> None:
    """Measure PSNR and SSIM of a network, bicubic interpolation beside it.

    Y: luma with 4 pixels of border left out. RGB: all channels, whole image. Both on 8-bit values.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    import savl
    from savl.atomic_write import write_atomically
    from savl.evaluation import Fidelity, evaluate_pair, match_pairs

    console = Console(stderr=True)
    try:
        pairs = match_pairs(lr, hr)
        upscaler = savl.Upscaler(savl.load(model), tile=tile)
        scores = [evaluate_pair(pair, upscaler) for pair in track(pairs, "evaluating", console=console)]
        means = {
            "bicubic": Fidelity.mean([s.bicubic for s in scores]),
            model: Fidelity.mean([s.model for s in scores]),
        }
        if json_file is not None:
            report = {
                "model": model,
                "lr": "/".join(lr.resolve().parts[-2:]),
                "hr": "/".join(hr.resolve().parts[-2:]),
                "mean": {name: asdict(mean) for name, mean in means.items()},
                "images": [asdict(score) for score in scores],
            }
            write_atomically(json_file, (json.dumps(report, indent=1) + "\n").encode())
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None

    table = Table(title=f"{len(scores)} images", title_justify="left")
    for column in ("", "PSNR Y", "SSIM Y", "PSNR RGB", "SSIM RGB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, mean in means.items():
        table.add_row(name, f"{mean.psnr_y:.2f}", f"{mean.ssim_y:.4f}", f"{mean.psnr_rgb:.2f}", f"{mean.ssim_rgb:.4f}")
    Console().print(table)
