"""What `savl degrade` does with its options: the pipeline, the names of the outputs, and the loop over files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from savl.cli import ctrl_c
from savl.cli.jobs import Job, Naming, output_is_file, plan_jobs, refuse_existing, spell_suffix
from savl.cli.loop import check_arguments, run_jobs
from savl.cli.results import ResultRule, leave_out_results
from savl.cli.sources import UsageMistake, find_sources
from savl.cli.standard import STANDARD, StandardOutput, read_standard_input
from savl.degradation import Degradation, DegradationConfig, DegradationUnavailable
from savl.degradation.config import load_degradation_config
from savl.degradation.degrade_file import degrade_file
from savl.images.errors import ImageFileError
from savl.images.format import FORMATS, JPEG, PNG, format_of_suffix
from savl.images.result_mark import DEGRADED, SEVERITY_MAP
from savl.images.write import ProcessedFile
from savl.inference.enlarge import OnTile
from savl.inference.process_settings import keep_freed_memory


@dataclass(frozen=True)
class Settings:
    """What the options of `savl degrade` say, as typed; see its help."""

    output: str | None
    config: Path | None
    seed: int
    scale: int
    spatial: bool
    suffix: str | None
    format: str | None
    overwrite: bool
    recursive: bool
    exclude: tuple[str, ...]
    include_results: bool
    page: int | None
    severity_map: bool
    debug: bool
    started: float  # when the command began, by time.monotonic


def degrade_batch(arguments: Sequence[str], settings: Settings) -> bool:
    """Degrade everything the arguments stand for.

    Returns:
        Whether every file was degraded or kept.

    Raises:
        UsageMistake: the command makes no sense as a whole; nothing was written.
        KeyboardInterrupt: Ctrl-C; the file in work was left as it was before.
    """
    check_arguments(arguments, settings.output)
    to_file = output_is_file(settings.output, arguments)
    if settings.output != STANDARD:
        return _degrade(arguments, settings, to_file=to_file, standard_output=None)
    if settings.severity_map:
        raise UsageMistake("--severity-map makes more files, and -o - writes one picture; name a file or a folder")
    with ctrl_c.cleaning_up(), StandardOutput() as standard_output:
        return _degrade(arguments, settings, to_file=to_file, standard_output=standard_output)


def _degrade(
    arguments: Sequence[str], settings: Settings, *, to_file: bool, standard_output: StandardOutput | None
) -> bool:
    output = None if settings.output is None else Path(settings.output)
    if to_file and output is not None and format_of_suffix(output) is JPEG:
        raise UsageMistake(f"-o {output}: JPEG would compress the result once more; name a .png, .webp or .tiff")
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
        output = standard_output.file((chosen or PNG).suffixes[0])
    if not settings.include_results:
        suffix = spell_suffix(settings.suffix, beside=False, default="")
        found = leave_out_results(
            found, ResultRule(frozenset([DEGRADED, SEVERITY_MAP]), (r"(?:_p\d+)?_lr", re.escape(suffix)))
        )
    config = DegradationConfig() if settings.config is None else load_degradation(settings.config)
    if settings.spatial:
        config = replace(config, spatial=replace(config.spatial, probability=1.0))
    try:
        degradation = Degradation(config, settings.scale)
    except DegradationUnavailable as error:
        raise UsageMistake(str(error)) from error
    suffix = spell_suffix(settings.suffix, beside=output is None, default="lr")
    if settings.page is not None and settings.suffix is None:
        suffix = f"_p{settings.page}{suffix}"  # each page of a file has a result of its own
    naming = Naming(
        output=output,
        suffix=suffix,
        format=chosen if to_file else chosen or PNG,
        severity=(".png", ".npy") if settings.severity_map else (),
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
        wanted = (job.target, *job.severity)
        missing = [path for path in wanted if path == target or path in severity]
        # What stands may be from another seed, and a picture with the map of another draw would be false.
        if len(missing) < len(wanted):
            standing = next(path for path in wanted if path not in missing)
            raise ImageFileError(
                standing, f"exists already, but not {missing[0].name}, which belongs to it; --overwrite makes them anew"
            )
        drawn, values = job.severity or (None, None)
        result = degrade_file(
            job.open(),
            job.target,
            degradation,
            seed=settings.seed,
            name=job.source,
            page=settings.page,
            image_format=job.format,
            mask_image=drawn,
            mask_array=values,
            overwrite=settings.overwrite,
            origin=job.origin(settings.page),
        )
        if standard_output is not None:
            standard_output.send(job.target)
        return result

    return run_jobs(
        found,
        plan,
        work,
        participle="degraded",
        overwrite=settings.overwrite,
        page=settings.page,
        debug=settings.debug,
        started=settings.started,
        shown_target=None if standard_output is None else "standard output",
    )


def load_degradation(path: Path) -> DegradationConfig:
    """Return the table [degradation] of a TOML file, as `load_degradation_config` does.

    Raises:
        UsageMistake: The file cannot be read, or a setting is refused.
    """
    try:
        return load_degradation_config(path)
    except OSError as error:
        raise UsageMistake(f"--config {path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, TypeError) as error:
        raise UsageMistake(f"--config {path}: {error}") from error
