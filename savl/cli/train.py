"""`savl train`: run or resume a training from a TOML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from savl.cli import options
from savl.command_line import report_errors
from savl.interrupts import raise_on_interrupt
from savl.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from savl.training import Trainer

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl train configs/savl_tiny.toml --hr photographs/",
        "savl train configs/savl_tiny.toml --hr photographs/ -o runs/mine   [dim]the same command resumes it[/dim]",
        "savl train configs/savl_tiny.toml --hr photographs/ --set objective.beta=1e-4 --set run.steps=2000",
        "savl train configs/savl_tiny.toml --hr photographs/ --set run.minutes=60   [dim]no longer than an hour[/dim]",
        "savl train configs/base_stage1_pieces.toml --hr photographs/ --stop-after 8   [dim]in pieces[/dim]",
        "savl train configs/savl_tiny.toml --lr RealSR/LR --hr RealSR/HR   [dim]real pairs[/dim]",
        "savl train configs/savl_tiny.toml --lr RealSR/LR --hr RealSR/HR --set pairs.share=0.3 "
        """--set 'data.hr=["photographs/"]'   [dim]three of ten patches from real pairs[/dim]""",
        "torchrun --nproc-per-node 4 -m savl train configs/base_stage1.toml --hr photographs/   [dim]4 GPUs[/dim]",
    ]
)

LISTED = 20
"""Largest number of unsuitable pairs whose names are printed."""


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file; configs/ contains those of the shipped weights.")
    ],
    hr: Annotated[
        list[Path] | None,
        typer.Option(
            "--hr",
            metavar="FOLDER",
            help="High-resolution photographs to degrade, with subfolders; can be repeated. With --lr, the originals "
            "of the images in --lr.",
        ),
    ] = None,
    lr: Annotated[
        list[Path] | None,
        typer.Option(
            "--lr",
            metavar="FOLDER",
            help="Low-resolution images of real pairs; can be repeated. Each needs an --hr, in the same order, with "
            "the same file names apart from a suffix.",
        ),
    ] = None,
    include_results: options.IncludeResults = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for checkpoint, log and weights (run.output)."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Length of the run (run.steps).")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.NAME=VALUE", help="Change a setting of the file; can be repeated."),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(
            "--stop-after",
            metavar="MINUTES",
            min=0,
            help="Stop with a checkpoint this many minutes after the start of the command; the same command continues "
            "the run. At least one step is done.",
        ),
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Train a network, or resume a run from the checkpoint in its folder.

    A run can be killed at any time; the same command resumes it from its last checkpoint. With --stop-after it trains
    in pieces.

    The photographs in --hr are degraded at random. With --lr and --hr, the network learns from real pairs instead. If
    pairs.share is below 1 (--set), it also learns from the photographs in data.hr. Unsuitable pairs are skipped and
    listed.

    The averaged weights are written to model.safetensors, which `savl upscale --model` reads. log.jsonl and
    tensorboard/ contain the losses.
    """
    import os
    from dataclasses import replace
    from time import monotonic

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from savl.inference.process_settings import use_threads
    from savl.training import Trainer, load_config

    deadline = None if stop_after is None else monotonic() + 60 * stop_after
    use_threads(threads)
    # Under torchrun only the first process prints messages; every process prints its errors.
    first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not first,
    )
    with report_errors(ValueError, FileNotFoundError):
        with _warnings_in_one_line(console if first else None):
            settings = load_config(config, changes or ())
        run = settings.run
        run = replace(run, output=str(output or run.output), steps=steps or run.steps)
        data, pairs = settings.data, settings.pairs
        if lr:
            if len(lr) != len(hr or ()):
                raise ValueError(f"each --lr needs an --hr, got {len(lr)} --lr and {len(hr or ())} --hr")
            pairs = replace(pairs, lr=tuple(map(str, lr)), hr=tuple(map(str, hr or ())))
        elif hr:
            data = replace(data, hr=tuple(map(str, hr)))
        data = replace(data, include_results=include_results or data.include_results)
        with raise_on_interrupt(), bar:
            decoding = bar.add_task("decoding images", total=None, note="")
            with _cleaning_up():
                trainer = Trainer(
                    replace(settings, run=run, data=data, pairs=pairs),
                    on_image=lambda done, total: bar.update(decoding, completed=done, total=total),
                )
            bar.remove_task(decoding)
            if trainer.step and first:
                console.print(f"resuming {escape(printable(run.output))} at step {trainer.step}")
            if trainer.excluded_results and first:
                console.print(
                    f"images skipped because savl made them: {trainer.excluded_results}; "
                    "use --include-results to include them"
                )
            if trainer.too_small and first:
                console.print(f"images skipped because they are smaller than a patch: {trainer.too_small}")
            if trainer.unsuitable_pairs and first:
                console.print(
                    f"pairs skipped because their images do not fit each other: {len(trainer.unsuitable_pairs)}"
                )
                for pair in trainer.unsuitable_pairs[:LISTED]:
                    console.print(f"  {escape(printable(pair))}", highlight=False, soft_wrap=True)
                if len(trainer.unsuitable_pairs) > LISTED:
                    console.print(f"  and {len(trainer.unsuitable_pairs) - LISTED} more")
            task = bar.add_task("training", total=trainer.expected_steps, completed=trainer.step, note="")

            def on_step(step: int, losses: dict[str, float]) -> None:
                bar.update(task, completed=step, total=trainer.expected_steps, note=_loss(losses))
                if deadline is not None and monotonic() >= deadline:
                    trainer.stop()

            weights, interrupted = _stoppable(trainer, lambda: trainer.train(on_step))
    if weights is None:
        if not interrupted:
            if first:
                console.print(
                    f"stopped after {stop_after:g} minutes, at step {trainer.step} of {trainer.expected_steps} "
                    f"({trainer.step / trainer.expected_steps:.0%}); the same command continues the run",
                    soft_wrap=True,
                )
            return
        if first:
            console.print(f"stopped after step {trainer.step}; the same command resumes it")
        raise typer.Exit(130)
    if first:
        print(weights)


@contextmanager
def _warnings_in_one_line(console: Console | None) -> Iterator[None]:
    """Print the warnings of the block to a console, each as one line; None discards them."""
    import warnings

    from rich.markup import escape

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if console is not None:
        for warning in caught:
            text = escape(printable(str(warning.message)))
            console.print(f"[yellow]warning:[/yellow] {text}", highlight=False, soft_wrap=True)


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Let SIGTERM, by which schedulers and torchrun end a process, end the block like Ctrl-C, which cleans up."""
    import signal

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _loss(losses: dict[str, float]) -> str:
    """Return the text of the progress bar: the SR loss, or the total loss if the estimator is trained alone."""
    return f"SR loss {losses['sr']:.4f}" if "sr" in losses else f"loss {losses['total']:.4f}"


def _stoppable(trainer: Trainer, train: Callable[[], Path | None]) -> tuple[Path | None, bool]:
    """Run ``train``; Ctrl-C or SIGTERM ends it after its step with a checkpoint, a second signal immediately.

    Returns:
        The result of ``train``, and whether there was a signal.
    """
    import signal

    interrupted = False

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        restore()
        trainer.stop()

    for number in signals:
        signal.signal(number, stop)
    try:
        return train(), interrupted
    finally:
        restore()
