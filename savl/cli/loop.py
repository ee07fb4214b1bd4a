"""The loop over files behind `savl upscale` and `savl degrade`. One file's trouble never stops the others."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from savl.cli.jobs import Job, Plan
from savl.cli.report import Report
from savl.cli.sources import Found, UsageMistake
from savl.images.errors import ImageFileError
from savl.images.processed_file import ProcessedFile
from savl.inference.enlarge import OnTile


class Work(Protocol):
    """What is done to every picture."""

    def __call__(self, job: Job, target: Path | None, severity: tuple[Path, ...], on_tile: OnTile) -> ProcessedFile:
        """Does it.

        Args:
            job: the picture's way.
            target: `job.target`, or None where it is to be kept as it is.
            severity: those of `job.severity` that are to be written.
            on_tile: called with (tiles done, tiles in all).
        """


def check_arguments(arguments: Sequence[str], output: str | None) -> None:
    """Refuses empty arguments, which a shell makes of unset variables.

    Raises:
        UsageMistake: an input or the output is the empty string.
    """
    if "" in arguments:
        raise UsageMistake(f"IN number {arguments.index('') + 1} is empty; name a picture, a folder or a glob")
    if output == "":
        raise UsageMistake("-o is empty; name a file or a folder, or leave it out to write beside the inputs")


def run_jobs(found: Found, plan: Plan, work: Work, *, participle: str, overwrite: bool, debug: bool) -> bool:
    """Works through a plan, and reports.

    Args:
        found: what the arguments stood for.
        plan: what is made of it.
        work: what is done to each picture.
        participle: what it is called, such as "upscaled".
        overwrite: replace existing outputs; they are kept otherwise.
        debug: let exceptions through.

    Returns:
        Whether every file was done or kept.

    Raises:
        KeyboardInterrupt: Ctrl-C; the file in work was left as it was before.
    """
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with Report(len(found.unreadable) + len(plan.jobs), participle) as report:
            for path, reason in found.unreadable.items():
                report.fail(path, reason)
            for path in plan.left_out:
                report.note(path, f"left out, because it is what another input is {participle} to")
            try:
                for job in plan.jobs:
                    _run_job(job, work, report, overwrite, debug)
            except KeyboardInterrupt:
                report.interrupted()
                raise
            report.summary()
            return not report.failed
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_job(job: Job, work: Work, report: Report, overwrite: bool, debug: bool) -> None:
    def due(path: Path) -> bool:
        return overwrite or not os.path.isfile(path)

    start = time.monotonic()
    try:
        target = job.target if due(job.target) else None
        severity = tuple(filter(due, job.severity))
        # A missing input is told as missing, even where its output stands from an earlier day.
        if target is None and not severity and os.path.exists(job.source):
            report.kept(job.source, job.target)
            return
        report.begin(job.source)
        result = work(job, target, severity, report.on_tile)
    except Exception as error:
        if debug:
            raise
        # Beside the input's name, its own trouble needs no second naming; the output's does.
        own = error.reason if isinstance(error, ImageFileError) and error.path == str(job.source) else None
        report.fail(job.source, own or in_short(error))
        return
    sizes = f"{result.old_size[0]}x{result.old_size[1]} -> {result.new_size[0]}x{result.new_size[1]}"
    for note in result.notes:
        report.note(job.source, note)
    written = target or (severity[0] if severity else job.target)
    report.done(job.source, written, sizes, time.monotonic() - start)


def in_short(error: Exception) -> str:
    """An exception as one line for people; its type is told where its text alone may not make sense."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (ImageFileError, FileNotFoundError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _terminate(number: int, frame: FrameType | None) -> None:
    """Ends on SIGTERM like on Ctrl-C: through every `finally`, so that no partial file stays."""
    sys.exit(128 + number)
