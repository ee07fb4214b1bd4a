"""One image or video to process into files: what is done about outputs that exist, and which process does it.

`savl upscale` and `savl degrade` process their files with a `JobProcessor`, and so does every worker of
`savl.distributed`. Several processes that work on the same outputs share them: each file is locked before it is
processed.
"""

from __future__ import annotations

import io
import os
import stat
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from savl.images.errors import ImageFileError, OutputExists, UnwritableImage
from savl.images.format import ImageFormat
from savl.images.locks import OutputLock, lock_output
from savl.images.result_mark import digest_origin, read_origin
from savl.images.write import ProcessedFile
from savl.interrupts import raise_if_interrupted
from savl.out_of_memory import is_out_of_memory, out_of_memory_in_short

OnTile = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One image or video to process.

    Attributes:
        source: The file to read.
        target: The file to write the result to.
        format: Format of `target`; None for a video, whose container follows from the suffix of `target`.
        maps: The files to write maps of the image to.
        content: Data that is read instead of `source`, such as that of standard input; `source` is then only a name.
        exact: Whether the user named `target` itself.
        alternative: The same job with another target, in case `target` is the result of another image; None if there is
            no other name.
    """

    source: Path
    target: Path
    format: ImageFormat | None
    maps: tuple[Path, ...]
    content: bytes | None = None
    exact: bool = False
    alternative: Job | None = None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Files to write."""
        return (self.target, *self.maps)

    @property
    def missing(self) -> bool:
        """Whether there is nothing to read."""
        return self.content is None and not os.path.exists(self.source)

    def origin(self, page: int | None) -> str | None:
        """Return the digest of the source, for the marks of the outputs; see `savl.images.result_mark`."""
        return digest_origin(self.source if self.content is None else self.content, page)

    def open(self) -> Path | BinaryIO:
        """Return the source for `savl.images.read.read_image`."""
        if self.content is None:
            return self.source
        stream = io.BytesIO(self.content)
        stream.name = str(self.source)  # the name in messages
        return stream


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


class Signature(NamedTuple):
    """Properties of a file that change when it is rewritten."""

    identity: int | str
    time_ns: int
    size: int


class Place(Protocol):
    """Where outputs are: the file system of this machine, or another one."""

    def signature(self, output: Path) -> Signature | None:
        """Return the signature of an output, or None if there is no regular file."""

    def origin(self, output: Path) -> str | None:
        """Return the digest of the source of an output, as `savl.images.result_mark.read_origin` does."""

    def lock(self, output: Path) -> AbstractContextManager[OutputLock]:
        """Try to lock an output, as `savl.images.locks.lock_output` does."""


