"""Which file each picture is written to, decided and checked for all of them before the first is started."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import BinaryIO

from savl.cli.sources import Source, UsageMistake, same_file_key
from savl.cli.standard import STANDARD
from savl.images.format import FORMATS, HEAD_BYTES, PNG, ImageFormat, format_of_content, format_of_suffix
from savl.images.result_mark import digest_origin


@dataclass(frozen=True)
class Job:
    """One picture's way.

    Attributes:
        source: the file to read.
        target: the file to write the result to.
        format: the format of `target`.
        severity: the files to write the severity map to, in the order of `Naming.severity`.
        content: what to read in place of `source`, which then is the name of standard input.
        exact: the user named `target` itself.
        otherwise: the same under another name, for where a result of another picture stands at `target`; None where
            there is no other name.
    """

    source: Path
    target: Path
    format: ImageFormat
    severity: tuple[Path, ...]
    content: bytes | None = None
    exact: bool = False
    otherwise: Job | None = None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files to write."""
        return (self.target, *self.severity)

    @property
    def missing(self) -> bool:
        """Whether there is nothing to read."""
        return self.content is None and not os.path.exists(self.source)

    def origin(self, page: int | None) -> str | None:
        """Return the digest of what is read, for the marks of the outputs; see `savl.images.result_mark`."""
        return digest_origin(self.source if self.content is None else self.content, page)

    def open(self) -> Path | BinaryIO:
        """Return what to read, for `savl.images.read.read_image`."""
        if self.content is None:
            return self.source
        stream = io.BytesIO(self.content)
        stream.name = str(self.source)  # what messages call it
        return stream


@dataclass(frozen=True)
class Naming:
    """How outputs are named.

    Attributes:
        output: what `-o` said; None writes beside each input.
        suffix: appended to the name, see `spell_suffix`.
        format: the format to write; None keeps that of the input's suffix (PNG where that says nothing).
        severity: endings of the files that a severity map is written to; none for no map.
    """

    output: Path | None
    suffix: str
    format: ImageFormat | None
    severity: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        jobs: the files to do, no two of them with an output in common.
        left_out: inputs that are what another input is written to.
        refused: inputs whose outputs other inputs have already, or which they are themselves, each with the reason.
    """

    jobs: tuple[Job, ...]
    left_out: tuple[Path, ...]
    refused: dict[Path, str]


def spell_suffix(suffix: str | None, *, beside: bool, default: str) -> str:
    """Return the text between a name and its ending: `photo` + `_x4` + `.png`.

    Args:
        suffix: what the user asked for, joined by an underscore (`out` gives `photo_out`) unless it brings
            its own `_`, `-` or `.`; "" for none. None is `default` beside the input and none in an output
            folder.
        beside: outputs are written beside their inputs.
        default: what marks results beside their inputs, such as `x4`.

    Raises:
        UsageMistake: the suffix holds a slash or backslash, and would lead to another folder.
    """
    if suffix is None:
        return f"_{default}" if beside else ""
    if "/" in suffix or "\\" in suffix:
        raise UsageMistake(f"--suffix {suffix} holds a folder separator; it is added to file names, -o names a folder")
    return f"_{suffix}" if suffix[:1].isalnum() else suffix


def output_is_file(output: str | None, arguments: Sequence[str]) -> bool:
    """Return whether `-o` names the output file itself rather than a folder.

    It does when there is one argument, that argument is no folder and no glob, and OUT has an image ending or is `-`.

    Raises:
        UsageMistake: OUT has an image ending or is `-` but there may be several inputs; it can be neither a file of a
            known format nor a folder; or it is left out, and an input is `-`.
    """
    first = Path(arguments[0])
    one_file = len(arguments) == 1 and (
        arguments[0] == STANDARD or (not os.path.isdir(first) and (os.path.exists(first) or not has_magic(str(first))))
    )
    if output == STANDARD:
        if not one_file:
            raise UsageMistake("-o - writes one picture to standard output, but there may be several inputs")
        return True
    if output is None and STANDARD in arguments:
        raise UsageMistake("- has no place of its own to write beside: -o - is standard output, -o FILE a file")
    if output is None or os.path.isdir(output):
        return False
    folder = output.endswith(("/", os.sep))
    known = not folder and format_of_suffix(Path(output)) is not None
    if known and not one_file:
        raise UsageMistake(f"-o {output} names a file, but there may be several inputs: name a folder")
    if not known and os.path.exists(Path(output)):
        raise UsageMistake(f"-o {output} is a file and not a folder")
    if one_file and not folder and not known and Path(output).suffix:
        endings = " ".join(image_format.suffixes[0] for image_format in FORMATS)
        raise UsageMistake(
            f"-o {output}: {Path(output).suffix} is no format savl writes ({endings}); "
            "end the name with / if it is a folder"
        )
    return known


def refuse_existing(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output file that stands already; it may be of other settings, so to keep it would be no success.

    Args:
        output: the file that `-o` names.
        source: the input; an output that is the input itself is for `plan_jobs` to refuse.
        overwrite: replace existing files.

    Raises:
        UsageMistake: `output` exists and `overwrite` is False.
    """
    if not overwrite and os.path.isfile(output) and same_file_key(output) != same_file_key(source):
        raise UsageMistake(f"-o {output} exists already; --overwrite replaces it")


