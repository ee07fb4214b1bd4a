"""What files are called in a report."""

from __future__ import annotations

from pathlib import Path

from savl.analysis.names import distinct_names


def test_names_are_as_long_as_it_takes_to_tell_files_apart() -> None:
    paths = [Path(text) for text in ("/a/x/1.png", "/a/y/1.png", "/b/y/1.png", "2.png", "/c/3.png", "/c/3.jpg")]
    assert distinct_names(paths) == ["x/1.png", "a/y/1.png", "b/y/1.png", "2", "3.png", "3.jpg"]
    assert distinct_names(paths[3:5], suffix=True) == ["2.png", "3.png"]
    assert distinct_names(paths[:2], folder=True) == ["x/1.png", "y/1.png"]


def test_a_file_that_is_named_twice_keeps_its_name() -> None:
    assert distinct_names([Path("/a/1.png")] * 2) == ["1", "1"]
    assert distinct_names([Path("/1.png"), Path("1.png")]) == ["/1.png", "1.png"]
    assert distinct_names([]) == []


def test_what_is_no_text_is_shown_as_text() -> None:
    assert distinct_names([Path("caf\udce9.png")]) == ["caf\\udce9"]
