"""The loop over files behind `savl upscale` and `savl degrade`. One file's trouble never stops the others."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from savl.cli import ctrl_c
from savl.cli.claims import claim
from savl.cli.jobs import Job, Plan
from savl.cli.report import Report
from savl.cli.results import left_out_results
from savl.cli.sources import Found, UsageMistake
from savl.images.errors import ImageFileError, OutputExists, UnwritableImage
from savl.images.result_mark import read_origin
from savl.images.write import ProcessedFile
from savl.inference.enlarge import OnTile
from savl.out_of_memory import is_out_of_memory, out_of_memory_in_short

_WAIT = 0.2  # seconds between two looks at what other processes have claimed


class Work(Protocol):
    """What is done to every picture."""

    def __call__(self, job: Job, target: Path | None, severity: tuple[Path, ...], on_tile: OnTile) -> ProcessedFile:
        """Do it.

        Args:
            job: the picture's way.
            target: `job.target`, or None where it is to be kept as it is.
            severity: those of `job.severity` that are to be written.
            on_tile: called with (tiles done, tiles in all).
        """


def check_arguments(arguments: Sequence[str], output: str | None) -> None:
    """Refuse empty arguments, which a shell makes of unset variables.

    Raises:
        UsageMistake: an input or the output is the empty string.
    """
    if "" in arguments:
        raise UsageMistake(f"IN number {arguments.index('') + 1} is empty; name a picture, a folder or a glob")
    if output == "":
        raise UsageMistake("-o is empty; name a file or a folder, or leave it out to write beside the inputs")


def run_jobs(
    found: Found,
    plan: Plan,
    work: Work,
    *,
    participle: str,
    overwrite: bool,
    page: int | None,
    debug: bool,
    started: float,
    shown_target: str | None = None,
) -> bool:
    """Work through a plan, and report.

    Several processes that work on the same outputs share them: each file is claimed before it is done. What another
    process has claimed is looked at again at the end, and done here if that process failed.

    Args:
        found: what the arguments stood for.
        plan: what is made of it.
        work: what is done to each picture.
        participle: what it is called, such as "upscaled".
        overwrite: replace existing outputs; they are kept otherwise.
        page: the page that is taken of every file, counted from 1; None is the first.
        debug: let exceptions through.
        started: when the command began, by `time.monotonic`. What another process has written since is not replaced.
        shown_target: what the output is called in the report, where its name says nothing.

    Returns:
        Whether every file was done or kept.

    Raises:
        KeyboardInterrupt: Ctrl-C; the file in work was left as it was before.
    """
    previous = {number: signal.signal(number, _terminate) for number in _endings()}
    try:
        files = len(found.unreadable) + len(plan.refused) + len(plan.jobs)
        sizes = {job.source: _size(job.source) for job in plan.jobs}
        with ctrl_c.cleaning_up(), Report(files, participle, sizes) as report:
            if skipped := str(found.skipped):
                report.say(f"skipped: {skipped}", "dim")
            for pattern in found.unmatched:
                report.say(f"--exclude {pattern} matches nothing")
            if found.results:
                report.say(left_out_results(found.results))
            for path, reason in (found.unreadable | plan.refused).items():
                report.fail(path, reason)
            for path in plan.left_out:
                report.note(path, f"left out, because it is what another input is {participle} to")
            try:
                _Loop(plan.jobs, work, report, overwrite, page, debug, started, shown_target).run()
            except KeyboardInterrupt:
                report.interrupted()
                ctrl_c.told()
                raise
            report.summary()
            return not report.failed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Loop:
    """The files that are left to do, and what stood in the places of their outputs when the loop began."""

    def __init__(
        self,
        jobs: Sequence[Job],
        work: Work,
        report: Report,
        overwrite: bool,
        page: int | None,
        debug: bool,
        started: float,
        shown_target: str | None,
    ) -> None:
        self._jobs = jobs
        self._work = work
        self._report = report
        self._overwrite = overwrite
        self._page = page
        self._debug = debug
        self._started = started
        self._shown_target = shown_target
        self._exact = {path for job in jobs if job.exact for path in job.outputs}
        names = [name for job in jobs for name in (job, job.otherwise) if name is not None]
        self._before = {path: _signature(path) for name in names for path in name.outputs}

    def run(self) -> None:
        waiting = list(self._jobs)
        said = False
        while waiting:
            claimed = [job for job in waiting if not self._finished(job)]
            if len(claimed) == len(waiting):
                if not said:
                    self._report.say(f"waiting for another process, which is working on {_counted(claimed)}")
                    said = True
                time.sleep(_WAIT)
            waiting = claimed

    def _finished(self, job: Job) -> bool:
        """Do a file unless another process is at it, in which case return False."""
        ctrl_c.check()
        try:
            if self._in_the_way(job) is None:
                if self._nothing_due(job):
                    return True
                with claim(job.target) as claimed:
                    if not claimed.granted:
                        return False
                    self._forget_what_is_new(job, claimed.time_ns)
                    while self._in_the_way(job) is None:
                        if self._nothing_due(job) or self._do(job):
                            return True
            if job.otherwise is not None:
                return self._finished(job.otherwise)
            self._fail(job, UnwritableImage(job.source, self._in_the_way(job) or ""))
            return True
        except Exception as error:  # such as a name that the system does not take
            self._fail(job, error)
            return True

    def _forget_what_is_new(self, job: Job, now: int | None) -> None:
        """Count an output as absent at the beginning if it was written while this process was starting.

        Args:
            job: the file.
            now: the time in nanoseconds on the clock by which outputs are dated, or None.
        """
        if now is None:
            return
        beginning = now - int((time.monotonic() - self._started) * 1e9)
        for output in job.outputs:
            before = self._before[output]
            if before is not None and before.time_ns > beginning:
                self._before[output] = None

    def _in_the_way(self, job: Job) -> str | None:
        """Return why an output that stands and is to stay is no result of this file, or None where all may be its own.

        A result of the same picture counts as its own whatever the settings, and so does one that does not say what
        it was made of. A file that the user named as the output does not: whoever wrote it may have had other settings.
        """
        if job.missing:
            return None
        for output in job.outputs:
            if self._due(output):
                continue
            written_meanwhile = _signature(output) != self._before[output]
            hint = "" if self._overwrite else " (--overwrite replaces it)"
            if job.exact and (written_meanwhile or output == job.target):
                return f"{output} exists already, another process has just written it{hint}"
            origin = read_origin(output)
            if origin is None or origin == (job.origin(self._page) or origin):
                continue
            if written_meanwhile:
                return f"another process has just written {output}, of another picture{hint}"
            return f"{output} exists already, made of another picture or page, or before this one was changed{hint}"
        return None

    def _nothing_due(self, job: Job) -> bool:
        """Whether all outputs of a file stand; the report gets a line about it."""
        # A missing input is told as missing, even where its output stands from an earlier day.
        if any(map(self._due, job.outputs)) or job.missing:
            return False
        written_meanwhile = _signature(job.target) != self._before[job.target]
        self._report.kept(job.source, job.target, written_meanwhile=written_meanwhile)
        return True

    def _due(self, output: Path) -> bool:
        """Whether an output is to be written: not if it stands and is to be kept, or appeared after the beginning."""
        now = _signature(output)
        return now is None or (self._overwrite and (output in self._exact or now == self._before[output]))

    def _do(self, job: Job) -> bool:
        """Do a file, and report; return False where another process has written an output, and nothing is reported."""
        start = time.monotonic()
        try:
            target = job.target if self._due(job.target) else None
            severity = tuple(filter(self._due, job.severity))
            self._report.begin(job.source)
            result = self._work(job, target, severity, self._on_tile)
        except OutputExists as error:
            # A process that knows no claims was faster. What it did not write is still to be done.
            if error.path in map(str, job.outputs) and not self._due(Path(error.path)):
                return False
            self._fail(job, error)
        except Exception as error:
            self._fail(job, error)
        else:
            for note in result.notes:
                self._report.note(job.source, note)
            sizes = f"{result.old_size[0]}x{result.old_size[1]} -> {result.new_size[0]}x{result.new_size[1]}"
            written = self._shown_target or target or (severity[0] if severity else job.target)
            self._report.done(job.source, written, sizes, time.monotonic() - start)
        return True

    def _on_tile(self, done: int, total: int) -> None:
        ctrl_c.check()
        self._report.on_tile(done, total)

    def _fail(self, job: Job, error: Exception) -> None:
        ctrl_c.check()  # which libraries may turn into errors of their own
        if self._debug:
            raise error
        # Beside the input's name, its own trouble needs no second naming; the output's does.
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
    """What changes when a file is written anew."""

    inode: int
    time_ns: int
    size: int


def _signature(path: Path) -> _Signature | None:
    """The signature of a file, or None where there is no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _Signature(status.st_ino, status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


def in_short(error: Exception) -> str:
    """Return an exception as one line for people; its type is told where its text alone may not make sense."""
    if is_out_of_memory(error):
        return out_of_memory_in_short(error)
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (ImageFileError, FileNotFoundError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _endings() -> list[signal.Signals]:
    """The signals that ask the process to end: SIGTERM, and unless nohup has it, SIGHUP of a closed terminal."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    closed = [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]
    return [signal.SIGTERM, *closed]


def _terminate(number: int, frame: FrameType | None) -> None:
    """End like on Ctrl-C: through every `finally`, so that no partial file stays."""
    sys.exit(128 + number)
