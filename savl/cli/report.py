"""What the user sees: a progress display on a terminal, plain lines anywhere, a summary at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from savl.cli.pace import Pace, spell_seconds
from savl.printable import printable

_LONGEST_NAME = 24  # characters of a file name beside a progress bar


class _PaceColumn(ProgressColumn):
    """What a task's `pace` says at the moment of drawing."""

    def render(self, task: Task) -> Text:
        pace: Callable[[], str] = task.fields["pace"]
        return Text(pace())


class Report:
    """Progress over files and tiles, and the tally of what became of each file.

    Everything goes to standard error. On anything but a terminal there are lines only, no moving display.
    """

    def __init__(self, files: int, participle: str, sizes: Mapping[Path, int] | None = None) -> None:
        """Prepare.

        Args:
            files: how many there are.
            participle: what becomes of them, such as "upscaled".
            sizes: bytes of each file that is to be read, for the time that is left.
        """
        self._pace = Pace(sizes or {})
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _PaceColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._files = self._progress.add_task("files", total=files, visible=files > 1, pace=self._files_pace)
        self._tiles = self._progress.add_task("tiles", total=None, pace=self._tiles_pace)
        self._total = files
        self._participle = participle
        self._done = 0
        self._kept = 0
        self._failures: list[tuple[Path, str]] = []

    def __enter__(self) -> Report:
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

    def begin(self, path: Path) -> None:
        """A file is started."""
        name = printable(path.name)
        name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
        # A new bar: rich cannot make the old one's total unknown again.
        self._progress.remove_task(self._tiles)
        self._tiles = self._progress.add_task(name, total=None, pace=self._tiles_pace)
        self._pace.begin(path)

    def on_tile(self, done: int, total: int) -> None:
        """Some tiles of the current file are finished."""
        self._pace.on_tile(done, total)
        self._progress.update(self._tiles, completed=done, total=total)

    def done(self, path: Path, target: Path | str, sizes: str, seconds: float) -> None:
        """A file is finished."""
        self._done += 1
        self._pace.finish(path, worked=True)
        self._line(f"{path} -> {target}  {sizes}  {seconds:.1f} s")
        self._progress.advance(self._files)

    def kept(self, path: Path, target: Path, *, written_meanwhile: bool) -> None:
        """A file's output was there already, or another process has written it since the beginning."""
        self._kept += 1
        self._pace.finish(path, worked=False)
        why = "which another process has just written" if written_meanwhile else "which exists already"
        hint = "" if written_meanwhile else " (--overwrite replaces it)"
        self._line(f"{path}: kept {target}, {why}{hint}", "dim")
        self._progress.advance(self._files)

    def fail(self, path: Path, reason: str) -> None:
        """A file could not be processed."""
        self._failures.append((path, reason))
        self._pace.finish(path, worked=False)
        self._line(f"{path}: {reason}", "red")
        self._progress.advance(self._files)

    def note(self, path: Path, text: str) -> None:
        """Something the user may not expect about a file."""
        self._line(f"{path}: {text}", "yellow")

    def say(self, text: str, style: str = "yellow") -> None:
        """Something about the run as a whole."""
        self._line(text, style)

    def summary(self) -> None:
        """The last word: counts, and a table of the failures unless it would only repeat the line above."""
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
        """Ctrl-C."""
        self._line(f"interrupted: {self._done} of {self._total} {self._participle}, no partial file left", "yellow")

    def _files_pace(self) -> str:
        return spell_seconds(self._pace.seconds)

    def _tiles_pace(self) -> str:
        rate = self._pace.rate
        return "" if rate is None else f"{rate:.2g} tiles/s, {spell_seconds(self._pace.file_seconds)}"

    def _line(self, text: str, style: str = "") -> None:
        # Text, not markup: file names may hold brackets. soft_wrap: a path must stay one line for grep.
        self.console.print(Text(printable(text), style=style), soft_wrap=True)
