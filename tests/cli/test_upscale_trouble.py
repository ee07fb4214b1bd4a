"""`savl upscale` with files that cannot be read or written, clashes of names, and inputs that must not change."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from savl.images.read import read_image

Run = Callable[..., Any]
Write = Callable[..., Path]


def files(folder: str = ".") -> list[str]:
    return sorted(path.as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_unreadable_files_are_named_skipped_and_make_the_exit_code_1(savl: Run, picture: Write) -> None:
    for name in ("a.png", "truncated.jpg", "z.png"):
        picture(name)
    Path("truncated.jpg").write_bytes(Path("truncated.jpg").read_bytes()[:-30])
    Path("empty.png").touch()
    Path("text.png").write_text("text")
    done = savl("upscale", "a.png", "truncated.jpg", "empty.png", "text.png", "missing.png", "z.png", "-o", "out")
    assert done.code == 1
    assert files("out") == ["out/a.png", "out/z.png"]
    for name, reason in (
        ("truncated.jpg", "truncated or corrupt JPEG"),
        ("empty.png", "the file is empty"),
        ("text.png", "not an image"),
        ("missing.png", "no such file"),
    ):
        assert f"{name}: {reason}" in done.text
        assert len(re.findall(re.escape(name), done.text)) == 2, "once when met, once in the table"
    assert "2 upscaled, 4 failed" in done.text


LONG = "x" * 300 + ".png"


@pytest.mark.parametrize("arguments", [["a.png", LONG, "-o", "out/"], [LONG, "a.png", "-o", "out"]])
def test_an_invalid_input_name_fails_only_that_file(savl: Run, picture: Write, arguments: list[str]) -> None:
    picture("a.png")
    done = savl("upscale", *arguments)
    assert done.code == 1
    assert f"{LONG}: file name too long" in done.text
    assert files("out") == ["out/a.png"]


def test_an_invalid_output_name_fails_that_file(savl: Run, picture: Write) -> None:
    picture("a.png")
    done = savl("upscale", "a.png", "-o", LONG)
    assert done.code == 1
    assert f"a.png: {LONG}: cannot be written: File name too long" in done.text
    assert files() == ["a.png"]


def test_a_locked_folder_fails_its_file_and_the_others_go_on(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "locked/b.png"):
        picture(name)
    really = os.stat

    def locked(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if "locked/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *rest, **options)

    monkeypatch.setattr(os, "stat", locked)
    done = savl("upscale", "locked/b.png", "a.png", "-o", "out/")
    assert done.code == 1
    assert "locked/b.png: permission denied" in done.text
    assert "1 upscaled, 1 failed" in done.text


@pytest.mark.parametrize("beside", [True, False])
def test_a_subfolder_that_cannot_be_listed_is_a_failure(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    picture("in/locked/b.png")
    if beside:
        picture("in/a.png")
    really = os.scandir

    def locked(path: Any) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", locked)
    done = savl("upscale", "in", "-r", "-o", "out")
    assert done.code == 1
    assert "in/locked: permission denied" in done.text
    assert os.path.exists("out/a.png") == beside


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_a_failure_and_not_waited_for(savl: Run, picture: Write) -> None:
    picture("a.png")
    os.mkfifo("pipe.png")
    done = savl("upscale", "pipe.png", "a.png")
    assert done.code == 1
    assert "pipe.png: is not a regular file" in done.text
    assert Path("a_x4.png").exists()


def test_a_folder_in_the_place_of_the_output_is_a_failure(savl: Run, picture: Write) -> None:
    picture("a.png")
    Path("a_x4.png").mkdir()
    done = savl("upscale", "a.png")
    assert done.code == 1
    assert "a_x4.png: cannot be written: exists and is not a regular file" in done.text


@pytest.mark.parametrize("arguments", [["-o", "plain/x.png"], ["-o", "plain.png/x.png", "--severity-map"]])
def test_an_output_that_cannot_be_written_is_reported_before_the_network_runs(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    from savl.inference import upscale_image

    class Unwanted:
        scale = 4

        def __call__(self, lr: object, **_: object) -> object:
            pytest.fail("the network ran")

    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: Unwanted())
    picture("a.png")
    Path("plain").write_text("no folder")
    Path("plain.png").write_text("no folder")
    done = savl("upscale", "a.png", *arguments)
    assert done.code == 1
    assert "its folder cannot be made" in done.text


@pytest.mark.parametrize("scale", ["200000", "1e308"])
def test_a_scale_beyond_all_memory_fails_with_its_numbers(savl: Run, picture: Write, scale: str) -> None:
    picture("a.png")
    done = savl("upscale", "a.png", "-o", "out.png", "--scale", scale)
    assert done.code == 1
    assert f"a.png: scale {float(scale):g} would make" in done.text
    assert files() == ["a.png"]


def test_a_link_and_its_target_in_one_folder_both_get_a_result(savl: Run, picture: Write) -> None:
    picture("in/photo.png")
    Path("in/link.png").symlink_to("photo.png")
    assert savl("upscale", "in", "-o", "out").code == 0
    assert files("out") == ["out/link.png", "out/photo.png"]


def test_a_folder_given_again_through_a_link_is_done_once(savl: Run, picture: Write) -> None:
    picture("in/photo.png")
    Path("same").symlink_to("in")
    done = savl("upscale", "in", "same", "-o", "out")
    assert done.code == 0
    assert files("out") == ["out/photo.png"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_closing_the_terminal_ends_the_work_cleanly_except_under_nohup(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    from savl.inference import upscale_image
    from tests.cli.conftest import FakeUpscaler

    class HungUp(FakeUpscaler):
        def __call__(self, lr: Any, **options: Any) -> Any:
            signal.raise_signal(signal.SIGHUP)
            return super().__call__(lr, **options)

    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: HungUp())
    picture("in/a.png")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        done = savl("upscale", "in", "-o", "out")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.code == (0 if ignored else 128 + signal.SIGHUP)
    assert os.path.exists("out") == ignored
    assert files() == (["in/a.png", "out/a.png"] if ignored else ["in/a.png"])


def test_one_bad_file_alone_gets_one_line_and_exit_code_1(savl: Run, picture: Write) -> None:
    picture("a.png")
    done = savl("upscale", "none.png", "-o", "out.png")
    assert (done.code, done.text) == (1, "none.png: no such file\n")


def test_of_two_inputs_for_one_output_the_first_is_done_and_the_other_refused(savl: Run, picture: Write) -> None:
    picture("one/a.png", value=10)
    picture("two/a.png", value=20)
    picture("two/b.png", value=30)
    done = savl("upscale", "one", "two", "-o", "out")
    assert done.code == 1
    assert "two/a.png: would be written to out/a.png, as one/a.png is; do it in another run" in done.text
    assert files("out") == ["out/a.png", "out/b.png"]
    assert read_image("out/a.png").pixels.max() == 10
    assert "2 upscaled, 1 failed" in done.text


@pytest.mark.parametrize(
    ("names", "arguments", "results"),
    [
        (["a.png", "a.jpg"], [], ["a_x4.png", "a.jpg_x4.png"]),
        (["a.jpg", "a.webp", "a.TIF", "b.jpg"], [], ["a.jpg_x4.png", "a.webp_x4.png", "a.TIF_x4.png", "b_x4.png"]),
        (["a.png", "a.jpg"], ["-o", "out"], ["out/a.png", "out/a.jpg.png"]),
        (["a.jpg", "a.jpeg"], ["--suffix", ""], ["a.jpg.png", "a.jpeg.png"]),
        (["a.png", "a.jpg"], ["--severity-map"], ["a_x4.png", "a.jpg_x4.png"]),
        (["a.png", "a.PNG"], [], ["a_x4.png", "a_x4.PNG"]),
    ],
)
def test_inputs_that_differ_in_their_extensions_get_distinct_outputs(
    savl: Run, picture: Write, names: list[str], arguments: list[str], results: list[str]
) -> None:
    for value, name in enumerate(names):
        picture(f"in/{name}", value=50 * value)
    if len(os.listdir("in")) < len(names):
        pytest.skip("this file system does not tell names apart by case")
    for run in range(2):
        done = savl("upscale", "in", "-f", "png", *arguments)
        assert done.code == 0, done.text
        assert f"{len(names)} {'kept' if run else 'upscaled'}" in done.text
    for value, result in enumerate(results):
        pixels = read_image(result if result.startswith("out/") else f"in/{result}").pixels
        assert pixels.shape == (24, 32, 3)
        assert abs(int(pixels.mean()) - 50 * value) <= 2


def test_a_result_with_the_name_of_another_result_fails_only_that_file(savl: Run, picture: Write) -> None:
    for name in ("a.png", "a.jpg", "a.jpg.png"):
        picture(f"in/{name}")
    done = savl("upscale", "in", "-o", "out", "-f", "png")
    assert done.code == 1
    assert "2 upscaled, 1 failed" in done.text
    assert files("out") == ["out/a.jpg.png", "out/a.png"]


def test_the_same_input_twice_is_done_once(savl: Run, picture: Write) -> None:
    picture("a.png")
    done = savl("upscale", "a.png", "./a.png", "*.png", "-o", "out/")
    assert done.code == 0
    assert done.text.count("->") == 2  # one line: the names, the sizes


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("arguments", [["a.png", "-o", "a.png"], ["a.png", "-o", "."], ["a.png", "--suffix", ""]])
def test_an_input_is_never_written_over(savl: Run, picture: Write, arguments: list[str], overwrite: list[str]) -> None:
    before = picture("a.png").read_bytes()
    done = savl("upscale", *arguments, *overwrite)
    assert done.code == 2
    assert "over itself" in done.text
    assert Path("a.png").read_bytes() == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_input_that_would_be_written_over_itself_fails_only_itself(
    savl: Run, picture: Write, overwrite: list[str]
) -> None:
    before = picture("in/a.png").read_bytes()
    picture("in/b.jpg")
    done = savl("upscale", "in", "-o", "in", "-f", "png", *overwrite)
    assert done.code == 1
    assert "in/a.png: would be written over itself; choose another -o, or --suffix" in done.text
    assert "1 upscaled, 1 failed" in done.text
    assert Path("in/a.png").read_bytes() == before
    assert files("in") == ["in/a.png", "in/b.jpg", "in/b.png"]


def test_another_input_is_never_written_over(savl: Run, picture: Write) -> None:
    picture("a.png")
    before = picture("a_x4.png", value=9).read_bytes()
    assert savl("upscale", "a.png", "a_x4.png", "--overwrite").code == 2
    assert Path("a_x4.png").read_bytes() == before
    done = savl("upscale", "a.png", "a_x4.png")
    assert done.code == 1
    assert "a.png: would be written to a_x4.png, which is an input too" in done.text
    assert files() == ["a.png", "a_x4.png", "a_x4_x4.png"]
    assert Path("a_x4.png").read_bytes() == before
    assert read_image("a_x4_x4.png").pixels.max() == 9


def test_a_result_gets_another_name_if_an_input_has_its_name(savl: Run, picture: Write) -> None:
    picture("a.webp", value=50)
    before = picture("a_x4.png", value=9).read_bytes()
    assert savl("upscale", "a.webp", "a_x4.png", "-f", "png").code == 0
    assert files() == ["a.webp", "a.webp_x4.png", "a_x4.png", "a_x4_x4.png"]
    assert Path("a_x4.png").read_bytes() == before
