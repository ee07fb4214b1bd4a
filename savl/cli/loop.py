"""The loop over files behind `savl upscale` and `savl degrade`. An error in one file never stops the others."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from savl.cli.jobs import Job, Naming, Plan, format_of_source, name_suffix, output_is_file, plan_jobs, refuse_existing
from savl.cli.locks import lock_output
from savl.cli.progress import ProgressReport
from savl.cli.results import ResultRule, remove_results, results_message
from savl.cli.sources import Found, find_sources
from savl.cli.streams import STANDARD, StandardOutput, read_standard_input
from savl.command_line import UsageError
from savl.images.errors import ImageFileError, OutputExists, UnwritableImage
from savl.images.format import FORMATS, JPEG, PNG, format_of_suffix
from savl.images.result_mark import MAP_MARKS, read_origin
from savl.images.write import ProcessedFile
from savl.inference.enlarge import OnTile
from savl.inference.process_settings import keep_freed_memory
from savl.interrupts import mark_reported, raise_if_interrupted, raise_on_interrupt
from savl.out_of_memory import is_out_of_memory, out_of_memory_in_short

_WAIT = 0.2  # seconds between two attempts to get the files that other processes have locked


class Work(Protocol):
    """Function that processes an image."""

    def __call__(self, job: Job, target: Path | None, maps: tuple[Path | None, ...], on_tile: OnTile) -> ProcessedFile:
        """Process one image.

        Args:
            job: The image and its outputs.
            target: `job.target`, or None if the existing file is kept.
            maps: `job.maps`, with None in place of existing files that are kept.
            on_tile: Called with (tiles done, tiles in all).
        """


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
    """

    participle: str
    result_suffix: str
    lossless: bool
    map_endings: tuple[str, ...]
    prepare: Callable[[], tuple[str, Work]]


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
    to_file = output_is_file(output, arguments)
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
        )
        image_format = next((each for each in FORMATS if each.name == format_name), None)
        if operation.lossless and (standard_output is not None or not to_file):
            image_format = image_format or PNG
        if standard_output is not None:
            place = standard_output.file((image_format or format_of_source(found.sources[0]) or PNG).suffixes[0])
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

        loop = _Loop(
            plan.jobs,
            work_and_send,
            overwrite=overwrite,
            page=page,
            debug=debug,
            started=started,
            shown_target=None if standard_output is None else "standard output",
        )
        return _run(loop, found, plan, operation.participle)


