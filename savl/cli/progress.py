"""Progress of a run over files: a display on a terminal, plain lines anywhere else, and a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from savl.images.job import Failed, Kept, Outcome
from savl.printable import printable

_LONGEST_NAME = 24  # characters of a file name beside a progress bar


class TimeEstimate:
    """Estimate of the remaining time, from the files done so far and their sizes.

    A file's share of the work is estimated by its size in bytes, because its pixels are not known before it is read.
    Files that turn out to need no work (kept, or not readable) are removed from the estimate.
    """

    def __init__(self, sizes: Mapping[Path, int], clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare the estimate.

        Args:
            sizes: Size in bytes of each file that is to be processed.
            clock: Returns the time in seconds.
        """
        self._remaining = dict(sizes)
        self._clock = clock
        self._worked = 0.0  # seconds
        self._done = 0  # bytes
        self._current: Path | None = None
        self._begun = 0.0
        self._tiles = (0, 0)
        self._file_end: float | None = None
        self._end: float | None = None

    def begin(self, path: Path) -> None:
        """Start a file."""
        self._current, self._begun, self._tiles, self._file_end = path, self._clock(), (0, 0), None

    def on_tile(self, done: int, total: int) -> None:
        """Record how many tiles of the current file are finished."""
        self._tiles = done, total
        if self._current is None or not 0 < done <= total:
            return
        now = self._clock()
        spent = now - self._begun
        self._file_end = now + spent * (total - done) / done
        size = self._remaining.get(self._current, 0)
        finished = self._done + size * done / total
        rest = sum(self._remaining.values()) - size * done / total
        if finished:
            self._end = now + (self._worked + spent) * rest / finished

    def finish(self, path: Path, *, worked: bool) -> None:
        """Finish a file.

        Args:
            path: The file.
            worked: Whether the file was processed, so that its time says something about the others.
        """
        size = self._remaining.pop(path, 0)
        if worked:
            now = self._clock()
            self._done += size
            self._worked += now - self._begun
            if self._done:
                self._end = now + self._worked * sum(self._remaining.values()) / self._done
        elif self._end is not None and self._done:
            self._end -= self._worked * size / self._done
        self._current = None

    @property
    def tiles_per_second(self) -> float | None:
        """Tiles per second of the current file; None before its first tile."""
        done, _ = self._tiles
        spent = self._clock() - self._begun
        return done / spent if done and spent > 0 else None

    @property
    def file_seconds(self) -> float | None:
        """Remaining seconds of the current file; None before its first tile."""
        return None if self._file_end is None else max(0.0, self._file_end - self._clock())

    @property
    def seconds(self) -> float | None:
        """Remaining seconds of all files; None before the first tile of the first file."""
        return None if self._end is None else max(0.0, self._end - self._clock())


def format_remaining(seconds: float | None) -> str:
    """Return for example "0:01:30 left", or "" if the time is unknown."""
    return "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"


class _EstimateColumn(ProgressColumn):
    """Text from the function in a task's field `estimate`, called at the moment of drawing."""

    def render(self, task: Task) -> Text:
        estimate: Callable[[], str] = task.fields["estimate"]
        return Text(estimate())


