"""The loop over files behind `savl upscale`. One file's trouble never stops the others."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from savl.cli.jobs import Job, Naming, Plan, output_is_file, plan_jobs, spell_suffix
from savl.cli.report import Report
from savl.cli.sources import Found, UsageMistake, find_sources
from savl.inference.device import checked_device
from savl.inference.enlarge import ImageUpscaler, check_scale
from savl.inference.errors import ImageFileError
from savl.inference.image_format import FORMATS
from savl.inference.memory import keep_freed_memory
from savl.inference.upscale_file import upscale_file
from savl.inference.upscale_image import as_upscaler


@dataclass(frozen=True)
class Settings:
    """What the options of `savl upscale` say, as typed; see its help."""

    output: str | None
    model: str
    tile: int | None
    tile_pad: int
    scale: float | None
    dtype: str
    device: str
    suffix: str | None
    format: str
    quality: int
    overwrite: bool
    recursive: bool
    severity_map: bool
    debug: bool


def upscale_batch(arguments: Sequence[str], settings: Settings) -> bool:
    """Upscales everything the arguments stand for.

    Returns:
        Whether every file was upscaled or kept.

    Raises:
        UsageMistake: the command makes no sense as a whole; nothing was written.
        KeyboardInterrupt: Ctrl-C; the file in work was left as it was before.
    """
    if "" in arguments:
        raise UsageMistake(f"IN number {arguments.index('') + 1} is empty; name a picture, a folder or a glob")
    if settings.output == "":
        raise UsageMistake("-o is empty; name a file or a folder, or leave it out to write beside the inputs")
    if settings.scale is not None:
        try:
            check_scale(settings.scale)
        except ValueError as error:
            raise UsageMistake(str(error)) from error
    output = None if settings.output is None else Path(settings.output)
    to_file = output_is_file(settings.output, arguments)
    found = find_sources(arguments, recursive=settings.recursive, output=None if to_file else output)
    upscaler = _load(settings)
    scale = upscaler.scale if settings.scale is None else settings.scale
    naming = Naming(
        output=output,
        suffix=spell_suffix(settings.suffix, beside=output is None, scale=scale),
        format=next((image_format for image_format in FORMATS if image_format.name == settings.format), None),
        severity_map=settings.severity_map,
    )
    plan = plan_jobs(found.sources, naming, to_file=to_file, overwrite=settings.overwrite)
    keep_freed_memory()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(found, plan, upscaler, settings)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _load(settings: Settings) -> ImageUpscaler:
    try:
        checked_device(settings.device)
    except ValueError as error:
        raise UsageMistake(str(error)) from error
    try:
        return as_upscaler(
            settings.model,
            tile=settings.tile,
            tile_pad=settings.tile_pad,
            device=settings.device,
            dtype=settings.dtype,
        )
    except Exception as error:
        if settings.debug:
            raise
        reason = _in_short(error)
        raise UsageMistake(reason if settings.model in reason else f"model {settings.model}: {reason}") from error


def _run(found: Found, plan: Plan, upscaler: ImageUpscaler, settings: Settings) -> bool:
    with Report(len(found.unreadable) + len(plan.jobs)) as report:
        for path, reason in found.unreadable.items():
            report.fail(path, reason)
        for path in plan.left_out:
            report.note(path, "left out, because it is what another input is upscaled to")
        try:
            for job in plan.jobs:
                _run_job(job, upscaler, settings, report)
        except KeyboardInterrupt:
            report.interrupted()
            raise
        report.summary()
        return not report.failed


def _run_job(job: Job, upscaler: ImageUpscaler, settings: Settings, report: Report) -> None:
    def due(path: Path | None) -> Path | None:
        return path if path is not None and (settings.overwrite or not os.path.isfile(path)) else None

    start = time.monotonic()
    try:
        target, severity = due(job.target), due(job.severity)
        # A missing input is told as missing, even where its output stands from an earlier day.
        if target is None and severity is None and os.path.exists(job.source):
            report.kept(job.source, job.target)
            return
        report.begin(job.source)
        result = upscale_file(
            job.source,
            target,
            upscaler,
            image_format=job.format,
            scale=settings.scale,
            quality=settings.quality,
            severity_map=severity,
            overwrite=settings.overwrite,
            on_tile=report.on_tile,
        )
    except Exception as error:
        if settings.debug:
            raise
        # Beside the input's name, its own trouble needs no second naming; the output's does.
        own = error.reason if isinstance(error, ImageFileError) and error.path == str(job.source) else None
        report.fail(job.source, own or _in_short(error))
        return
    sizes = f"{result.old_size[0]}x{result.old_size[1]} -> {result.new_size[0]}x{result.new_size[1]}"
    for note in result.notes:
        report.note(job.source, note)
    report.done(job.source, target or severity or job.target, sizes, time.monotonic() - start)


def _in_short(error: Exception) -> str:
    """An exception as one line for people; its type is told where its text alone may not make sense."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (ImageFileError, FileNotFoundError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _terminate(number: int, frame: FrameType | None) -> None:
    """Ends on SIGTERM like on Ctrl-C: through every `finally`, so that no partial file stays."""
    sys.exit(128 + number)
