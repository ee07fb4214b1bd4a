"""Output files: decides for all images which file each is written to, before the first one is processed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path

from savl.cli.sources import Source, same_file_key
from savl.cli.streams import STANDARD
from savl.command_line import UsageError
from savl.images.format import FORMATS, HEAD_BYTES, PNG, ImageFormat, format_of_content, format_of_suffix
from savl.images.job import Job
from savl.video.container import CONTAINERS, container_of_suffix, result_suffix


@dataclass(frozen=True)
class Naming:
    """Rules for the names of outputs.

    Attributes:
        output: Value of `-o`; None writes beside each input.
        suffix: Text that is appended to the name, see `name_suffix`.
        format: Format to write; None keeps that of the input's suffix (PNG if savl cannot write it).
        maps: What the names of maps have after the name of the result, such as "_severity.png"; empty for no map.
    """

    output: Path | None
    suffix: str
    format: ImageFormat | None
    maps: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Jobs for all inputs.

    Attributes:
        jobs: The images to process; no two of them have an output in common.
        left_out: Inputs that are outputs of other inputs.
        refused: Inputs whose outputs belong to other inputs or are inputs themselves, each with the reason.
    """

    jobs: tuple[Job, ...]
    left_out: tuple[Path, ...]
    refused: dict[Path, str]


def name_suffix(suffix: str | None, *, beside: bool, default: str) -> str:
    """Return the text between a name and its file extension: `photo` + `_x4` + `.png`.

    Args:
        suffix: Value of `--suffix`, joined by an underscore (`out` gives `photo_out`) unless it begins with `_`, `-` or
            `.`; "" for none. None means `default` if outputs are written beside inputs, and no suffix otherwise.
        beside: Whether outputs are written beside their inputs.
        default: Suffix of results beside their inputs, such as `x4`.

    Raises:
        UsageError: The suffix contains a slash or backslash, and would lead to another folder.
    """
    if suffix is None:
        return f"_{default}" if beside else ""
    if "/" in suffix or "\\" in suffix:
        raise UsageError(f"--suffix must not contain a slash or backslash, got {suffix}; use -o to choose the folder")
    return f"_{suffix}" if suffix[:1].isalnum() else suffix


def output_is_file(output: str | None, arguments: Sequence[str], *, videos: bool = False) -> bool:
    """Return whether `-o` names the output file itself rather than a folder.

    It does if there is one argument, that argument is neither a folder nor a glob, and OUT has the suffix of an image,
    or of a video if the command processes `videos`, or is `-`.

    Raises:
        UsageError: OUT has the suffix of an image or is `-`, but there may be several inputs; it can be neither a file
            of a known format nor a folder; or it is missing, and an input is `-`.
    """
    first = Path(arguments[0])
    one_file = len(arguments) == 1 and (
        arguments[0] == STANDARD or (not os.path.isdir(first) and (os.path.exists(first) or not has_magic(str(first))))
    )
    if output == STANDARD:
        if not one_file:
            raise UsageError("-o - writes one image to standard output, but there may be several inputs")
        return True
    if output is None and STANDARD in arguments:
        raise UsageError("- is standard input, so -o is required: -o - writes to standard output, -o FILE to a file")
    if output is None or os.path.isdir(output):
        return False
    folder = output.endswith(("/", os.sep))
    is_video = videos and container_of_suffix(Path(output)) is not None
    known = not folder and (format_of_suffix(Path(output)) is not None or is_video)
    if known and not one_file:
        raise UsageError(f"-o {output} names a file, but there may be several inputs: name a folder")
    if not known and os.path.exists(Path(output)):
        raise UsageError(f"-o {output} must be a folder, but it is a file")
    if one_file and not folder and not known and Path(output).suffix:
        formats = (*FORMATS, *CONTAINERS) if videos else FORMATS
        endings = " ".join(each.suffixes[0] for each in formats)
        raise UsageError(
            f"-o {output}: {Path(output).suffix} is not a format that savl writes ({endings}); "
            "end the name with / if it is a folder"
        )
    return known


