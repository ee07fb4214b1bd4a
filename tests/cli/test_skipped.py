"""One message counts the files of a folder that are not inputs. `--exclude` skips more files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
Write = Callable[..., Path]


def files(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def fill(picture: Write) -> None:
    for name in ("in/a.png", "in/b.JPG", "in/deep/c.png", "in/deep/draft/d.png", "in/.cache/e.png", "in/.f.png"):
        picture(name)
    for name in ("notes.txt", "more.TXT", "README", "deep/x.psd", ".a_x4.png.00ff.part", ".a_x4.png.12345678.claim"):
        Path("in", name).write_text("no image")
    picture("elsewhere/linked.png")
    Path("in/link").symlink_to(Path("elsewhere").resolve(), target_is_directory=True)


@pytest.mark.parametrize("command", ["upscale", "degrade"])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [],
            "skipped: 2 .txt, 2 hidden, 1 linked folder (not followed), 1 subfolder (use -r to search it), "
            "1 without a suffix",
        ),
        (["-r"], "skipped: 2 .txt, 2 hidden, 1 .psd, 1 linked folder (not followed), 1 without a suffix"),
    ],
)
def test_skipped_files_are_counted_in_one_line(
    savl: Run, picture: Write, command: str, arguments: list[str], line: str
) -> None:
    fill(picture)
    done = savl(command, "in", "-o", "out", *arguments)
    lines = [text for text in done.text.splitlines() if text.startswith("skipped")]
    assert len(lines) == 1
    assert sorted(lines[0].removeprefix("skipped: ").split(", ")) == sorted(line.removeprefix("skipped: ").split(", "))


def test_there_is_no_message_without_skipped_files(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    assert "skipped" not in savl("upscale", "in", "-o", "out").text


def test_many_kinds_of_skipped_files_are_one_line(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    for number in range(20):
        Path(f"in/x.k{number}").touch()
    done = savl("upscale", "in", "-o", "out")
    assert "12 of other kinds" in done.text
    assert done.text.count("skipped") == 1


def test_the_error_for_a_folder_without_pictures_counts_its_other_files(savl: Run, picture: Write) -> None:
    fill(picture)
    Path("void/sub").mkdir(parents=True)
    Path("void/movie.mp4").touch()
    done = savl("upscale", "void")
    assert done.code == 2
    text = re.sub(r"[\s│]+", " ", done.text)
    skipped = "1 subfolder (use -r to search it), 1 .mp4 (a video is upscaled if you name it)"
    assert f"use -r to search its subfolders (skipped: {skipped})" in text


@pytest.mark.parametrize(
    ("patterns", "results"),
    [
        (["*.JPG"], ["a.png", "deep/c.png", "deep/draft/d.png"]),
        (["draft"], ["a.png", "b.JPG", "deep/c.png"]),
        (["draft/"], ["a.png", "b.JPG", "deep/c.png"]),
        (["deep"], ["a.png", "b.JPG"]),
        (["deep/*.png"], ["a.png", "b.JPG"]),
        (["deep/c.png", "a.*"], ["b.JPG", "deep/draft/d.png"]),
        (["**/d.png"], ["a.png", "b.JPG", "deep/c.png"]),
        (["deep/**/*.png"], ["a.png", "b.JPG"]),
        (["**/deep/**/d.png"], ["a.png", "b.JPG", "deep/c.png"]),
        (["/deep/c.png"], ["a.png", "b.JPG", "deep/draft/d.png"]),
        (["./a.png"], ["b.JPG", "deep/c.png", "deep/draft/d.png"]),
        (["nothing*"], ["a.png", "b.JPG", "deep/c.png", "deep/draft/d.png"]),
    ],
)
def test_files_and_folders_can_be_excluded(savl: Run, picture: Write, patterns: list[str], results: list[str]) -> None:
    fill(picture)
    options = [text for pattern in patterns for text in ("--exclude", pattern)]
    done = savl("upscale", "in", "-r", "-o", "out", *options)
    assert done.code == 0
    assert files("out") == results
    assert ("by --exclude" in done.text) == (len(results) < 4)
    assert ("--exclude nothing* matches nothing" in done.text) == (len(results) == 4)


def test_only_globs_that_match_nothing_are_reported(savl: Run, picture: Write) -> None:
    fill(picture)
    patterns = ["*.txt", ".cache", "link", "a.png", "a*", "none.png"]
    done = savl("upscale", "in", "-o", "out", *(text for pattern in patterns for text in ("--exclude", pattern)))
    assert done.code == 0
    assert [line for line in done.text.splitlines() if "matches nothing" in line] == [
        "--exclude none.png matches nothing"
    ]


@pytest.mark.parametrize("pattern", ["deep", "deep/", "in/deep", "d*p", "**/deep", "in/**/deep", "{cwd}/in/deep"])
def test_a_folder_given_as_an_argument_can_be_excluded(savl: Run, picture: Write, pattern: str) -> None:
    fill(picture)
    arguments = ["in/a.png", "in/b.JPG", "in/deep"]
    done = savl("upscale", *arguments, "-r", "-o", "out", "--exclude", pattern.format(cwd=Path.cwd()))
    assert done.code == 0
    assert files("out") == ["a.png", "b.JPG"]
    assert "skipped: 1 by --exclude" in done.text


def test_a_glob_does_not_match_parents_of_the_input_folder(savl: Run, picture: Write) -> None:
    picture("draft/in/a.png")
    done = savl("upscale", "draft/in", "-o", "out", "--exclude", "draft")
    assert done.code == 0
    assert files("out") == ["a.png"]


@pytest.mark.parametrize("pattern", ["{cwd}/in/deep", "{cwd}/in/deep/", "{cwd}/**/deep/**", "{cwd}/in/*/*.png"])
def test_an_absolute_glob_is_compared_with_absolute_paths(savl: Run, picture: Write, pattern: str) -> None:
    fill(picture)
    done = savl("upscale", "in", "-r", "-o", "out", "--exclude", pattern.format(cwd=Path.cwd()))
    assert done.code == 0
    assert files("out") == ["a.png", "b.JPG"]
    assert "matches nothing" not in done.text


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("quoted", [False, True])
def test_exclusion_applies_to_globs_and_file_arguments(savl: Run, picture: Write, quoted: bool, absolute: bool) -> None:
    names = [picture(f"in/{name}.png") for name in ("a", "b", "c")]
    root = Path.cwd() if absolute else Path()
    arguments = [root / "in/*.png"] if quoted else [root / name for name in names]
    done = savl("upscale", *arguments, "-o", "out", "--exclude", "b.*")
    assert done.code == 0
    assert files("out") == ["a.png", "c.png"]
    assert "skipped: 1 by --exclude" in done.text


def test_excluding_all_inputs_is_a_usage_error(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    for argument in ("in", "in/*.png", "in/a.png"):
        done = savl("upscale", argument, "-o", "out", "--exclude", "*.png")
        assert done.code == 2
        assert "skipped: 1 by --exclude" in re.sub(r"[\s│]+", " ", done.text)
    assert not os.path.exists("out")
