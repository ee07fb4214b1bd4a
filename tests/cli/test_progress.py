"""The estimate of the remaining time, and its display."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from savl.cli import progress
from savl.cli.progress import ProgressReport, TimeEstimate, format_remaining

A, B, C = Path("a"), Path("b"), Path("c")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_there_is_no_estimate_before_the_first_tile() -> None:
    estimate = TimeEstimate({A: 10}, Clock())
    estimate.begin(A)
    assert (estimate.tiles_per_second, estimate.file_seconds, estimate.seconds) == (None, None, None)
    assert format_remaining(estimate.seconds) == ""


def test_the_remaining_time_follows_from_tiles_and_sizes() -> None:
    clock = Clock()
    estimate = TimeEstimate({A: 10, B: 30}, clock)
    estimate.begin(A)
    clock.now += 2
    estimate.on_tile(1, 4)
    assert estimate.tiles_per_second == 0.5
    assert estimate.file_seconds == pytest.approx(6)
    assert estimate.seconds == pytest.approx(6 + 3 * 8)
    clock.now += 1
    assert estimate.seconds == pytest.approx(29), "between tiles too"
    clock.now += 5
    estimate.on_tile(4, 4)
    estimate.finish(A, worked=True)
    assert estimate.seconds == pytest.approx(24)
    estimate.begin(B)
    assert estimate.tiles_per_second is None
    clock.now += 12
    estimate.on_tile(1, 2)
    assert estimate.file_seconds == pytest.approx(12)
    assert estimate.seconds == pytest.approx(12)
    clock.now += 100
    assert estimate.seconds == 0, "late, but not negative"


def test_files_without_work_do_not_count_in_the_estimate() -> None:
    clock = Clock()
    estimate = TimeEstimate({A: 10, B: 1000, C: 10}, clock)
    estimate.finish(B, worked=False)
    estimate.begin(A)
    clock.now += 4
    estimate.on_tile(1, 1)
    assert estimate.seconds == pytest.approx(4)
    estimate.finish(A, worked=True)
    estimate.finish(C, worked=False)
    assert estimate.seconds == 0


def test_a_later_file_without_work_reduces_the_remaining_time() -> None:
    clock = Clock()
    estimate = TimeEstimate({A: 10, B: 10, C: 10}, clock)
    estimate.begin(A)
    clock.now += 4
    estimate.finish(A, worked=True)
    assert estimate.seconds == pytest.approx(8)
    estimate.finish(B, worked=False)
    assert estimate.seconds == pytest.approx(4)


def test_unknown_file_sizes_are_accepted() -> None:
    clock = Clock()
    estimate = TimeEstimate({}, clock)
    estimate.begin(A)
    clock.now += 1
    estimate.on_tile(1, 2)
    assert estimate.file_seconds == pytest.approx(1)
    assert estimate.seconds is None
    estimate.finish(A, worked=True)
    estimate.on_tile(1, 1)


def test_a_terminal_shows_tiles_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with ProgressReport(2, "upscaled", {A: 10, B: 30}) as shown:
        shown.begin(A)
        shown.on_tile(1, 4)
        shown._progress.refresh()
        shown.done(A, B, "8x6 -> 32x24", 0.1)
    text = screen.getvalue()
    assert "1/4" in text
    assert "tiles/s, 0:00:00 left" in text
    assert "0/2" in text