def refuse_existing(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an existing output file, because it may have been made with other settings than those of this command.

    Args:
        output: The file that `-o` names.
        source: The input. An output that is the input itself is refused by `plan_jobs`.
        overwrite: Replace existing files.

    Raises:
        UsageError: `output` exists and `overwrite` is False.
    """
    if not overwrite and os.path.isfile(output) and same_file_key(output) != same_file_key(source):
        raise UsageError(f"-o {output} exists already; --overwrite replaces it")


def plan_jobs(
    sources: Sequence[Source], naming: Naming, *, to_file: bool, overwrite: bool, include_results: bool = False
) -> Plan:
    """Assign an output to every input.

    If two inputs of one folder differ only in their extensions and would be written to one file, the extension becomes
    part of the name: with `--format png`, a.png and a.jpg give a_x4.png and a.jpg_x4.png. Of other inputs that would be
    written to one file, the first is processed and the rest are refused. An input that would be written over itself or
    over another input is refused too, unless its whole name gives it another output.

    Raises:
        UsageError: Every input is refused, an input would be overwritten by another one, or `-o` and `--format`
            contradict each other.
    """
    jobs = _with_distinct_names([_job(source, naming, to_file) for source in sources], naming)
    by_target: dict[str, Job] = {}
    refused: dict[Path, str] = {}
    for job in jobs:
        outputs = {same_file_key(path): path for path in job.outputs}
        clash = next((key for key in outputs if key in by_target), None)
        if clash is None:
            by_target |= dict.fromkeys(outputs, job)
        else:
            refused[job.source] = (
                f"would be written to {outputs[clash]}, as {by_target[clash].source} is; "
                "do it in another run, into another folder"
            )
    left_out = []
    kept = []
    blocked: dict[Path, Path] = {}
    for source, job in zip(sources, jobs, strict=True):
        writer = by_target.get(same_file_key(source.path))
        if source.path in refused:
            continue
        if writer is None:
            kept.append(job)
        elif writer is job:
            refused[source.path] = "would be written over itself; choose another -o, or --suffix"
        elif include_results and not overwrite and os.path.isfile(source.path):
            kept.append(job)  # The result of the other input exists already and is kept.
        elif source.named and overwrite:
            raise UsageError(
                f"{writer.source} would be written over {source.path}, which is an input too; "
                "choose another -o, or --suffix"
            )
        elif include_results or not os.path.isfile(source.path):
            left_out.append(source.path)
        else:
            kept.append(job)
            blocked[writer.source] = source.path
    taken = {same_file_key(source.path) for source in sources}
    taken |= {same_file_key(path) for job in jobs for path in job.outputs}
    jobs, kept = kept, []
    for job in jobs:
        other = _under_another_name(job, naming, taken)
        if job.source not in blocked:
            kept.append(replace(job, alternative=other))
        elif other is not None:
            kept.append(other)
        else:
            refused[job.source] = f"would be written to {blocked[job.source]}, which is an input too"
    if refused and not kept:
        path, reason = next(iter(refused.items()))
        raise UsageError(f"{path} {reason}")
    return Plan(tuple(kept), tuple(left_out), refused)


def _under_another_name(job: Job, naming: Naming, taken: set[str]) -> Job | None:
    """Return the job with the input's whole name in its target, or None if that is in `taken`, to which it is added."""
    other = job if job.exact else _with_ending(job, naming)
    outputs = {same_file_key(path) for path in other.outputs}
    if other.target == job.target or outputs & taken:
        return None
    taken |= outputs
    return other


def _with_distinct_names(jobs: list[Job], naming: Naming) -> list[Job]:
    """Return the jobs, those with outputs in common distinguished by the extensions of their inputs and outputs."""
    targets = Counter(same_file_key(job.target) for job in jobs)
    jobs = [
        _with_ending(job, naming) if targets[same_file_key(job.target)] > 1 and job.source.suffix else job
        for job in jobs
    ]
    by_target: dict[str, Job] = {}
    for job in jobs:
        by_target.setdefault(same_file_key(job.target), job)
    maps = Counter(same_file_key(path) for job in by_target.values() for path in job.maps)
    return [
        # For a.png and a.jpg in one folder: a.png_severity.png and a.jpg_severity.png.
        replace(job, maps=_maps(job.target, job.target.name, naming))
        if any(maps[same_file_key(path)] > 1 for path in job.maps)
        else job
        for job in jobs
    ]


def _with_ending(job: Job, naming: Naming) -> Job:
    """Return the job with the input's whole name, a.jpg_x4.png, unless the output has the input's extension anyway."""
    if job.source.suffix == job.target.suffix:
        return job
    target = job.target.with_name(f"{job.source.name}{naming.suffix}{job.target.suffix}")
    return replace(job, target=target, maps=_maps(target, target.stem, naming))


def _job(source: Source, naming: Naming, to_file: bool) -> Job:
    if source.is_video:
        return _video_job(source, naming, to_file)
    if to_file:
        assert naming.output is not None
        target = naming.output
        if container_of_suffix(target) is not None:
            raise UsageError(f"-o {target} is a video, but {source.path} is an image")
        image_format = format_of_suffix(target)
        assert image_format is not None
        if naming.format not in (None, image_format):
            assert naming.format is not None
            raise UsageError(f"-o {target} and --format {naming.format.name} contradict each other")
    else:
        own_format = format_of_source(source)
        image_format = naming.format or own_format or PNG
        # The spelling of the input's extension is kept if the format stays: IMG_1.JPG gives .JPG.
        keeps_ending = own_format is image_format and source.content is None
        ending = source.path.suffix if keeps_ending else image_format.suffixes[0]
        folder = source.path.parent if naming.output is None else naming.output / source.folder
        target = folder / f"{source.path.stem}{naming.suffix}{ending}"
    maps = _maps(target, target.stem, naming)
    return Job(source.path, target, image_format, maps, source.content, exact=to_file)


def _video_job(source: Source, naming: Naming, to_file: bool) -> Job:
    if to_file:
        assert naming.output is not None
        if container_of_suffix(naming.output) is None:
            endings = " ".join(container.suffixes[0] for container in CONTAINERS)
            raise UsageError(f"-o {naming.output}: {source.path} is a video, whose result ends in one of {endings}")
        return Job(source.path, naming.output, None, (), exact=True)
    folder = source.path.parent if naming.output is None else naming.output / source.folder
    target = folder / f"{source.path.stem}{naming.suffix}{result_suffix(source.path)}"
    return Job(source.path, target, None, ())


def format_of_source(source: Source) -> ImageFormat | None:
    """Return the format of an input, by its name or the content of standard input, if savl can write it."""
    if source.content is None:
        return format_of_suffix(source.path)
    found = format_of_content(source.content[:HEAD_BYTES])
    return found if found in FORMATS else None


def _maps(target: Path, name: str, naming: Naming) -> tuple[Path, ...]:
    return tuple(target.with_name(f"{name}{ending}") for ending in naming.maps)
