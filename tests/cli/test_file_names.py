"""File names that are not text in the encoding of the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import savl as savl_package
from savl.images import job
from savl.images.errors import UnreadableImage
from savl.printable import printable

PROGRAM = """
import os
from pathlib import Path
from savl.atomic_write import write_atomically
from savl.images.locks import lock_output
for name in os.listdir("."):
    with lock_output(Path(name)) as lock:
        assert lock.acquired
        assert len(os.listdir(".")) == 4, os.listdir(".")
        write_atomically(Path(name), b"new")
"""


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_files_with_names_of_other_encodings_are_locked_and_written(tmp_path: Path) -> None:
    names = ["é.png".encode(), b"\xff\xfe.png", ("é" * 120 + ".png").encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path(savl_package.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted(names)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"new"}


@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_a_name_that_cannot_be_locked_fails_only_that_file(
    savl: Callable[..., Any], picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    genuine = job.lock_output

    def refusing(output: Path) -> Any:
        if output.stem == "a":
            "\udcff".encode()
        return genuine(output)

    monkeypatch.setattr(job, "lock_output", refusing)
    picture("in/a.png")
    picture("in/b.png")
    done = savl(command, "in", "-o", "out")
    assert done.code == 1
    assert "in/a.png: 'utf-8' codec can't encode" in done.text
    assert os.listdir("out") == ["b.png"]


STEERING = ["new\nline.png", "evil\x1b[31m.png", "back\r.png", "c1\x9b2J.png", "turned\u202egnp.png", "sep\u2028.png"]
SHOWN = [
    r"new\nline.png",
    r"evil\x1b[31m.png",
    r"back\r.png",
    r"c1\x9b2J.png",
    r"turned\u202egnp.png",
    r"sep\u2028.png",
]


@pytest.mark.skipif(sys.platform == "win32", reason="such names are forbidden there")
@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_names_with_control_characters_give_one_plain_line_each(
    savl: Callable[..., Any], picture: Callable[..., Path], command: str
) -> None:
    for name in STEERING:
        picture(f"in/{name}")
    Path("in/broken\n.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = savl(command, "in", "-o", "out")
    lines = done.text.splitlines()
    for shown in SHOWN:
        assert sum(line.startswith(f"in/{shown} -> out/") for line in lines) == 1
    assert sum(line.startswith(r"in/broken\n.png: ") for line in lines) == 1
    assert all(line.isprintable() for line in done.text.split("\n"))
    done = savl(command, "in/new\nline.png", "-o", "out")
    assert r"in/new\nline.png: kept out/new\nline.png" in done.text
    done = savl(command, "in/broken\n.png", "-o", "in/new\nline.png/there.png")
    assert done.code != 0
    assert "new\nline" not in done.text


def test_names_in_other_scripts_and_emoji_stay_as_they_are() -> None:
    for name in (
        "Фото 1.png",
        "写真\u3000一.png",
        "👩\u200d🚀.png",
        "a\u00a0b.png",
        "\u05d0\u200f.png",
        "back\\slash.png",
    ):
        assert printable(name) == name
    assert printable(os.fsdecode(b"\xff\xe9.png")) == r"\xff\xe9.png"


def test_errors_name_files_plainly_and_keep_the_path() -> None:
    error = UnreadableImage("a\nb\x1b.png", "is empty")
    assert str(error) == r"a\nb\x1b.png: is empty"
    assert error.path == "a\nb\x1b.png"
