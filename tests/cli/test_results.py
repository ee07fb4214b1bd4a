"""Results of savl in folders and globs are skipped, and one message reports their number."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from savl.images.format import FORMATS, PNG
from savl.images.read import read_image
from savl.images.result_mark import read_mark
from savl.images.write import write_image

Run = Callable[..., Any]
Write = Callable[..., Path]


def files(folder: str = ".") -> list[str]:
    return sorted(path.as_posix() for path in Path(folder).rglob("*") if path.is_file())


RUNS: list[list[str]] = [
    ["--severity-map", "--strength-map"],
    [],
    ["--scale", "2"],
    ["-f", "webp"],
    ["-f", "jpg"],
    ["-f", "tiff"],
    ["--suffix", "foo"],
    ["--suffix", "", "-f", "webp"],
    ["-o", "t/out"],
    ["-r", "-o", "t/out2"],
    ["-r", "--scale", "3"],
    ["--overwrite"],
]


@pytest.mark.parametrize("command", ["upscale", "degrade"])
@pytest.mark.parametrize("inputs", ["folder", "glob", "shell"])
def test_no_run_processes_the_results_of_another(savl: Run, picture: Write, command: str, inputs: str) -> None:
    picture("t/a.png", shape=(24, 32, 3))
    if command == "upscale":
        picture("t/a.tif", shape=(24, 32, 3))
    sides = {read_image(path).pixels.shape[0] for path in ("t/a.png",)}
    assert sides == {24}
    for options in RUNS:
        if command == "degrade" and "jpg" in options:
            continue
        if command == "degrade":
            options = [option for option in options if option != "--strength-map"]
        if inputs != "folder" and "-r" in options:
            continue
        arguments = {
            "folder": ["t"],
            "glob": ["t/*.*"],
            "shell": [path for path in files("t") if path.count("/") == 1],
        }[inputs]
        done = savl(command, *(path for path in arguments if not path.endswith(".npy")), *options)
        assert done.code == 0, f"{options}: {done.text}"
        assert "1 failed" not in done.text
        assert done.text.count("--include-results") <= 1
    for path in map(Path, files("t")):
        if path.suffix == ".npy" or path.stem.endswith(("_severity", "_strength")) or path.name in ("a.png", "a.tif"):
            continue
        height = read_image(path).pixels.shape[0]
        accepted = (96, 48, 72) if command == "upscale" else (6, 12, 8)
        assert height in accepted, f"{path} was made from a result"
        assert read_mark(path) == f"{command}d"
        assert path.name.count("_") <= 1, f"{path} was made from a result"


def test_one_message_counts_the_results_that_are_skipped(savl: Run, picture: Write) -> None:
    picture("t/a.png")
    picture("t/b.png")
    assert savl("upscale", "t", "--severity-map").code == 0
    done = savl("upscale", "t", "--scale", "2")
    assert done.code == 0
    line = "skipped 4 results of earlier runs, such as t/a_x4.png; use --include-results to process them"
    assert done.text.splitlines()[0] == line
    assert "2 upscaled" in done.text
    assert savl("upscale", "t", "--include-results", "-o", "all").code == 0
    assert len(files("all")) == 8
    assert savl("upscale", "t", "--include-results").code == 0
    assert "t/a_x4_x4.png" in files("t")


def test_a_folder_that_contains_only_results_is_a_usage_error(savl: Run, picture: Write) -> None:
    picture("t/a.png")
    assert savl("upscale", "t", "-o", "out").code == 0
    done = savl("upscale", "out", "-o", "again")
    assert done.code == 2
    text = re.sub(r"[\s│]+", " ", done.text)
    assert "no input image remains: skipped 1 result of an earlier run, out/a.png" in text
    assert "use --include-results to process it" in text


def test_a_result_given_on_the_command_line_is_processed(savl: Run, picture: Write) -> None:
    picture("a.png")
    assert savl("upscale", "a.png").code == 0
    assert savl("upscale", "a_x4.png").code == 0
    assert read_image("a_x4_x4.png").pixels.shape[0] == 96


@pytest.mark.parametrize("arguments", [["t", "t/a_x4.png"], ["t/a_x4.png", "t"]])
def test_a_result_given_in_addition_to_its_folder_is_processed(savl: Run, picture: Write, arguments: list[str]) -> None:
    picture("t/a.png")
    assert savl("upscale", "t").code == 0
    assert savl("upscale", *arguments, "-o", "out").code == 0
    assert files("out") == ["out/a.png", "out/a_x4.png"]


def test_degraded_images_are_inputs_of_upscale_and_upscaled_images_of_degrade(savl: Run, picture: Write) -> None:
    picture("hr/a.png", shape=(24, 32, 3))
    assert savl("degrade", "hr", "-o", "lr", "--severity-map").code == 0
    done = savl("upscale", "lr", "-o", "sr")
    assert done.code == 0, done.text
    assert files("sr") == ["sr/a.png"], "and the severity map is none"
    assert savl("degrade", "sr", "-o", "lr2").code == 0
    assert files("lr2") == ["lr2/a.png"]


@pytest.mark.parametrize(
    ("names", "results"),
    [
        (["a.png", "a_x4.png"], ["a_x4.png"]),
        (["a.jpg", "a_x2.5.webp", "a_x4_severity.png"], ["a_x2.5.webp", "a_x4_severity.png"]),
        (["a.jpg", "a.jpg_x4.png", "a_severity.png", "a.jpg_severity.png"], ["a.jpg_x4.png", "a_severity.png"]),
        (["a.jpg", "a_strength.png", "a.jpg_x4_strength.png"], ["a_strength.png", "a.jpg_x4_strength.png"]),
        (["a_x4.png", "b_severity.png", "b_strength.png", "x4.png", "axx4.png", "c_x4y.png"], []),
        (["a.png", "a_lr.png", "ab_x4.png", "a_final.png"], []),
    ],
)
def test_a_file_without_a_mark_is_recognised_by_its_name_beside_the_original(
    savl: Run, picture: Write, names: list[str], results: list[str]
) -> None:
    for name in names:
        picture(f"t/{name}")
        assert read_mark(f"t/{name}") is None
    done = savl("upscale", "t", "-o", "out", "-f", "png")
    assert done.code == 0
    made = {Path(path).stem for path in files("out")}
    left_out = {"a.jpg_severity.png", *results} if results else set()
    assert made == {Path(name).stem for name in names if name not in left_out}


def test_the_mark_takes_precedence_over_the_name(savl: Run, picture: Write) -> None:
    """A marked file with another name is a result; a file with another mark and the name of a result is not."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    picture("t/a.png")
    write_image("t/holiday.png", pixels, image_format=PNG, mark="upscaled")
    write_image("t/a_x4.png", pixels, image_format=PNG, mark="degraded")
    assert savl("upscale", "t", "-o", "out").code == 0
    assert files("out") == ["out/a.png", "out/a_x4.png"]


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_results_in_every_format_are_recognised(savl: Run, picture: Write, image_format: Any) -> None:
    picture("t/a.png")
    assert savl("upscale", "t", "-o", f"t/other.{image_format.name}.d/", "-f", image_format.name).code == 0
    done = savl("upscale", "t", "-r", "-o", "out")
    assert files("out") == ["out/a.png"], done.text
