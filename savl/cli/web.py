"""`savl web`: a page in the browser, on which photographs are upscaled."""

from __future__ import annotations

from typing import Annotated

import typer

from savl.cli import options
from savl.command_line import UsageError, exit_with_error, option_value, report_errors

PAGE_PANEL = "Page"
EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl web   [dim]opens the page in your browser[/dim]",
        "savl web --model 4x-UltraSharp.pth   [dim]one more model to choose from[/dim]",
        "savl web --no-browser --port 8000",
    ]
)


def web(
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen on. Other computers reach the page only if you name one of this computer's "
            "addresses, or 0.0.0.0.",
            rich_help_panel=PAGE_PANEL,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            metavar="N",
            min=0,
            max=65535,
            help="Port to listen on. Default: any that is free.",
            rich_help_panel=PAGE_PANEL,
        ),
    ] = 0,
    no_browser: Annotated[
        bool,
        typer.Option("--no-browser", help="Only print the address, do not open a browser.", rich_help_panel=PAGE_PANEL),
    ] = False,
    model: Annotated[
        list[str] | None,
        options.model_option(
            "Path of a file of weights that the page offers first, besides the shipped ones; may be repeated."
        ),
    ] = None,
    tile: options.Tile = None,
    tile_pad: options.TilePad = 32,
    dtype: options.AutomaticDtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    r"""Open a page in the browser to upscale photographs; needs pip install 'savl\[web]'.

    The page is served by this computer, and works without the internet. Its pictures stay on this computer, and are
    deleted when the command ends; Ctrl-C ends it.
    """
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        exit_with_error("savl web needs pip install 'savl[web]', because gradio is not installed", 2)
    from savl.images.job import in_short
    from savl.inference.device import checked_device, checked_dtype
    from savl.inference.process_settings import keep_freed_memory, use_threads
    from savl.interrupts import exit_on_termination, raise_on_interrupt
    from savl.web.server import LOOPBACK, listen, run
    from savl.web.work import Desk
    from savl.weights.files import find_weights, shipped

    with option_value("--device"):
        checked_device(device)
    with option_value("--dtype"):
        chosen_dtype = None if dtype == "auto" else checked_dtype(dtype, also=("auto",))
    models = list(dict.fromkeys([*(model or []), *shipped()]))
    with report_errors(UsageError, ValueError, FileNotFoundError):
        for name in models:
            find_weights(name, "model")
    use_threads(threads)
    keep_freed_memory()
    try:
        listening = listen(host, port)
    except OSError as error:
        exit_with_error(f"cannot listen on {host}:{port}: {error.strerror or error}", 1)
    desk = Desk(tile=tile, tile_pad=tile_pad, device=device, dtype=chosen_dtype)
    try:
        scale = desk.load(models[0])
    except Exception as error:
        exit_with_error(f"model {models[0]}: {in_short(error)}", 2)
    if host not in LOOPBACK:
        typer.echo(f"warning: anyone who reaches {host} can use the page; nothing is encrypted", err=True)
    with exit_on_termination(), raise_on_interrupt():
        run(listening, host, desk, models, scale, say=typer.echo, browser=not no_browser)
