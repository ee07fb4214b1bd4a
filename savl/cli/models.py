"""`savl models`: say what a file of weights is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.command_line import CommandLine, report_errors

if TYPE_CHECKING:
    from savl.weights.info import ModelInfo

app = CommandLine(no_args_is_help=True, help="Say what files of weights are.")


@app.callback()
def models() -> None:
    """Show information about model files."""


@app.command(
    epilog="[bold]Examples[/bold]\nsavl models info RealESRGAN_x4plus.pth\nsavl models info savl-tiny --json",
)
def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Path of a file of weights, or name of shipped weights.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the architecture, scale, size and licence of a model, and which of its blocks savl accelerates.

    The licence is the one that the file states in its metadata. Most files state none. The accelerated blocks are those
    on the CPU of this machine.
    """
    import torch

    from savl.inference.network import acceleration_report
    from savl.weights.info import model_info

    with report_errors():
        found, network = model_info(file)
        report = acceleration_report(network, torch.device("cpu"))
    if as_json:
        import json

        typer.echo(json.dumps({**_as_json(found), "acceleration": report}, indent=1))
        return
    rows = _rows(found)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        typer.echo(f"{label:<{width}}  {value}")
    typer.echo(f"\n{report}")


def _rows(found: ModelInfo) -> list[tuple[str, str]]:
    from savl.printable import printable

    rows = [
        ("file", str(found.path)),
        ("architecture", found.architecture),
        ("purpose", found.purpose),
        ("scale", f"x{found.scale}"),
        ("images", "gray, each colour channel by itself" if found.channels == 1 else "RGB"),
        ("parameters", f"{found.parameters:,}"),
        ("settings", ", ".join(found.tags)),
        ("image sizes", found.sizes),
        ("tiles", found.tiling),
        ("dtypes", ", ".join(found.dtypes)),
        ("licence", found.licence or "not stated in the file"),
        *((f"metadata: {key}", value) for key, value in found.metadata.items()),
    ]
    return [(printable(label), printable(value)) for label, value in rows if value]


def _as_json(found: ModelInfo) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "path": str(found.path)}
