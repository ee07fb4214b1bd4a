"""Ctrl-C ends a command with one line and exit code 130, from the first import to the shutdown of the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import savl
from savl.cli import main
from savl.images.format import PNG
from savl.images.write import write_image
from savl.interrupts import exit_on_interrupt, raise_on_interrupt

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

PRESS = """
import os, signal
def press():
    os.kill(os.getpid(), signal.SIGINT)
"""
# Ctrl-C comes at the import of a module, and is dropped as torch and numpy drop it.
AT_IMPORT = f"""
import sys
{PRESS}
# A shell starts what it runs in the background with SIGINT ignored; a user at a terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
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
# Ctrl-C comes while the network is running.
AT_WORK = f"""
{PRESS}
class Interrupted(Nearest):
    def __call__(self, lr, *, on_tile=None):
        {{pressed}}
        on_tile(1, 1)
        return super().__call__(lr)

upscale_image.as_upscaler = lambda model, **settings: Interrupted()
main()
"""
UPSCALE = ("upscale", "in.png", "-o", "out.png")


@pytest.fixture(autouse=True)
def _input(tmp_path: Path) -> None:
    write_image(tmp_path / "in.png", np.zeros((8, 8, 3), np.uint8), image_format=PNG)


@pytest.mark.parametrize("module", ["typer", "numpy", "torch"])
def test_ctrl_c_during_an_import_ends_the_command(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, module],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(savl.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "savl: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize(
    "pressed",
    [
        "press()",
        # a library that drops it, and one that raises an error of its own instead
        "\n        try: press()\n        except KeyboardInterrupt: pass",
        "\n        try: press()\n        except KeyboardInterrupt: raise RuntimeError('failed') from None",
        # a second time, while the first exception is handled
        "\n        try: press()\n        finally: press()",
    ],
    ids=["once", "dropped", "turned", "twice"],
)
def test_ctrl_c_during_the_work_leaves_no_files(pressed: str, fork: Callable[..., Any], tmp_path: Path) -> None:
    done = fork(AT_WORK.format(pressed=pressed), *UPSCALE).wait()
    assert done == (130, "", "interrupted: 0 of 1 upscaled, no partial output left\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_ctrl_c_while_the_interpreter_shuts_down_prints_one_line(fork: Callable[..., Any], tmp_path: Path) -> None:
    program = AT_WORK.format(pressed="pass").replace("main()", "import atexit\natexit.register(press)\nmain()")
    code, _, said = fork(program, *UPSCALE).wait()
    assert code == 130
    assert said.splitlines()[1:] == ["savl: interrupted"]
    assert (tmp_path / "out.png").exists()


def test_a_later_second_ctrl_c_ends_a_cleanup_that_hangs(fork: Callable[..., Any]) -> None:
    hanging = "\n        try: press()\n        finally: __import__('time').sleep(1.1); press(); sys.exit('not reached')"
    assert fork(AT_WORK.format(pressed=hanging), *UPSCALE).wait() == (130, "", "savl: interrupted\n")


def test_main_restores_the_signal_handler_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_calls_main_gets_exit_code_130() -> None:
    def command() -> None:
        with exit_on_interrupt(until_exit=False), raise_on_interrupt():
            try:
                signal.raise_signal(signal.SIGINT)  # in this thread; the process may have others by now
            finally:
                sys.exit(1)

    # A shell starts what it runs in the background with SIGINT ignored, and this test may be part of that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            command()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "own"])
def test_other_signal_handlers_are_not_replaced(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with exit_on_interrupt(until_exit=False):
            assert signal.getsignal(signal.SIGINT) is handler
            signal.raise_signal(signal.SIGINT)
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
