"""Definition of the command `savl` and its subcommands, and the function that runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

import typer

from savl.cli import analyze, degrade, evaluate, export, kernels, models, serve, train, upscale, web
from savl.cli.cluster import RayCommand
from savl.cli.streams import tolerant_streams
from savl.command_line import CommandLine, print_error
from savl.inference.process_settings import limit_spinning, reduce_address_space
from savl.out_of_memory import is_out_of_memory, require_memory
from savl.profile import command as profile
from savl.settings import EnvironmentVariableError

# The least address space that PyTorch, NumPy and libvips need. With less, importing them raises various errors, and
# OpenBLAS even ends the process.
_LIBRARY_BYTES = 640 * 2**20

app = CommandLine(name="savl", add_completion=True)

# Each subcommand has one line here. The modules of the subcommands import torch and image libraries only inside
# functions, so that `savl --help` starts quickly.
app.command("upscale", epilog=upscale.EXAMPLES, cls=RayCommand)(upscale.upscale)
app.command("web", epilog=web.EXAMPLES)(web.web)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("degrade", epilog=degrade.EXAMPLES)(degrade.degrade)
app.command("evaluate", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("analyze", epilog=analyze.EXAMPLES)(analyze.analyze)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("profile", epilog=profile.EXAMPLES)(profile.profile)
app.add_typer(kernels.app, name="kernels")
app.add_typer(models.app, name="models")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from savl import __version__  # imported here because it reads the metadata of the installed package

    typer.echo(f"savl {__version__}")
    raise typer.Exit


OPTIONAL_PARTS = {"savl upscale --ray": "cluster", "savl upscale VIDEO": "video"}
"""Parts that need packages besides those of the base install, each with the extra that installs them."""

_EPILOG = [
    "[bold]savl COMMAND --help[/bold] explains a command, with examples.",
    *(f"{part} needs [bold]pip install 'savl\\[{extra}]'[/bold]." for part, extra in OPTIONAL_PARTS.items()),
]


FIRST_COMMANDS = (
    ("savl web", "Open a page in the browser and drop photographs on it.", ("gradio", "web")),
    ("savl upscale photo.jpg", "Enlarge a photograph 4 times; the result is written beside it.", None),
    ("savl upscale photos/ -o large/", "Enlarge all photographs in a folder.", None),
    ("savl upscale clip.mp4 -o large.mp4", "Enlarge a video.", ("av", "video")),
    ("savl kernels info", "Show what makes savl fast on this machine, and what is missing.", None),
    ("savl --help", "List all commands.", None),
)
"""What `savl` without arguments prints: commands, what they do, and the package and extra that they need, if any."""


def _first_lines() -> str:
    width = max(len(command) for command, *_ in FIRST_COMMANDS)
    lines = []
    for command, purpose, needs in FIRST_COMMANDS:
        if needs is not None and find_spec(needs[0]) is None:
            purpose = f"{purpose} First: pip install 'savl[{needs[1]}]'"
        lines.append(f"{command:{width}}  {purpose}")
    return "\n".join(lines)


@app.callback(epilog="\n\n".join(_EPILOG), invoke_without_command=True)
def savl(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Real-world image super-resolution, guided by the degradation of each pixel."""
    if context.invoked_subcommand is None:
        typer.echo(_first_lines())


def run(arguments: Sequence[str] | None) -> None:
    """Run the command line and exit. `savl.cli.main` calls this function.

    Args:
        arguments: Arguments after `savl`. If None, the arguments of the process are used.
    """
    given = sys.argv[1:] if arguments is None else arguments
    limit_spinning()
    limited = reduce_address_space()
    with tolerant_streams():
        try:
            if limited and "torch" not in sys.modules and not {"-h", "--help", "--version"} & set(given):
                require_memory(_LIBRARY_BYTES, "while libraries are loaded")
            app(args=None if arguments is None else list(arguments), prog_name="savl")
        except EnvironmentVariableError as error:
            print_error(error)
            sys.exit(2)
        except Exception as error:
            # If there is too little memory to load the libraries, their imports raise various errors.
            if not is_out_of_memory(error) or "--debug" in given:
                raise
            print_error(error)
            sys.exit(1)
