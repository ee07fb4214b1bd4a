"""The loop over files behind `savl upscale` and `savl degrade`. An error in one file never stops the others."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from savl.cli.jobs import Naming, Plan, format_of_source, name_suffix, output_is_file, plan_jobs, refuse_existing
from savl.cli.progress import ProgressReport
from savl.cli.results import ResultRule, remove_results, results_message
from savl.cli.sources import Found, find_sources
from savl.cli.streams import STANDARD, StandardOutput, read_standard_input
from savl.command_line import UsageError
from savl.images.format import FORMATS, JPEG, PNG, ImageFormat, format_of_suffix
from savl.images.job import Job, JobProcessor, Work, signatures_of
from savl.images.result_mark import MAP_MARKS
from savl.images.write import ProcessedFile
from savl.inference.enlarge import OnTile
from savl.inference.process_settings import keep_freed_memory
from savl.interrupts import exit_on_termination, mark_reported, raise_if_interrupted, raise_on_interrupt
from savl.video.av_import import import_av

_WAIT = 0.2  # seconds between two attempts to get the files that other processes have locked


@dataclass(frozen=True)
class Operation:
    """Properties by which the commands that process files differ.

    Attributes:
        participle: Participle of the command's verb, such as "upscaled", for messages; also the mark of the results.
        result_suffix: Regular expression for the default suffix of results.
        lossless: Whether results must be lossless: PNG is the default format, and JPEG is refused.
        map_endings: What the names of an image's maps have after the name of its result, such as "_severity.png"; empty
            for no map.
        prepare: Loads what the work needs, after the arguments have been checked. Returns the default suffix of the
            results, such as "x4", and the work.
        make_loop: Makes the loop that processes the jobs, which then does not call the work; None for the loop of this
            process.
        videos: Whether the work processes videos too.
        on_report: Called with the report of the run before the first file.
    """

    participle: str
    result_suffix: str
    lossless: bool
    map_endings: tuple[str, ...]
    prepare: Callable[[], tuple[str, Work]]
    make_loop: Callable[[Sequence[Job]], Loop] | None = None
    videos: bool = False
    on_report: Callable[[ProgressReport], None] | None = None


class Loop(Protocol):
    """Processes jobs."""

    def run(self, report: ProgressReport) -> None:
        """Process the jobs, and report what becomes of each.

        Raises:
            KeyboardInterrupt: Ctrl-C; the outputs of unfinished jobs are as they were before.
        """


def process_files(
    operation: Operation,
    arguments: Sequence[str],
    output: str | None,
    *,
    recursive: bool,
    exclude: Sequence[str] | None,
    include_results: bool,
    suffix: str | None,
    format_name: str | None,
    overwrite: bool,
    page: int | None,
    debug: bool,
    started: float,
) -> bool:
    """Apply an operation to all images that the arguments of the command line select.

    `started` is the time at which the command started. The other arguments are options of the command line, see
    `savl.cli.options` and the help of the commands.

    Returns:
        Whether every file was processed or kept.

    Raises:
        UsageError: The command line is wrong as a whole; nothing was written.
        KeyboardInterrupt: Ctrl-C; the outputs of the current file are as they were before.
    """
    if "" in arguments:  # as happens when a shell expands an unset variable
        raise UsageError(f"IN number {arguments.index('') + 1} is an empty string; pass an image, a folder or a glob")
    if output == "":
        raise UsageError("-o is an empty string; pass a file or a folder, or omit -o to write beside the inputs")
    to_file = output_is_file(output, arguments, videos=operation.videos)
    with contextlib.ExitStack() as stack:
        standard_output = None
        if output == STANDARD:
            if operation.map_endings:
                option = f"--{operation.map_endings[0].split('.')[0].removeprefix('_')}-map"
                raise UsageError(f"-o - writes one image, {option} needs more files: name a file or a folder")
            stack.enter_context(raise_on_interrupt())
            standard_output = stack.enter_context(StandardOutput())
        place = None if output is None else Path(output)
        if to_file and place is not None and standard_output is None:
            if operation.lossless and format_of_suffix(place) is JPEG:
                raise UsageError(f"-o {output}: JPEG would compress the result once more; name a .png, .webp or .tiff")
            refuse_existing(place, Path(arguments[0]), overwrite=overwrite)
        found = find_sources(
            arguments,
            recursive=recursive,
            output=None if to_file else place,
            exclude=exclude or (),
            standard_input=read_standard_input() if STANDARD in arguments else None,
            videos=operation.videos,
        )
        image_format = next((each for each in FORMATS if each.name == format_name), None)
        if operation.lossless and (standard_output is not None or not to_file):
            image_format = image_format or PNG
        if standard_output is not None:
            place = standard_output.file((image_format or format_of_source(found.sources[0]) or PNG).suffixes[0])
        video = next((source.path for source in found.sources if source.is_video), None)
        if video is not None:
            _check_video_options(operation, video, output, image_format, page)
            import_av()  # before the network is loaded
        if not include_results:
            suffixes = (operation.result_suffix, re.escape(name_suffix(suffix, beside=False, default="")))
            found = remove_results(found, ResultRule(frozenset([operation.participle, *MAP_MARKS]), suffixes))
        default_suffix, work = operation.prepare()
        ending = name_suffix(suffix, beside=output is None, default=default_suffix)
        if page is not None and suffix is None:
            ending = f"_p{page}{ending}"  # Each page of a file has a result of its own.
        plan = plan_jobs(
            found.sources,
            Naming(place, ending, image_format, operation.map_endings),
            to_file=to_file,
            overwrite=overwrite,
            include_results=include_results,
        )
        keep_freed_memory()

        def work_and_send(
            job: Job, target: Path | None, maps: tuple[Path | None, ...], on_tile: OnTile
        ) -> ProcessedFile:
            result = work(job, target, maps, on_tile)
            if standard_output is not None:
                standard_output.send(job.target)
            return result

        loop: Loop
        if operation.make_loop is not None:
            loop = operation.make_loop(plan.jobs)
        else:
            loop = _Loop(
                plan.jobs,
                work_and_send,
                overwrite=overwrite,
                page=page,
                debug=debug,
                started=started,
                shown_target=None if standard_output is None else "standard output",
            )
        return _run(loop, found, plan, operation.participle, operation.on_report)


def _check_video_options(
    operation: Operation, video: Path, output: str | None, image_format: ImageFormat | None, page: int | None
) -> None:
    """Refuse options that a video cannot have.

    Raises:
        UsageError: There is one.
    """
    options = {
        "--ray": operation.make_loop is not None,
        "-o -": output == STANDARD,
        "--severity-map and --strength-map": bool(operation.map_endings),
        "--page": page is not None,
        "--format": image_format is not None,
    }
    if option := next((option for option, given in options.items() if given), None):
        raise UsageError(f"{option}: for images only, and {video} is a video")


def _run(
    loop: Loop, found: Found, plan: Plan, participle: str, on_report: Callable[[ProgressReport], None] | None
) -> bool:
    """Process the files and print the report; return whether every file was processed or kept."""
    with exit_on_termination():
        files = len(found.unreadable) + len(plan.refused) + len(plan.jobs)
        sizes = {job.source: _size(job.source) for job in plan.jobs}
        with raise_on_interrupt(), ProgressReport(files, participle, sizes) as report:
            if on_report is not None:
                on_report(report)
            if skipped := str(found.skipped):
                report.say(f"skipped: {skipped}", "dim")
            for pattern in found.unmatched:
                report.say(f"--exclude {pattern} matches nothing")
            if found.results:
                report.say(results_message(found.results))
            for path, reason in (found.unreadable | plan.refused).items():
                report.fail(path, reason)
            for path in plan.left_out:
                report.note(path, "skipped, because the result of another input has this name")
            try:
                loop.run(report)
            except KeyboardInterrupt:
                report.interrupted()
                mark_reported()
                raise
            report.summary()
            return not report.failed


class _Loop:
    """The files that are left to process.

    Files that another process has locked are checked again at the end, and processed here if that process failed.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        work: Work,
        *,
        overwrite: bool,
        page: int | None,
        debug: bool,
        started: float,
        shown_target: str | None,
    ) -> None:
        self._jobs = jobs
        self._processor = JobProcessor(
            work,
            before=signatures_of(jobs),
            exact=frozenset(path for job in jobs if job.exact for path in job.outputs),
            overwrite=overwrite,
            page=page,
            elapsed=lambda: time.monotonic() - started,
            debug=debug,
        )
        self._shown_target = shown_target

    def run(self, report: ProgressReport) -> None:
        self._report = report
        waiting = list(self._jobs)
        said = False
        while waiting:
            locked = [job for job in waiting if not self._finished(job)]
            if len(locked) == len(waiting):
                if not said:
                    self._report.say(f"waiting for another process, which is working on {_counted(locked)}")
                    said = True
                time.sleep(_WAIT)
            waiting = locked

    def _finished(self, job: Job) -> bool:
        """Process a file, and return True; or return False if another process is working on it."""
        unit = "frames" if job.format is None else "tiles"
        outcome = self._processor.process(
            job, on_begin=lambda: self._report.begin(job.source, unit), on_tile=self._on_tile
        )
        if outcome is None:
            return False
        self._report.outcome(job.source, outcome, self._shown_target)
        return True

    def _on_tile(self, done: int, total: int) -> None:
        raise_if_interrupted()
        self._report.on_tile(done, total)


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # missing, or standard input
        return 0


def _counted(jobs: Sequence[Job]) -> str:
    return f"{jobs[0].source}" + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "")
