"""How fast a run over files goes, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path


class Pace:
    """The time that is left, from the files done so far and their sizes.

    A file's share of the work is taken to be its size in bytes: its pixels are not known before it is read. Files that
    turn out to need no work (kept, or not readable) are taken out of the estimate.
    """

    def __init__(self, sizes: Mapping[Path, int], clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare.

        Args:
            sizes: bytes of each file that is to be done.
            clock: the time in seconds.
        """
        self._left = dict(sizes)
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
        """Count the tiles of the current file that are finished."""
        self._tiles = done, total
        if self._current is None or not 0 < done <= total:
            return
        now = self._clock()
        spent = now - self._begun
        self._file_end = now + spent * (total - done) / done
        size = self._left.get(self._current, 0)
        finished = self._done + size * done / total
        rest = sum(self._left.values()) - size * done / total
        if finished:
            self._end = now + (self._worked + spent) * rest / finished

    def finish(self, path: Path, *, worked: bool) -> None:
        """End a file.

        Args:
            path: the file.
            worked: it took its share of the work, and so tells how long the others will take.
        """
        size = self._left.pop(path, 0)
        if worked:
            now = self._clock()
            self._done += size
            self._worked += now - self._begun
            if self._done:
                self._end = now + self._worked * sum(self._left.values()) / self._done
        elif self._end is not None and self._done:
            self._end -= self._worked * size / self._done
        self._current = None

    @property
    def rate(self) -> float | None:
        """Tiles per second of the current file, or None before the first."""
        done, _ = self._tiles
        spent = self._clock() - self._begun
        return done / spent if done and spent > 0 else None

    @property
    def file_seconds(self) -> float | None:
        """Seconds that the current file still takes, or None before its first tile."""
        return None if self._file_end is None else max(0.0, self._file_end - self._clock())

    @property
    def seconds(self) -> float | None:
        """Seconds that all files still take, or None before the first tile of the first."""
        return None if self._end is None else max(0.0, self._end - self._clock())


def spell_seconds(seconds: float | None) -> str:
    """Return "0:01:30 left", or "" where nothing is known."""
    return "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
