"""Ctrl-C ends a command with one line and exit code 130, from its first import to the end of the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import savl
from savl.cli import ctrl_c, main
from savl.images.format import PNG
from savl.images.write import write_image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# The command, with Ctrl-C where a test says so.
BEGINNING = """
import os, signal, sys
# A shell starts what it runs in the background with SIGINT ignored; a user at a terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
def press():
    os.kill(os.getpid(), signal.SIGINT)
"""
# The import of a module at which Ctrl-C comes, and is dropped as torch and numpy drop it.
AT_IMPORT = """
module = sys.argv[1]
class Presses:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            try:
                press()
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Presses())
from savl.cli import main
sys.argv[1:] = ["upscale", "in.png", "-o", "out.png"]
main()
"""
# A network at which it comes.
AT_WORK = """
from types import SimpleNamespace
import torch
from savl.cli import batch, main

class Nearest:
    scale = 4
    def __call__(self, lr, *, on_tile=None):
        {pressed}
        on_tile(1, 1)
        sr = torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest")
        return SimpleNamespace(sr=sr, severity=torch.ones(1, *lr.shape[2:]))

batch.as_upscaler = lambda model, **settings: Nearest()
sys.argv[1:] = ["upscale", "in.png", "-o", "out.png"]
main()
"""


def end_of(program: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """Run a program beside in.png; return its exit code and what it says."""
    write_image(folder / "in.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG)
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(savl.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["typer", "numpy", "torch"])
def test_it_ends_the_command_though_an_import_would_drop_it(module: str, tmp_path: Path) -> None:
    assert end_of(AT_IMPORT, tmp_path, module) == (130, "savl: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize(
    "pressed",
    [
        "press()",
        # a library that drops it, and one that makes an error of its own of it
        "\n        try: press()\n        except KeyboardInterrupt: pass",
        "\n        try: press()\n        except KeyboardInterrupt: raise RuntimeError('failed') from None",
        # again, while the first is on its way
        "\n        try: press()\n        finally: press()",
    ],
    ids=["once", "dropped", "turned", "twice"],
)
def test_it_ends_the_work_on_a_file_without_a_trace(pressed: str, tmp_path: Path) -> None:
    code, said = end_of(AT_WORK.replace("{pressed}", pressed), tmp_path)
    assert (code, said) == (130, "interrupted: 0 of 1 upscaled, no partial file left\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_it_is_quiet_while_the_interpreter_ends(tmp_path: Path) -> None:
    code, said = end_of("import atexit\natexit.register(press)" + AT_WORK.replace("{pressed}", "pass"), tmp_path)
    assert code == 130
    assert said.splitlines()[1:] == ["savl: interrupted"]
    assert (tmp_path / "out.png").exists()


def test_a_second_one_later_ends_a_cleaning_up_that_hangs(tmp_path: Path) -> None:
    hanging = "\n        try: press()\n        finally: __import__('time').sleep(1.1); press(); sys.exit('not reached')"
    code, said = end_of(AT_WORK.replace("{pressed}", hanging), tmp_path)
    assert (code, said) == (130, "savl: interrupted\n")


def test_a_program_that_calls_main_has_its_handler_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_calls_main_gets_the_exit_code_too() -> None:
    def command() -> None:
        with ctrl_c.handled(until_exit=False), ctrl_c.cleaning_up():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                sys.exit(1)

    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 130


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "own"])
def test_a_handler_of_somebody_else_stays(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with ctrl_c.handled(until_exit=False):
            assert signal.getsignal(signal.SIGINT) is handler
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_main_runs_in_other_threads_too(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[object] = []

    def command() -> None:
        try:
            main(["--version"])
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert codes == [0]
