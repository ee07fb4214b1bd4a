"""`savl evaluate`: score a network on folders of image pairs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.cli import fused

if TYPE_CHECKING:
    from savl.evaluation import Fidelity, PairScores

EXAMPLES = "\n".join(
    [
        "[bold]Example[/bold]",
        "savl evaluate --lr Set14/LRx4 --hr Set14/HR --json set14.json",
    ]
)


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
    tile_pad: Annotated[
        int, typer.Option("--tile-pad", metavar="PIXELS", min=0, help="How far tiles overlap, in input pixels.")
    ] = 32,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="float32 or bfloat16.")] = "float32",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, or auto: the best there is.")
    ] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help=fused.HELP)] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the scores of every image.")
    ] = None,
) -> None:
    """Measure PSNR and SSIM of a network, bicubic interpolation beside it.

    Y: luma, a border as wide as the scale left out. RGB: all channels, whole image. Both on 8-bit values.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table

    from savl.atomic_write import atomic_write
    from savl.evaluation import Fidelity, evaluate_pair, match_pairs
    from savl.inference.upscale_image import as_upscaler

    console = Console(stderr=True)
    try:
        pairs = match_pairs(lr, hr)
        upscaler = as_upscaler(model, tile=tile, tile_pad=tile_pad, device=device, dtype=dtype)
        with atomic_write(json_file, overwrite=True) if json_file is not None else nullcontext() as file:
            # The file is opened first: a folder that cannot be written must not cost the evaluation.
            with fused.fused_unless(eager):
                scores = [evaluate_pair(pair, upscaler) for pair in track(pairs, "evaluating", console=console)]
            means = {
                "bicubic": Fidelity.mean([score.bicubic for score in scores]),
                model: Fidelity.mean([score.model for score in scores]),
            }
            if file is not None:
                file.write(_report(model, lr, hr, means, scores))
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None

    table = Table(title=f"{len(scores)} images", title_justify="left")
    for column in ("", "PSNR Y", "SSIM Y", "PSNR RGB", "SSIM RGB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, mean in means.items():
        table.add_row(
            escape(name), f"{mean.psnr_y:.2f}", f"{mean.ssim_y:.4f}", f"{mean.psnr_rgb:.2f}", f"{mean.ssim_rgb:.4f}"
        )
    Console().print(table)


def _report(model: str, lr: Path, hr: Path, means: dict[str, Fidelity], scores: list[PairScores]) -> bytes:
    """The scores as JSON, null standing for the infinite PSNR of identical images."""
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
        "mean": {name: plain(asdict(mean)) for name, mean in means.items()},
        "images": [plain(asdict(score)) for score in scores],
    }
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
