"""What `savl upscale` does with its options: the network, the names of the outputs, and the loop over files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from savl.cli import ctrl_c
from savl.cli.jobs import Job, Naming, output_is_file, plan_jobs, refuse_existing, spell_suffix, written_like
from savl.cli.loop import check_arguments, in_short, run_jobs
from savl.cli.results import ResultRule, leave_out_results
from savl.cli.sources import UsageMistake, find_sources
from savl.cli.standard import STANDARD, StandardOutput, read_standard_input
from savl.images.format import FORMATS, PNG
from savl.images.result_mark import SEVERITY_MAP, UPSCALED
from savl.images.write import ProcessedFile
from savl.inference.device import checked_device
from savl.inference.enlarge import ImageUpscaler, OnTile, check_scale
from savl.inference.process_settings import keep_freed_memory
from savl.inference.upscale_file import enlarge_file
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
    exclude: tuple[str, ...]
    include_results: bool
    severity_map: bool
    page: int | None
    debug: bool
    started: float  # when the command began, by time.monotonic


def upscale_batch(arguments: Sequence[str], settings: Settings) -> bool:
    """Upscale everything the arguments stand for.

    Returns:
        Whether every file was upscaled or kept.

    Raises:
        UsageMistake: the command makes no sense as a whole; nothing was written.
        KeyboardInterrupt: Ctrl-C; the file in work was left as it was before.
    """
    check_arguments(arguments, settings.output)
    if settings.scale is not None:
        try:
            check_scale(settings.scale)
        except ValueError as error:
            raise UsageMistake(str(error)) from error
    to_file = output_is_file(settings.output, arguments)
    if settings.output != STANDARD:
        return _upscale(arguments, settings, to_file=to_file, standard_output=None)
    if settings.severity_map:
        raise UsageMistake("--severity-map makes a second file, and -o - writes one picture; name a file or a folder")
    with ctrl_c.cleaning_up(), StandardOutput() as standard_output:
        return _upscale(arguments, settings, to_file=to_file, standard_output=standard_output)


def _upscale(
    arguments: Sequence[str], settings: Settings, *, to_file: bool, standard_output: StandardOutput | None
) -> bool:
    output = None if settings.output is None else Path(settings.output)
    if to_file and output is not None and standard_output is None:
        refuse_existing(output, Path(arguments[0]), overwrite=settings.overwrite)
    found = find_sources(
        arguments,
        recursive=settings.recursive,
        output=None if to_file else output,
        exclude=settings.exclude,
        standard_input=read_standard_input() if STANDARD in arguments else None,
    )
    chosen = next((image_format for image_format in FORMATS if image_format.name == settings.format), None)
    if standard_output is not None:
        output = standard_output.file((chosen or written_like(found.sources[0]) or PNG).suffixes[0])
    if not settings.include_results:
        suffix = spell_suffix(settings.suffix, beside=False, default="")
        found = leave_out_results(
            found, ResultRule(frozenset([UPSCALED, SEVERITY_MAP]), (r"(?:_p\d+)?_x\d+(?:\.\d+)?", re.escape(suffix)))
        )
    upscaler = _load(settings)
    scale = upscaler.scale if settings.scale is None else settings.scale
    suffix = spell_suffix(settings.suffix, beside=output is None, default=f"x{scale:g}")
    if settings.page is not None and settings.suffix is None:
        suffix = f"_p{settings.page}{suffix}"  # each page of a file has a result of its own
    naming = Naming(
        output=output,
        suffix=suffix,
        format=chosen,
        severity=(".png",) if settings.severity_map else (),
    )
    plan = plan_jobs(
        found.sources,
        naming,
        to_file=to_file,
        overwrite=settings.overwrite,
        include_results=settings.include_results,
    )
    keep_freed_memory()

    def work(job: Job, target: Path | None, severity: tuple[Path, ...], on_tile: OnTile) -> ProcessedFile:
        result = enlarge_file(
            job.open(),
            target,
            upscaler,
            image_format=job.format,
            scale=settings.scale,
            quality=settings.quality,
            severity_map=severity[0] if severity else None,
            overwrite=settings.overwrite,
            page=settings.page,
            origin=job.origin(settings.page),
            on_tile=on_tile,
        )
        if standard_output is not None:
            standard_output.send(job.target)
        return result

    return run_jobs(
        found,
        plan,
        work,
        participle="upscaled",
        overwrite=settings.overwrite,
        page=settings.page,
        debug=settings.debug,
        started=settings.started,
        shown_target=None if standard_output is None else "standard output",
    )


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
        reason = in_short(error)
        raise UsageMistake(reason if settings.model in reason else f"model {settings.model}: {reason}") from error