def plan_jobs(
    sources: Sequence[Source], naming: Naming, *, to_file: bool, overwrite: bool, include_results: bool = False
) -> Plan:
    """Pair every input with its output.

    Where two inputs of one folder differ in their endings only and would be written to one file, the ending becomes
    part of the name: with `--format png`, a.png and a.jpg give a_x4.png and a.jpg_x4.png. Of others that would be
    written to one file, the first is done and the rest are refused, as is an input that would be written over itself or
    over another one, unless its whole name gives it another output.

    Raises:
        UsageMistake: every input is refused, an input would be overwritten by another one, or `-o` and `--format`
            contradict each other.
    """
    jobs = _with_names_of_their_own([_job(source, naming, to_file) for source in sources], naming)
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
            kept.append(job)  # as it is: the other input's result stands already
        elif source.named and overwrite:
            raise UsageMistake(
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
            kept.append(replace(job, otherwise=other))
        elif other is not None:
            kept.append(other)
        else:
            refused[job.source] = f"{blocked[job.source]}, which is an input too, stands in the place of its result"
    if refused and not kept:
        path, reason = next(iter(refused.items()))
        raise UsageMistake(f"{path} {reason}")
    return Plan(tuple(kept), tuple(left_out), refused)


def _under_another_name(job: Job, naming: Naming, taken: set[str]) -> Job | None:
    """The job under the input's whole name, or None; the paths in `taken` are no choice, and grow by the new ones."""
    other = job if job.exact else _with_ending(job, naming)
    outputs = {same_file_key(path) for path in other.outputs}
    if other.target == job.target or outputs & taken:
        return None
    taken |= outputs
    return other


def _with_names_of_their_own(jobs: list[Job], naming: Naming) -> list[Job]:
    """The jobs, those with outputs in common told apart by the endings of their inputs and of their outputs."""
    targets = Counter(same_file_key(job.target) for job in jobs)
    jobs = [
        _with_ending(job, naming) if targets[same_file_key(job.target)] > 1 and job.source.suffix else job
        for job in jobs
    ]
    by_target: dict[str, Job] = {}
    for job in jobs:
        by_target.setdefault(same_file_key(job.target), job)
    maps = Counter(same_file_key(path) for job in by_target.values() for path in job.severity)
    return [
        # Of a.png and a.jpg in one folder: a.png_severity.png and a.jpg_severity.png.
        replace(job, severity=_severity(job.target, job.target.name, naming))
        if any(maps[same_file_key(path)] > 1 for path in job.severity)
        else job
        for job in jobs
    ]


def _with_ending(job: Job, naming: Naming) -> Job:
    """The job under the input's whole name, a.jpg_x4.png, unless the output has the input's ending anyway."""
    if job.source.suffix == job.target.suffix:
        return job
    target = job.target.with_name(f"{job.source.name}{naming.suffix}{job.target.suffix}")
    return replace(job, target=target, severity=_severity(target, target.stem, naming))


def _job(source: Source, naming: Naming, to_file: bool) -> Job:
    if to_file:
        assert naming.output is not None
        target = naming.output
        image_format = format_of_suffix(target)
        assert image_format is not None
        if naming.format not in (None, image_format):
            assert naming.format is not None
            raise UsageMistake(f"-o {target} and --format {naming.format.name} contradict each other")
    else:
        own_format = written_like(source)
        image_format = naming.format or own_format or PNG
        # The input's own spelling is kept where it says the right thing: IMG_1.JPG stays .JPG.
        keeps_ending = own_format is image_format and source.content is None
        ending = source.path.suffix if keeps_ending else image_format.suffixes[0]
        folder = source.path.parent if naming.output is None else naming.output / source.folder
        target = folder / f"{source.path.stem}{naming.suffix}{ending}"
    severity = _severity(target, target.stem, naming)
    return Job(source.path, target, image_format, severity, source.content, exact=to_file)


def written_like(source: Source) -> ImageFormat | None:
    """Return the format of an input, by its name or what standard input holds, if savl can write it."""
    if source.content is None:
        return format_of_suffix(source.path)
    found = format_of_content(source.content[:HEAD_BYTES])
    return found if found in FORMATS else None


def _severity(target: Path, name: str, naming: Naming) -> tuple[Path, ...]:
    return tuple(target.with_name(f"{name}_severity{ending}") for ending in naming.severity)
