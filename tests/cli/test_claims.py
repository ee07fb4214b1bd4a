"""Several `savl` processes on the same files: each file is done once, and none is missing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import savl as savl_package
from savl.cli import claims
from savl.cli.claims import claim, claim_path
from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.write import write_image

fcntl = pytest.importorskip("fcntl")

Run = Callable[..., Any]
Write = Callable[..., Path]


def test_a_claim_is_granted_to_one_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "deep/er/a.png"
    for _ in range(2):
        with claim(output) as first, claim(output) as second, claim(output.with_name("b.png")) as other:
            assert (first.granted, second.granted, other.granted) == (True, False, True)
            assert len(list(output.parent.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [], "nor the folders that were made for it"


def test_a_folder_with_a_result_stays(tmp_path: Path) -> None:
    with claim(tmp_path / "out/a.png"):
        (tmp_path / "out/a.png").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_two_names_of_one_output_are_one_claim(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b.png").symlink_to("a.png")
    for other in ("link/a.png", "b.png"):
        with claim(tmp_path / "a.png"), claim(tmp_path / other) as again:
            assert not again.granted, other


def test_long_names_that_begin_alike_are_two_claims(tmp_path: Path) -> None:
    with claim(tmp_path / f"{'x' * 250}1.png") as first, claim(tmp_path / f"{'x' * 250}2.png") as second:
        assert first.granted
        assert second.granted


def test_what_a_kill_left_behind_blocks_nobody(tmp_path: Path) -> None:
    claim_path(tmp_path / "a.png").touch()
    with claim(tmp_path / "a.png") as claimed:
        assert claimed.granted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_files_cannot_be_locked_every_claim_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path / "a.png") as claimed:
        assert claimed.granted
    assert list(tmp_path.iterdir()) == []


def test_where_files_have_no_fixed_numbers_every_claim_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with claim(tmp_path / "a.png") as claimed:
        assert claimed.granted
    assert list(tmp_path.iterdir()) == []


def test_on_windows_every_claim_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "fcntl", None)
    with claim(tmp_path / "a.png") as claimed:
        assert claimed.granted
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_made_every_claim_is_granted(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with claim(tmp_path / "plain/a.png") as claimed:
        assert claimed.granted


def hold(output: Path, until: Path, then: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    """Another process, which holds a claim until a file appears, and then does something; what says that it holds."""
    held = threading.Event()

    def run() -> None:
        with claim(output) as claimed:
            assert claimed.granted
            held.set()
            deadline = time.monotonic() + 60
            while not until.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.5)  # until the others have nothing left to do but to wait
            then()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, held


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_what_another_process_does_is_waited_for_and_kept(savl: Run, picture: Write, overwrite: list[str]) -> None:
    for name in ("a.png", "b.png"):
        picture(f"in/{name}")
    Path("out").mkdir()
    if overwrite:
        Path("out/a.png").write_bytes(b"old")
    thread, held = hold(
        Path("out/a.png"), Path("out/b.png"), lambda: picture("out/new.png", value=7).replace("out/a.png")
    )
    assert held.wait(10)
    done = savl("upscale", "in", "-o", "out", *overwrite)
    thread.join()
    assert done.code == 0
    assert "waiting for another process, which is working on in/a.png" in done.text
    assert "in/a.png: kept out/a.png, which another process has just written" in done.text
    assert "1 upscaled, 1 kept" in done.text
    assert read_image("out/a.png").pixels.max() == 7
    assert sorted(os.listdir("out")) == ["a.png", "b.png"]


def test_what_another_process_failed_to_do_is_done(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    picture("in/b.png")
    thread, held = hold(Path("out/a.png"), Path("out/b.png"), lambda: None)
    assert held.wait(10)
    done = savl("upscale", "in", "-o", "out")
    thread.join()
    assert done.code == 0
    assert "2 upscaled" in done.text
    assert sorted(os.listdir("out")) == ["a.png", "b.png"]


@pytest.mark.parametrize("maps", [[], ["--severity-map"]])
def test_an_output_that_appears_without_a_claim_counts_as_kept(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, maps: list[str]
) -> None:
    from savl.cli import batch
    from tests.cli.conftest import FakeUpscaler

    class Overtaken(FakeUpscaler):
        def __call__(self, lr: Any, **options: Any) -> Any:
            if not Path("out/a.png").exists():
                picture("out/a.png", value=7)
            return super().__call__(lr, **options)

    monkeypatch.setattr(batch, "as_upscaler", lambda model, **settings: Overtaken())
    picture("in/a.png")
    picture("in/b.png")
    done = savl("upscale", "in", "-o", "out", *maps)
    assert done.code == 0
    assert ("2 upscaled" if maps else "1 upscaled, 1 kept") in done.text
    assert read_image("out/a.png").pixels.max() == 7
    assert os.path.exists("out/a_severity.png") == bool(maps)


# One start of torch for all processes. Each writes down what it does: the brightness tells which file it is.
PROGRAM = """
import os, sys, time
from types import SimpleNamespace
import torch
from savl.cli import batch, main

class Slow:
    scale = 4
    def __call__(self, lr, *, on_tile=None):
        with open("log", "a", buffering=1) as log:
            log.write(f"{round(lr.max().item() * 255)}\\\\n")
        time.sleep(0.05)
        sr = torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest")
        return SimpleNamespace(sr=sr, severity=torch.ones(1, *lr.shape[2:]))

def load(model, **settings):
    "Loading takes its time: when one has done it, the others have begun."
    open(f"begun-{os.getpid()}", "w").close()
    while len([name for name in os.listdir() if name.startswith("begun-")]) < 3:
        time.sleep(0.01)
    time.sleep(0.3 * (os.getpid() % 3))
    return Slow()

batch.as_upscaler = load
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        main(["upscale", *sys.argv[1:]])
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.parametrize("arguments", [["in"], ["in", "--overwrite", "-o", "out"]])
def test_three_processes_share_a_folder(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for value in range(1, 13):
        write_image(tmp_path / f"in/{value}.png", np.full((8, 8, 3), value, np.uint8), image_format=PNG)
    environment = {**os.environ, "PYTHONPATH": str(Path(savl_package.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("\\\\n", "\\n"), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0 0 0\n"
    log = Counter(int(line) for line in (tmp_path / "log").read_text().split())
    assert log == Counter(range(1, 13)), f"each once\n{done.stderr}"
    names = sorted(path.name for path in (tmp_path / ("out" if "-o" in arguments else "in")).iterdir())
    results = [f"{value}{'' if '-o' in arguments else '_x4'}.png" for value in range(1, 13)]
    assert names == sorted(results + ([] if "-o" in arguments else [f"{value}.png" for value in range(1, 13)]))