def _run(loop: _Loop, found: Found, plan: Plan, participle: str) -> bool:
    """Process the files and print the report; return whether every file was processed or kept."""
    previous = {number: signal.signal(number, _terminate) for number in _termination_signals()}
    try:
        files = len(found.unreadable) + len(plan.refused) + len(plan.jobs)
        sizes = {job.source: _size(job.source) for job in plan.jobs}
        with raise_on_interrupt(), ProgressReport(files, participle, sizes) as report:
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
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Loop:
    """The files that are left to process, and the state of their outputs when the loop began.

    Several processes that work on the same outputs share them: each file is locked before it is processed. Files that
    another process has locked are checked again at the end, and processed here if that process failed.
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
        self._work = work
        self._overwrite = overwrite
        self._page = page
        self._debug = debug
        self._started = started
        self._shown_target = shown_target
        self._said: set[str] = set()  # notes about the whole run
        self._exact = {path for job in jobs if job.exact for path in job.outputs}
        names = [name for job in jobs for name in (job, job.alternative) if name is not None]
        self._before = {path: _signature(path) for name in names for path in name.outputs}

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
        raise_if_interrupted()
        try:
            if self._conflict(job) is None:
                if self._nothing_due(job):
                    return True
                with lock_output(job.target) as lock:
                    if not lock.acquired:
                        return False
                    self._forget_new_outputs(job, lock.time_ns)
                    while self._conflict(job) is None:
                        if self._nothing_due(job) or self._process(job):
                            return True
            if job.alternative is not None:
                return self._finished(job.alternative)
            self._fail(job, UnwritableImage(job.source, self._conflict(job) or ""))
            return True
        except Exception as error:  # for example a name that the file system does not accept
            self._fail(job, error)
            return True

    def _forget_new_outputs(self, job: Job, now: int | None) -> None:
        """Count an output as missing at the beginning if it was written while this process was starting.

        Args:
            job: The file.
            now: The present time in nanoseconds, by the clock of the file system; None if it is unknown.
        """
        if now is None:
            return
        beginning = now - int((time.monotonic() - self._started) * 1e9)
        for output in job.outputs:
            before = self._before[output]
            if before is not None and before.time_ns > beginning:
                self._before[output] = None

    def _conflict(self, job: Job) -> str | None:
        """Return the reason why an existing output is not a result of this file, or None if there is no such output.

        Outputs that will be replaced are not checked. A file that was made from the same image is a result of this
        file, whatever the settings were. So is a file that does not contain the digest of its source. A file that `-o`
        names is not accepted as a result, because it may have been made with other settings.
        """
        if job.missing:
            return None
        for output in job.outputs:
            if self._due(output):
                continue
            written_meanwhile = _signature(output) != self._before[output]
            hint = "" if self._overwrite else " (--overwrite replaces it)"
            if job.exact and (written_meanwhile or output == job.target):
                return f"{output} exists already: another process has just written it{hint}"
            origin = read_origin(output)
            if origin is None or origin == (job.origin(self._page) or origin):
                continue
            if written_meanwhile:
                return f"another process has just written {output} from another image{hint}"
            return f"{output} exists already and was made from another image, page or version of this image{hint}"
        return None

    def _nothing_due(self, job: Job) -> bool:
        """Return whether all outputs of a file exist and are kept, which is reported."""
        # A missing input is reported as missing, even if its output exists.
        if any(map(self._due, job.outputs)) or job.missing:
            return False
        written_meanwhile = _signature(job.target) != self._before[job.target]
        self._report.kept(job.source, job.target, written_meanwhile=written_meanwhile)
        return True

    def _due(self, output: Path) -> bool:
        """Return whether an output is to be written: it does not exist, or existed at the beginning and is replaced."""
        now = _signature(output)
        return now is None or (self._overwrite and (output in self._exact or now == self._before[output]))

    def _process(self, job: Job) -> bool:
        """Process a file and report it; or return False, without a report, if another process has written an output."""
        start = time.monotonic()
        try:
            target = job.target if self._due(job.target) else None
            maps = tuple(path if self._due(path) else None for path in job.maps)
            self._report.begin(job.source)
            result = self._work(job, target, maps, self._on_tile)
        except OutputExists as error:
            # A process that does not use locks was faster. The outputs that it did not write are still due.
            if error.path in map(str, job.outputs) and not self._due(Path(error.path)):
                return False
            self._fail(job, error)
        except Exception as error:
            self._fail(job, error)
        else:
            for note in result.run_notes:
                if note not in self._said:
                    self._said.add(note)
                    self._report.say(note, "dim")
            for note in result.notes:
                self._report.note(job.source, note)
            sizes = f"{result.old_size[0]}x{result.old_size[1]} -> {result.new_size[0]}x{result.new_size[1]}"
            written = self._shown_target or target or next(filter(None, maps), job.target)
            self._report.done(job.source, written, sizes, time.monotonic() - start)
        return True

    def _on_tile(self, done: int, total: int) -> None:
        raise_if_interrupted()
        self._report.on_tile(done, total)

    def _fail(self, job: Job, error: Exception) -> None:
        raise_if_interrupted()  # A library may have turned the interrupt into an error of its own.
        if self._debug:
            raise error
        # The line begins with the name of the input, which an error about it need not repeat.
        own = error.reason if isinstance(error, ImageFileError) and error.path == str(job.source) else None
        self._report.fail(job.source, own or in_short(error))


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # missing, or standard input
        return 0


def _counted(jobs: Sequence[Job]) -> str:
    return f"{jobs[0].source}" + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "")


class _Signature(NamedTuple):
    """Properties of a file that change when it is rewritten."""

    inode: int
    time_ns: int
    size: int


def _signature(path: Path) -> _Signature | None:
    """Return the signature of a file, or None if there is no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _Signature(status.st_ino, status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


def in_short(error: Exception) -> str:
    """Return an exception as one line, with its type if its text alone may not make sense."""
    if is_out_of_memory(error):
        return out_of_memory_in_short(error)
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (ImageFileError, FileNotFoundError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _termination_signals() -> list[signal.Signals]:
    """Return the signals that end the process: SIGTERM, and SIGHUP of a closed terminal unless nohup ignores it."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    closed = [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]
    return [signal.SIGTERM, *closed]


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C, through every `finally`, so that no partial file is left."""
    sys.exit(128 + number)