class LocalPlace:
    """The file system of this machine, and the file systems that are mounted in it."""

    def signature(self, output: Path) -> Signature | None:
        """Return the signature of a file, or None if there is no regular file."""
        try:
            status = os.stat(output)
        except (OSError, ValueError):
            return None
        return Signature(status.st_ino, status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def origin(self, output: Path) -> str | None:
        """Return the digest of the source that is stored in a file."""
        return read_origin(output)

    def lock(self, output: Path) -> AbstractContextManager[OutputLock]:
        """Try to lock a file for the duration of a `with` block."""
        return lock_output(output)


@dataclass(frozen=True)
class Done:
    """A job whose outputs were written.

    Attributes:
        written: The file that was written; the first one, if there are maps.
        result: The sizes, and notes.
        seconds: The time it took.
    """

    written: str
    result: ProcessedFile
    seconds: float


@dataclass(frozen=True)
class Kept:
    """A job whose outputs exist already.

    Attributes:
        target: The file that is kept.
        written_meanwhile: Whether another process has written it since the run began.
    """

    target: str
    written_meanwhile: bool


@dataclass(frozen=True)
class Failed:
    """A job that could not be processed.

    Attributes:
        reason: One line without the name of the input.
        traceback: Where the error was raised.
    """

    reason: str
    traceback: str = ""


Outcome = Done | Kept | Failed


class JobProcessor:
    """Processes jobs, and decides what is done about outputs that exist.

    Outputs that existed when the run began are kept, or replaced with `overwrite`. Outputs that another process writes
    during the run are always kept.
    """

    def __init__(
        self,
        work: Work,
        *,
        before: Mapping[Path, Signature | None],
        exact: frozenset[Path] = frozenset(),
        overwrite: bool = False,
        page: int | None = None,
        elapsed: Callable[[], float] = lambda: 0.0,
        place: Place | None = None,
        debug: bool = False,
    ) -> None:
        """Prepare the processor.

        Args:
            work: Processes an image.
            before: Signatures of all outputs (`signatures_of`) when the run began.
            exact: Outputs that the user named.
            overwrite: Replace outputs that existed when the run began.
            page: Page of the images, counted from 1; None selects the first page.
            elapsed: Returns the seconds since the run began, which is earlier than `before` was read.
            place: Where the outputs are; None for the file system of this machine.
            debug: Raise the error of a job instead of returning `Failed`.
        """
        self._work = work
        self._before = dict(before)
        self._exact = exact
        self._overwrite = overwrite
        self._page = page
        self._elapsed = elapsed
        self._place = place or LocalPlace()
        self._debug = debug

    def process(self, job: Job, *, on_begin: Callable[[], None], on_tile: OnTile) -> Outcome | None:
        """Process a job, unless its outputs exist already.

        Args:
            job: The job.
            on_begin: Called before the work begins; not if there is none.
            on_tile: Called with (tiles done, tiles in all).

        Returns:
            What became of the job, or None if another process is working on it.

        Raises:
            KeyboardInterrupt: Ctrl-C has come.
        """
        raise_if_interrupted()
        try:
            if self._conflict(job) is None:
                if (kept := self._nothing_due(job)) is not None:
                    return kept
                with self._place.lock(job.target) as lock:
                    if not lock.acquired:
                        return None
                    self._forget_new_outputs(job, lock.time_ns)
                    while self._conflict(job) is None:
                        outcome = self._nothing_due(job) or self._run(job, on_begin, on_tile)
                        if outcome is not None:
                            return outcome
            if job.alternative is not None:
                return self.process(job.alternative, on_begin=on_begin, on_tile=on_tile)
            return self._failed(job, UnwritableImage(job.source, self._conflict(job) or ""))
        except Exception as error:  # for example a name that the file system does not accept
            return self._failed(job, error)

    def _forget_new_outputs(self, job: Job, now: int | None) -> None:
        """Count an output as missing at the beginning if it was written while the run was starting.

        Args:
            job: The file.
            now: The present time in nanoseconds, by the clock of the file system; None if it is unknown.
        """
        if now is None:
            return
        beginning = now - int(self._elapsed() * 1e9)
        for output in job.outputs:
            before = self._before.get(output)
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
            written_meanwhile = self._written_meanwhile(output)
            hint = "" if self._overwrite else " (--overwrite replaces it)"
            if job.exact and (written_meanwhile or output == job.target):
                return f"{output} exists already: another process has just written it{hint}"
            origin = self._place.origin(output)
            if origin is None or origin == (job.origin(self._page) or origin):
                continue
            if written_meanwhile:
                return f"another process has just written {output} from another image{hint}"
            return f"{output} exists already and was made from another image, page or version of this image{hint}"
        return None

    def _nothing_due(self, job: Job) -> Kept | None:
        """Return that all outputs of a file exist and are kept, or None if one is to be written."""
        # A missing input is reported as missing, even if its output exists.
        if any(map(self._due, job.outputs)) or job.missing:
            return None
        return Kept(str(job.target), self._written_meanwhile(job.target))

    def _due(self, output: Path) -> bool:
        """Return whether an output is to be written: it does not exist, or existed at the beginning and is replaced."""
        now = self._place.signature(output)
        return now is None or (self._overwrite and (output in self._exact or now == self._before.get(output)))

    def _written_meanwhile(self, output: Path) -> bool:
        return self._place.signature(output) != self._before.get(output)

    def _run(self, job: Job, on_begin: Callable[[], None], on_tile: OnTile) -> Outcome | None:
        """Process a file; return None if another process has written an output, so that this one decides again."""
        start = time.monotonic()
        try:
            target = job.target if self._due(job.target) else None
            maps = tuple(path if self._due(path) else None for path in job.maps)
            on_begin()
            result = self._work(job, target, maps, on_tile)
        except OutputExists as error:
            # A process that does not use locks was faster. The outputs that it did not write are still due.
            if error.path in map(str, job.outputs) and not self._due(Path(error.path)):
                return None
            return self._failed(job, error)
        written = target or next(filter(None, maps), job.target)
        return Done(str(written), result, time.monotonic() - start)

    def _failed(self, job: Job, error: Exception) -> Failed:
        raise_if_interrupted()  # A library may have turned the interrupt into an error of its own.
        if self._debug:
            raise error
        # The line begins with the name of the input, which an error about it need not repeat.
        own = error.reason if isinstance(error, ImageFileError) and error.path == str(job.source) else None
        return Failed(own or in_short(error), "".join(traceback.format_exception(error)))


def signatures_of(jobs: Sequence[Job], place: Place | None = None) -> dict[Path, Signature | None]:
    """Return the signatures of all outputs of jobs, also under their alternative names; None for missing ones."""
    place = place or LocalPlace()
    names = [name for job in jobs for name in (job, job.alternative) if name is not None]
    return {path: place.signature(path) for name in names for path in name.outputs}


def in_short(error: Exception) -> str:
    """Return an exception as one line, with its type if its text alone may not make sense."""
    if is_out_of_memory(error):
        return out_of_memory_in_short(error)
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (ImageFileError, FileNotFoundError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
