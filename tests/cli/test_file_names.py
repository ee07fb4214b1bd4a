"""File names that are no text in the encoding of the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import savl as savl_package
from savl.cli import loop

PROGRAM = """
import os
from pathlib import Path
from savl.atomic_write import write_atomically
from savl.cli.claims import claim
for name in os.listdir("."):
    with claim(Path(name)) as claimed:
        assert claimed.granted
        assert len(os.listdir(".")) == 4, os.listdir(".")
        write_atomically(Path(name), b"new")
"""


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_names_of_other_encodings_are_claimed_and_written(tmp_path: Path) -> None:
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
def test_a_name_that_cannot_be_claimed_costs_its_file_alone(
    savl: Callable[..., Any], picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    genuine = loop.claim

    def refusing(output: Path) -> Any:
        if output.stem == "a":
            "\udcff".encode()
        return genuine(output)

    monkeypatch.setattr(loop, "claim", refusing)
    picture("in/a.png")
    picture("in/b.png")
    done = savl(command, "in", "-o", "out")
    assert done.code == 1
    assert "in/a.png: 'utf-8' codec can't encode" in done.text
    assert os.listdir("out") == ["b.png"]
