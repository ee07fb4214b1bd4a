"""`-` is standard input or standard output; and `--page` for files with several pages."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from savl.cli import streams
from savl.images.read import read_image

Run = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Makes standard input hold bytes."""

    def hold(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        monkeypatch.setattr(streams, "was_closed", lambda name: False)

    return hold


@pytest.fixture
def redirect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Makes descriptor 1 a file, from the call on: pytest sets it to its own between the stages of a test."""
    kept = os.dup(1)

    def to_file() -> Path:
        path = tmp_path_factory.mktemp("standard") / "output"
        with open(path, "wb") as file:
            os.dup2(file.fileno(), 1)
        return path

    yield to_file
    os.dup2(kept, 1)
    os.close(kept)


@pytest.mark.parametrize("command", ["upscale", "degrade"])
@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_from_standard_input_to_standard_output(
    savl: Run, picture: Write, standard_input: Any, redirect: Any, command: str, ending: str
) -> None:
    standard_output = redirect()
    standard_input(picture("a.png", shape=(24, 32, 3)).read_bytes())
    done = savl(command, "-", "-o", "-", "-f", ending)
    assert done.code == 0, done.text
    assert "stdin -> standard output  32x24 -> " in done.text
    out = read_image(standard_output.read_bytes())
    assert out.format.name == ending
    assert out.pixels.shape == ((96, 128, 3) if command == "upscale" else (6, 8, 3))
    assert sorted(os.listdir()) == ["a.png"]


def test_standard_output_has_the_same_content_as_a_file(savl: Run, picture: Write, redirect: Any) -> None:
    standard_output = redirect()
    picture("a.png")
    assert savl("upscale", "a.png", "-o", "-").code == 0
    assert savl("upscale", "a.png", "-o", "out.png").code == 0
    assert standard_output.read_bytes() == Path("out.png").read_bytes()
    assert sorted(os.listdir()) == ["a.png", "out.png"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_without_a_format_it_is_that_of_the_input_by_its_content(
    savl: Run, picture: Write, standard_input: Any, redirect: Any, ending: str
) -> None:
    standard_output = redirect()
    standard_input(picture(f"a.{ending}").read_bytes())
    assert savl("upscale", "-", "-o", "-").code == 0
    assert read_image(standard_output.read_bytes()).format.name == {"tif": "tiff"}.get(ending, ending)


def test_a_format_that_is_read_only_becomes_png(savl: Run, picture: Write, standard_input: Any, redirect: Any) -> None:
    standard_output = redirect()
    picture("a.png")
    Image.open("a.png").save("a.bmp")
    standard_input(Path("a.bmp").read_bytes())
    assert savl("upscale", "-", "-o", "-").code == 0
    assert read_image(standard_output.read_bytes()).format.name == "png"


def test_from_standard_input_to_a_file_and_to_a_folder(savl: Run, picture: Write, standard_input: Any) -> None:
    content = picture("a.jpg").read_bytes()
    picture("b.png")
    standard_input(content)
    assert savl("upscale", "-", "-o", "out.png").code == 0
    assert read_image("out.png").pixels.shape == (24, 32, 3)
    standard_input(content)
    assert savl("upscale", "-", "b.png", "-", "-o", "out/").code == 0
    assert sorted(os.listdir("out")) == ["b.png", "stdin.jpg"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "stdin: the file is empty"), (b"text", "stdin: not an image"), (None, "stdin: truncated or corrupt PNG")],
)
def test_input_that_is_not_a_picture_fails_and_writes_nothing(
    savl: Run, picture: Write, standard_input: Any, redirect: Any, content: bytes | None, reason: str
) -> None:
    standard_output = redirect()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture("a.png"))
    standard_input(Path("a.png").read_bytes()[:5000] if content is None else content)
    done = savl("upscale", "-", "-o", "-")
    assert done.code == 1
    assert reason in done.text
    assert standard_output.read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-"], "- is standard input, so -o is required"),
        (["a.png", "b.png", "-o", "-"], "-o - writes one image to standard output"),
        (["in", "-o", "-"], "-o - writes one image to standard output"),
        (["*.png", "-o", "-"], "-o - writes one image to standard output"),
        (["a.png", "-o", "-", "--severity-map"], "--severity-map needs more files: name a file or a folder"),
        (["a.png", "-o", "-", "--strength-map"], "--strength-map needs more files: name a file or a folder"),
        (["a.png", "--page", "0"], "--page"),
    ],
)
def test_contradictory_arguments_are_a_usage_error(
    savl: Run, picture: Write, redirect: Any, arguments: list[str], words: str
) -> None:
    standard_output = redirect()
    picture("a.png")
    picture("in/b.png")
    done = savl("upscale", *arguments)
    assert done.code == 2
    assert words in re.sub(r"[\s│]+", " ", done.text)
    assert standard_output.read_bytes() == b""


def test_a_terminal_neither_gives_nor_gets_a_picture(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("a.png")
    monkeypatch.setattr(os, "isatty", lambda number: True)
    done = savl("upscale", "a.png", "-o", "-")
    assert done.code == 2
    assert "redirect it: -o - >large.png" in re.sub(r"[\s│]+", " ", done.text)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    done = savl("upscale", "-", "-o", "out.png")
    assert done.code == 2
    assert "redirect it: - <photo.jpg" in re.sub(r"[\s│]+", " ", done.text)


@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_standard_input_that_is_open_for_writing_only_is_a_usage_error(
    savl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    descriptor = os.open("junk", os.O_WRONLY | os.O_CREAT)
    with io.TextIOWrapper(io.BufferedReader(io.FileIO(os.dup(descriptor), "rb"))) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        done = savl(command, "-", "-o", "out.png")
    os.close(descriptor)
    assert done.code == 2
    assert "standard input, which cannot be read: bad file descriptor" in re.sub(r"[\s│]+", " ", done.text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_picture_that_cannot_be_sent_to_standard_output_is_a_failure(
    savl: Run, picture: Write, redirect: Any
) -> None:
    redirect()
    picture("a.png")
    full = os.open("/dev/full", os.O_WRONLY)
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor, reason in ((full, "No space left on device"), (writing, "was closed by its reader")):
        os.dup2(descriptor, 1)
        os.close(descriptor)
        done = savl("upscale", "a.png", "-o", "-")
        assert done.code == 1
        assert f"a.png: standard output: {'cannot be written: ' if descriptor == full else ''}{reason}" in done.text


def test_output_of_libraries_is_not_in_the_picture(
    savl: Run, picture: Write, redirect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_output = redirect()
    from savl.inference import upscale_image
    from tests.cli.conftest import FakeUpscaler

    class Talkative(FakeUpscaler):
        def __call__(self, lr: Any, **options: Any) -> Any:
            os.write(1, b"talk")
            return super().__call__(lr, **options)

    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: Talkative())
    picture("a.png")
    assert savl("upscale", "a.png", "-o", "-").code == 0
    assert read_image(standard_output.read_bytes()).pixels.shape == (24, 32, 3)
    assert b"talk" not in standard_output.read_bytes()


def test_each_page_has_a_result_of_its_own(savl: Run, picture: Write) -> None:
    picture("dot.png")
    pages = [Image.new("RGB", (8, 6), (value, value, value)) for value in (10, 20, 30)]
    pages[0].save("scan.tif", save_all=True, append_images=pages[1:])
    done = savl("upscale", "scan.tif")
    assert done.code == 0
    assert done.text.count("page 1 of 3; --page picks another") == 1
    for page in (2, 3):
        done = savl("upscale", "scan.tif", "--page", page)
        assert done.code == 0
        assert "--page" not in done.text
    for name, value in (("scan_x4.tif", 10), ("scan_p2_x4.tif", 20), ("scan_p3_x4.tif", 30)):
        assert set(read_image(name).pixels.flat) == {value}
    done = savl("upscale", "scan.tif", "--page", "4", "-o", "out.tif")
    assert done.code == 1
    assert not os.path.exists("out.tif")
    assert savl("upscale", ".", "-o", "out").code == 0
    assert sorted(os.listdir("out")) == ["dot.png", "scan.tif"], "and results of pages are results"


def test_degrading_has_pages_as_well(savl: Run, picture: Write) -> None:
    picture("dot.png")
    pages = [Image.new("RGB", (16, 16), (value, value, value)) for value in (10, 200)]
    pages[0].save("scan.tif", save_all=True, append_images=pages[1:])
    assert "page 1 of 2; --page picks another" in savl("degrade", "scan.tif").text
    assert savl("degrade", "scan.tif", "--page", 2).code == 0
    assert read_image("scan_p2_lr.png").pixels.mean() > 100 > read_image("scan_lr.png").pixels.mean()
    assert savl("degrade", ".", "-o", "out").code == 0
    assert sorted(os.listdir("out")) == ["dot.png", "scan.png"]
