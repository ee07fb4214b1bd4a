"""`savl serve`: an HTTP service that upscales images."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from savl.cli import options
from savl.command_line import UsageError, exit_with_error, option_value, print_error, report_errors

TOKEN_VARIABLE = "SAVL_SERVE_TOKEN"
SERVICE_PANEL = "Service"
LIMITS_PANEL = "Limits"
EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl serve   [dim]then: curl --data-binary @photo.jpg localhost:8000/upscale -o large.jpg[/dim]",
        "savl serve --workers 2 --max-megapixels 4 --timeout 60",
        "SAVL_SERVE_TOKEN=secret savl serve --host 0.0.0.0",
    ]
)


def serve(
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="Address to listen on.", rich_help_panel=SERVICE_PANEL),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="Port; 0 for any.", rich_help_panel=SERVICE_PANEL),
    ] = 8000,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            help="Number of processes that upscale. Default: one per GPU, or one that uses all processors.",
            rich_help_panel=SERVICE_PANEL,
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            "--images",
            metavar="N",
            min=1,
            help="Images that a process upscales at the same time; their tiles share passes over the network.",
            rich_help_panel=SERVICE_PANEL,
        ),
    ] = 4,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="TOKEN",
            envvar=TOKEN_VARIABLE,
            help="Requests need the header Authorization: Bearer TOKEN. Others can read the arguments of a process: "
            "the environment variable is safer.",
            rich_help_panel=SERVICE_PANEL,
        ),
    ] = None,
    max_megabytes: Annotated[
        float,
        typer.Option(
            "--max-megabytes", metavar="N", min=0, help="Largest request, in 10⁶ bytes.", rich_help_panel=LIMITS_PANEL
        ),
    ] = 64,
    max_megapixels: Annotated[
        float,
        typer.Option(
            "--max-megapixels", metavar="N", min=0, help="Largest image, in 10⁶ pixels.", rich_help_panel=LIMITS_PANEL
        ),
    ] = 16,
    max_result_megapixels: Annotated[
        float,
        typer.Option(
            "--max-result-megapixels",
            metavar="N",
            min=0,
            help="Largest result, in 10⁶ pixels.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 256,
    queue: Annotated[
        int,
        typer.Option(
            "--queue",
            metavar="N",
            min=1,
            help="Images that may wait or be upscaled; more are refused with the status 503.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 64,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.1, help="Longest time for a request.", rich_help_panel=LIMITS_PANEL
        ),
    ] = 300,
    model: options.Model = "savl-tiny",
    tile: options.Tile = None,
    tile_pad: options.TilePad = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    r"""Upscale images that are posted over HTTP; needs pip install 'savl\[serve]'.

    POST /upscale takes an image file and returns the upscaled one; GET /health
    and GET /metrics (Prometheus) report the state. SIGTERM and Ctrl-C stop the service after it has answered the
    requests that it has begun.
    """
    try:
        import uvicorn

        from savl.service.app import Limits, create_service
    except ImportError as error:
        exit_with_error(f"savl serve needs pip install 'savl[serve]' ({error})", 2)
    import torch

    from savl.inference.device import checked_device, checked_dtype
    from savl.service.worker import WorkerSettings
    from savl.weights.files import find_weights

    with option_value("--device"):
        chosen = checked_device(device)
    with option_value("--dtype"):
        if dtype != "auto":
            checked_dtype(dtype, also=("auto",))
    with report_errors(UsageError, ValueError, FileNotFoundError):
        find_weights(model, "model")
    limited = {"megabytes": max_megabytes, "megapixels": max_megapixels, "result-megapixels": max_result_megapixels}
    for name, value in [*((f"--max-{name}", value) for name, value in limited.items()), ("--timeout", timeout)]:
        with option_value(name):
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a finite number")
    gpus = torch.cuda.device_count() if chosen.type == "cuda" and device in ("auto", "cuda") else 0
    count = workers or max(1, gpus)
    if threads is None and chosen.type == "cpu" and count > 1:
        threads = max(1, torch.get_num_threads() // count)
    settings = [
        WorkerSettings(model, f"cuda:{index % gpus}" if gpus else device, dtype, tile, tile_pad, threads, images)
        for index in range(count)
    ]
    limits = Limits(
        int(max_megabytes * 1e6), int(max_megapixels * 1e6), int(max_result_megapixels * 1e6), queue, timeout
    )
    app, pool = create_service(settings, limits=limits, token=token)
    try:
        with report_errors(UsageError):
            pool.start()
    except BaseException:  # Ctrl-C, for example
        pool.stop()
        raise
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        typer.echo(f"warning: anyone who reaches {host} can use this service; set {TOKEN_VARIABLE}", err=True)
    try:
        uvicorn.run(
            app,
            host=host,
            port=port,
            log_level="info",
            timeout_keep_alive=30,
            # A client that does not read its answer would otherwise keep the service from stopping.
            timeout_graceful_shutdown=math.ceil(timeout) + 30,
        )
    except SystemExit as error:  # the address is in use, for example; uvicorn has printed why
        if error.code:
            print_error(f"the service could not listen on {host}:{port}")
        raise
    finally:
        pool.stop()
