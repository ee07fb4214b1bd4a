"""`savl export`: write a network for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from savl.cli import options
from savl.command_line import report_errors

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl export savl-tiny -o savl-tiny.onnx",
        "savl export RealESRGAN_x4plus.pth -o RealESRGAN_x4plus.onnx --dtype float16   [dim]half the size[/dim]",
        "savl export savl-tiny -o savl-tiny.pt2   [dim]compiled by AOTInductor, with the fused kernels[/dim]",
    ]
)


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Name of shipped weights, or path of a savl, HAT or other file."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="File to write: .onnx for ONNX, .pt2 for a package of AOTInductor.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32. For ONNX also float16: weights are stored in float16, and computations are in float32. For "
            ".pt2 also bfloat16: computes under autocast.",
            rich_help_panel=options.NETWORK_PANEL,
        ),
    ] = "float32",
    opset: Annotated[
        int,
        typer.Option(
            "--opset",
            metavar="N",
            help="Version of ONNX's operators, from 20 to 23.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = 20,
    strength: options.Strength = "auto",
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="Write the file without comparing it with the network.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing file.", rich_help_panel=options.OUTPUT_PANEL),
    ] = False,
    threads: options.Threads = None,
) -> None:
    r"""Write a network as an ONNX file (needs pip install 'savl\[export]'), or compiled, for PyTorch and C++.

    The file takes images of any number and size. It is compared with the network at five sizes, from one pixel up; if
    it computes something else, it is not written, and the exit code is 1.

    ONNX needs optional packages: pip install 'savl\[export]'. A .pt2 package needs a C++ compiler.
    """
    from savl.inference.process_settings import use_threads

    use_threads(threads)
    value = options.strength_value(strength)
    with report_errors():
        from savl.export import export as run
        from savl.weights import load

        report = run(
            load(model), output, strength=value, dtype=dtype, opset=opset, check=not no_check, overwrite=overwrite
        )
    typer.echo(str(report))