class WorkersEstimate:
    """Estimate of the remaining time of several workers: from the bytes of the files done since the first one began."""

    def __init__(self, sizes: Mapping[Path, int], clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare the estimate.

        Args:
            sizes: Size in bytes of each file that is to be processed.
            clock: Returns the time in seconds.
        """
        self._remaining = dict(sizes)
        self._clock = clock
        self._done = 0.0  # bytes
        self._partly = 0.0  # bytes of files that are being processed
        self._begun: float | None = None

    def finish(self, path: Path, *, worked: bool) -> None:
        """Finish a file; `worked` as for `TimeEstimate.finish`."""
        self._done += self._remaining.pop(path, 0) * worked

    def update(self, active: Sequence[tuple[Path, int, int]]) -> None:
        """Record the files that are being processed, each with tiles done and number of tiles."""
        if active and self._begun is None:
            self._begun = self._clock()
        self._partly = sum(self._remaining.get(path, 0) * done / total for path, done, total in active if total)

    @property
    def seconds(self) -> float | None:
        """Remaining seconds of all files; None before the first tile."""
        finished = self._done + self._partly
        if self._begun is None or not finished:
            return None
        return (self._clock() - self._begun) * (sum(self._remaining.values()) - self._partly) / finished


class ProgressReport:
    """Progress over files and tiles, and what happened to each file.

    Everything is printed to standard error. If that is not a terminal, only lines are printed, without a moving bar.
    """

    def __init__(self, files: int, participle: str, sizes: Mapping[Path, int] | None = None) -> None:
        """Prepare the report.

        Args:
            files: Number of files.
            participle: Participle of the command's verb, such as "upscaled".
            sizes: Size in bytes of each file that is to be read, to estimate the remaining time.
        """
        self._estimate = TimeEstimate(sizes or {})
        self._workers_estimate = WorkersEstimate(sizes or {})
        self._has_workers = False
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _EstimateColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._files = self._progress.add_task("files", total=files, visible=files > 1, estimate=self._files_estimate)
        self._tiles = self._progress.add_task("tiles", total=None, estimate=self._tiles_estimate)
        self._unit = "tiles"
        self._total = files
        self._participle = participle
        self._done = 0
        self._kept = 0
        self._failures: list[tuple[Path, str]] = []
        self._said: set[str] = set()  # notes about the whole run

    def __enter__(self) -> ProgressReport:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def failed(self) -> bool:
        """Whether any file could not be processed."""
        return bool(self._failures)

    def begin(self, path: Path, unit: str = "tiles") -> None:
        """Start a file, whose progress is counted in a unit, such as "tiles" or "frames"."""
        self._unit = unit
        name = printable(path.name)
        name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
        # A new bar, because rich cannot make the total of the old one unknown again.
        self._progress.remove_task(self._tiles)
        self._tiles = self._progress.add_task(name, total=None, estimate=self._tiles_estimate)
        self._estimate.begin(path)

    def on_tile(self, done: int, total: int) -> None:
        """Show how many tiles of the current file are finished."""
        self._estimate.on_tile(done, total)
        self._progress.update(self._tiles, completed=done, total=total)

    def on_workers(self, active: Sequence[tuple[Path, int, int]]) -> None:
        """Show what several workers do.

        Args:
            active: The files that are being processed, each with tiles done and number of tiles.
        """
        self._has_workers = True
        self._workers_estimate.update(active)
        tiles = sum(total for _, _, total in active)
        name = f"{len(active)} file{'' if len(active) == 1 else 's'} at work"
        self._progress.update(
            self._tiles, description=name, completed=sum(done for _, done, _ in active), total=tiles or None
        )

    def done(self, path: Path, target: Path | str, sizes: str, seconds: float) -> None:
        """Report a finished file."""
        self._done += 1
        self._finish(path, worked=True)
        self._line(f"{path} -> {target}  {sizes}  {seconds:.1f} s")
        self._progress.advance(self._files)

    def kept(self, path: Path, target: Path | str, *, written_meanwhile: bool) -> None:
        """Report a file whose output existed already, or was written by another process meanwhile."""
        self._kept += 1
        self._finish(path, worked=False)
        why = "which another process has just written" if written_meanwhile else "which exists already"
        hint = "" if written_meanwhile else " (--overwrite replaces it)"
        self._line(f"{path}: kept {target}, {why}{hint}", "dim")
        self._progress.advance(self._files)

    def fail(self, path: Path, reason: str) -> None:
        """Report a file that could not be processed."""
        self._failures.append((path, reason))
        self._finish(path, worked=False)
        self._line(f"{path}: {reason}", "red")
        self._progress.advance(self._files)

    def outcome(self, path: Path, outcome: Outcome, shown_target: str | None = None) -> None:
        """Report what became of a file.

        Args:
            path: The input.
            outcome: What became of it. Notes about the whole run are printed once.
            shown_target: Printed instead of the name of the file that was written; None for that name.
        """
        if isinstance(outcome, Failed):
            self.fail(path, outcome.reason)
        elif isinstance(outcome, Kept):
            self.kept(path, outcome.target, written_meanwhile=outcome.written_meanwhile)
        else:
            result = outcome.result
            for note in result.run_notes:
                if note not in self._said:
                    self._said.add(note)
                    self.say(note, "dim")
            for note in result.notes:
                self.note(path, note)
            sizes = f"{result.old_size[0]}x{result.old_size[1]} -> {result.new_size[0]}x{result.new_size[1]}"
            self.done(path, shown_target or outcome.written, sizes, outcome.seconds)

    def note(self, path: Path, text: str) -> None:
        """Print a remark about a file, such as metadata that was lost."""
        self._line(f"{path}: {text}", "yellow")

    def say(self, text: str, style: str = "yellow") -> None:
        """Print a remark about the whole run."""
        self._line(text, style)

    def summary(self) -> None:
        """Print counts, and a table of failures unless it would only repeat the line above."""
        self._progress.stop()
        if self._total < 2:
            return
        if self._failures:
            table = Table("file", "reason", title=f"not {self._participle}", title_justify="left")
            for path, reason in self._failures:
                table.add_row(*(Text(printable(text), overflow="fold") for text in (str(path), reason)))
            self.console.print(table)
        counts = [f"{self._done} {self._participle}", f"{self._kept} kept", f"{len(self._failures)} failed"]
        self._line(", ".join(count for count in counts if not count.startswith("0 ")))

    def interrupted(self) -> None:
        """Report that Ctrl-C has ended the run."""
        self._line(f"interrupted: {self._done} of {self._total} {self._participle}, no partial output left", "yellow")

    def _finish(self, path: Path, *, worked: bool) -> None:
        self._estimate.finish(path, worked=worked)
        self._workers_estimate.finish(path, worked=worked)

    def _files_estimate(self) -> str:
        return format_remaining((self._workers_estimate if self._has_workers else self._estimate).seconds)

    def _tiles_estimate(self) -> str:
        rate = self._estimate.tiles_per_second
        return "" if rate is None else f"{rate:.2g} {self._unit}/s, {format_remaining(self._estimate.file_seconds)}"

    def _line(self, text: str, style: str = "") -> None:
        # Text instead of markup, because file names may contain brackets. soft_wrap keeps a path on one line for grep.
        self.console.print(Text(printable(text), style=style), soft_wrap=True)
