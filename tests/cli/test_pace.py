"""The time that is left of a run, and how the display shows it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from savl.cli import report
from savl.cli.pace import Pace, spell_seconds
from savl.cli.report import Report

A, B, C = Path("a"), Path("b"), Path("c")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_said_before_the_first_tile() -> None:
    pace = Pace({A: 10}, Clock())
    pace.begin(A)
    assert (pace.rate, pace.file_seconds, pace.seconds) == (None, None, None)
    assert spell_seconds(pace.seconds) == ""


def test_the_time_left_follows_from_tiles_and_sizes_and_counts_down() -> None:
    clock = Clock()
    pace = Pace({A: 10, B: 30}, clock)
    pace.begin(A)
    clock.now += 2
    pace.on_tile(1, 4)
    assert pace.rate == 0.5
    assert pace.file_seconds == pytest.approx(6)
    assert pace.seconds == pytest.approx(6 + 3 * 8)
    clock.now += 1
    assert pace.seconds == pytest.approx(29), "between tiles too"
    clock.now += 5
    pace.on_tile(4, 4)
    pace.finish(A, worked=True)
    assert pace.seconds == pytest.approx(24)
    pace.begin(B)
    assert pace.rate is None
    clock.now += 12
    pace.on_tile(1, 2)
    assert pace.file_seconds == pytest.approx(12)
    assert pace.seconds == pytest.approx(12)
    clock.now += 100
    assert pace.seconds == 0, "late, but not negative"


def test_files_without_work_make_no_pace() -> None:
    clock = Clock()
    pace = Pace({A: 10, B: 1000, C: 10}, clock)
    pace.finish(B, worked=False)
    pace.begin(A)
    clock.now += 4
    pace.on_tile(1, 1)
    assert pace.seconds == pytest.approx(4)
    pace.finish(A, worked=True)
    pace.finish(C, worked=False)
    assert pace.seconds == 0


def test_a_later_file_without_work_shortens_the_rest() -> None:
    clock = Clock()
    pace = Pace({A: 10, B: 10, C: 10}, clock)
    pace.begin(A)
    clock.now += 4
    pace.finish(A, worked=True)
    assert pace.seconds == pytest.approx(8)
    pace.finish(B, worked=False)
    assert pace.seconds == pytest.approx(4)


def test_sizes_that_are_not_known_do_no_harm() -> None:
    clock = Clock()
    pace = Pace({}, clock)
    pace.begin(A)
    clock.now += 1
    pace.on_tile(1, 2)
    assert pace.file_seconds == pytest.approx(1)
    assert pace.seconds is None
    pace.finish(A, worked=True)
    pace.on_tile(1, 1)


def test_a_terminal_shows_tiles_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(report, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with Report(2, "upscaled", {A: 10, B: 30}) as shown:
        shown.begin(A)
        shown.on_tile(1, 4)
        shown._progress.refresh()
        shown.done(A, B, "8x6 -> 32x24", 0.1)
    text = screen.getvalue()
    assert "1/4" in text
    assert "tiles/s, 0:00:00 left" in text
    assert "0/2" in text
