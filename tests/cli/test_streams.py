"""Closed pipes, full devices and closed descriptors for messages do not end the work or change the exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import savl
from savl.cli.streams import _TolerantFile, tolerant_streams
from savl.images.format import PNG
from savl.images.write import write_image

# Each way is a child of its own, whose streams are lost before `savl` begins.
PROGRAM = """
def pipe():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)

def full():
    device = os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, 1)
    os.dup2(device, 2)

def closed():
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.close(number)
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)

for lose, source in ((pipe, "good"), (full, "good"), (closed, "mixed")):
    if child := os.fork():
        print(lose.__name__, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        lose()
        main(["upscale", source, "-o", lose.__name__])
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(savl.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def shell(folder: Path, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_pictures_are_processed_even_if_messages_cannot_be_printed(fork: Callable[..., Any], tmp_path: Path) -> None:
    for folder in ("good", "mixed"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b", "c"):
            write_image(tmp_path / folder / f"{name}.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG)
    (tmp_path / "mixed/broken.png").write_bytes(b"no image")
    code, output, errors = fork(PROGRAM).wait()
    assert (code, errors) == (0, "")
    assert output.splitlines() == ["pipe 0", "full 0", "closed 1"]
    for way in ("pipe", "full", "closed"):
        assert sorted(path.name for path in (tmp_path / way).iterdir()) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [(">/dev/full", 1, "standard output cannot be written: No space left"), ("| true", 0, ""), (">&-", 0, "")],
)
def test_losing_standard_output_is_an_error_unless_its_reader_has_gone(
    tmp_path: Path, redirection: str, code: int, words: str
) -> None:
    command = f'"{sys.executable}" -m savl --version'
    process = shell(tmp_path, f"({command}; echo $? >code) {redirection}")
    output, errors = process.communicate(timeout=60)
    assert int((tmp_path / "code").read_text()) == code
    assert output == ""
    assert (words in errors) if words else (errors == "")


def test_a_usage_error_has_its_exit_code_even_if_its_message_cannot_be_written(tmp_path: Path) -> None:
    process = shell(tmp_path, f'"{sys.executable}" -m savl upscale --quality 1000 x.png 2>/dev/full')
    process.communicate(timeout=60)
    assert process.returncode == 2


def test_replaced_standard_streams_are_left_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with tolerant_streams():
        assert (sys.stdout, sys.stderr) == before
        print("a line")
    assert capsys.readouterr().out == "a line\n"


def test_the_first_error_of_a_stream_is_recorded() -> None:
    with _TolerantFile("/dev/full", "wb") as stream:
        assert stream.write(b"abc") == 3
        assert stream.lost is not None
        assert stream.lost.errno == errno.ENOSPC
