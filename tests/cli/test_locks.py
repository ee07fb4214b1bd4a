"""Several `savl` processes on the same files: each file is processed once, and none is missing."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from savl.images import locks
from savl.images.format import PNG
from savl.images.locks import lock_output, lock_path
from savl.images.read import read_image
from savl.images.write import write_image

fcntl = pytest.importorskip("fcntl")

Run = Callable[..., Any]
Write = Callable[..., Path]


def test_a_lock_is_held_by_one_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "deep/er/a.png"
    for _ in range(2):
        with (
            lock_output(output) as first,
            lock_output(output) as second,
            lock_output(output.with_name("b.png")) as other,
        ):
            assert (first.acquired, second.acquired, other.acquired) == (True, False, True)
            assert len(list(output.parent.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [], "nor the folders that were made for it"


def test_a_folder_with_a_result_stays(tmp_path: Path) -> None:
    with lock_output(tmp_path / "out/a.png"):
        (tmp_path / "out/a.png").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_two_names_of_one_output_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b.png").symlink_to("a.png")
    for other in ("link/a.png", "b.png"):
        with lock_output(tmp_path / "a.png"), lock_output(tmp_path / other) as again:
            assert not again.acquired, other


def test_long_names_with_the_same_beginning_have_two_locks(tmp_path: Path) -> None:
    with lock_output(tmp_path / f"{'x' * 250}1.png") as first, lock_output(tmp_path / f"{'x' * 250}2.png") as second:
        assert first.acquired
        assert second.acquired


def test_a_lock_file_of_a_killed_process_is_reused(tmp_path: Path) -> None:
    lock_path(tmp_path / "a.png").touch()
    with lock_output(tmp_path / "a.png") as lock:
        assert lock.acquired
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_files_cannot_be_locked_every_lock_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_output(tmp_path / "a.png") as lock:
        assert lock.acquired
    assert list(tmp_path.iterdir()) == []


def test_where_inode_numbers_change_every_lock_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with lock_output(tmp_path / "a.png") as lock:
        assert lock.acquired
    assert list(tmp_path.iterdir()) == []


def test_on_windows_every_lock_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with lock_output(tmp_path / "a.png") as lock:
        assert lock.acquired
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_created_every_lock_is_granted(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with lock_output(tmp_path / "plain/a.png") as lock:
        assert lock.acquired


def hold(output: Path, until: Path, then: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    """Simulate another process: hold a lock until a file appears, then do something. The event says that it holds."""
    held = threading.Event()

    def run() -> None:
        with lock_output(output) as lock:
            assert lock.acquired
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
def test_a_file_of_another_process_is_waited_for_and_kept(savl: Run, picture: Write, overwrite: list[str]) -> None:
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


def test_a_file_at_which_another_process_failed_is_processed(savl: Run, picture: Write) -> None:
    picture("in/a.png")
    picture("in/b.png")
    thread, held = hold(Path("out/a.png"), Path("out/b.png"), lambda: None)
    assert held.wait(10)
    done = savl("upscale", "in", "-o", "out")
    thread.join()
    assert done.code == 0
    assert "2 upscaled" in done.text
    assert sorted(os.listdir("out")) == ["a.png", "b.png"]


@pytest.mark.parametrize("maps", [[], ["severity"], ["strength"]])
def test_an_output_that_appears_without_a_lock_counts_as_kept(
    savl: Run, picture: Write, monkeypatch: pytest.MonkeyPatch, maps: list[str]
) -> None:
    from savl.inference import upscale_image
    from tests.cli.conftest import FakeUpscaler

    class Overtaken(FakeUpscaler):
        def __call__(self, lr: Any, **options: Any) -> Any:
            if not Path("out/a.png").exists():
                picture("out/a.png", value=7)
            return super().__call__(lr, **options)

    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: Overtaken())
    picture("in/a.png")
    picture("in/b.png")
    done = savl("upscale", "in", "-o", "out", *(f"--{kind}-map" for kind in maps))
    assert done.code == 0
    assert ("2 upscaled" if maps else "1 upscaled, 1 kept") in done.text
    assert read_image("out/a.png").pixels.max() == 7
    assert sorted(os.listdir("out")) == sorted(
        ["a.png", "b.png", *(f"{name}_{kind}.png" for name in "ab" for kind in maps)]
    )


# Each process writes down what it does: the brightness tells which file it is.
PROGRAM = """
import time

class Slow(Nearest):
    def __call__(self, lr, *, on_tile=None):
        with open("log", "a", buffering=1) as log:
            log.write(f"{round(lr.max().item() * 255)}\\n")
        time.sleep(0.05)
        return super().__call__(lr)

def load(model, **settings):
    "Loading takes its time: when one process has finished it, the others have begun."
    open(f"begun-{os.getpid()}", "w").close()
    while len([name for name in os.listdir() if name.startswith("begun-")]) < 3:
        time.sleep(0.01)
    time.sleep(0.3 * (os.getpid() % 3))
    return Slow()

upscale_image.as_upscaler = load
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        main()
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.parametrize("arguments", [["in"], ["in", "--overwrite", "-o", "out"]])
def test_three_processes_share_a_folder(fork: Run, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for value in range(1, 13):
        write_image(tmp_path / f"in/{value}.png", np.full((8, 8, 3), value, np.uint8), image_format=PNG)
    code, printed, errors = fork(PROGRAM, "upscale", *arguments).wait()
    assert (code, printed) == (0, "0 0 0\n"), errors
    log = Counter(int(line) for line in (tmp_path / "log").read_text().split())
    assert log == Counter(range(1, 13)), f"each once\n{errors}"
    names = sorted(path.name for path in (tmp_path / ("out" if "-o" in arguments else "in")).iterdir())
    results = [f"{value}{'' if '-o' in arguments else '_x4'}.png" for value in range(1, 13)]
    assert names == sorted(results + ([] if "-o" in arguments else [f"{value}.png" for value in range(1, 13)]))
