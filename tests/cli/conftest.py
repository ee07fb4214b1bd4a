"""The command `savl` with cheap stand-ins for network and degradation, in this process or in a forked one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import savl as savl_package
from savl.bicubic import bicubic_downsample
from savl.cli import main
from savl.degradation import Degradation, Degraded
from savl.degradation.recipe import draw_recipe
from savl.images.format import format_of_suffix
from savl.images.write import write_image
from savl.inference import (
    upscale_file,  # noqa: F401  # imported before a test replaces as_upscaler, which it takes from upscale_image
    upscale_image,
)


@dataclass
class Result:
    sr: torch.Tensor
    severity: torch.Tensor
    strength: torch.Tensor


class FakeUpscaler:
    scale = 4

    def __call__(self, lr: torch.Tensor, *, on_tile: Callable[[int, int], None] | None = None) -> Result:
        if on_tile is not None:
            on_tile(1, 2)
            on_tile(2, 2)
        ramp = torch.linspace(0, 2, lr.shape[3]).expand(lr.shape[0], *lr.shape[2:])
        return Result(F.interpolate(lr, scale_factor=self.scale, mode="nearest"), ramp, ramp / 2)


def fake_degradation(self: Degradation, x: torch.Tensor, seed: object) -> Degraded:
    """Downsample, and nothing else."""
    y = (bicubic_downsample(x, self.scale) * 255).round() / 255
    recipe = draw_recipe(self.config, 1, np.random.default_rng(0))
    return Degraded(y, torch.ones(y.shape[0], *y.shape[2:]), recipe, x)


@dataclass
class Finished:
    code: int
    text: str


@pytest.fixture
def savl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs `savl` with the given arguments; returns its exit code and what it printed."""
    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: FakeUpscaler())
    monkeypatch.setattr(Degradation, "__call__", fake_degradation)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        code = stop.value.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Finished(code if isinstance(code, int) else 0, captured.out + captured.err)

    return run


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes small pictures into a folder that is the current one; the value tells them apart."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, value: int = 100, shape: tuple[int, ...] = (6, 8, 3), dtype: Any = np.uint8) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        image_format = format_of_suffix(path)
        assert image_format is not None
        write_image(path, np.full(shape, value, dtype), image_format=image_format)
        return path

    return write


# A process that has imported torch and savl, and forks a child for each program, which costs no second import. Each
# program finds `Nearest`, a stand-in for a network, and SIGINT as at a terminal: a shell starts what it runs in the
# background with SIGINT ignored.
SERVER = """
import json, os, signal, sys
from types import SimpleNamespace
import torch
import savl.cli.app, savl.cli.loop, savl.inference.upscale_file
from savl.cli import main
from savl.inference import upscale_image

class Nearest:
    scale = 4
    def __call__(self, lr, *, on_tile=None):
        sr = torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest")
        return SimpleNamespace(sr=sr, severity=torch.ones(1, *lr.shape[2:]))

upscale_image.as_upscaler = lambda model, **settings: Nearest()
while line := sys.stdin.readline():
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(job["folder"])
        sys.argv[1:] = job["arguments"]
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")]
        for number, file in enumerate(files):
            os.dup2(file, number)
        exec(job["program"], globals())
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Forked:
    """A program in a forked process.

    Attributes:
        pid: Its process id.
    """

    pid: int
    _server: subprocess.Popen[str]
    _stdout: Path
    _stderr: Path
    ended: bool = False

    def wait(self) -> tuple[int, str, str]:
        """Wait for its end; return exit code (negative for a signal), standard output and standard error."""
        assert self._server.stdout is not None
        self.ended = True
        code = int(self._server.stdout.readline())
        return code, self._stdout.read_text(), self._stderr.read_text()

    def wait_for(self, condition: Callable[[str], object]) -> None:
        """Wait until a condition on standard output holds."""
        deadline = time.monotonic() + 60
        while not condition(self._stdout.read_text() if self._stdout.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    """The process that `fork` forks."""
    environment = {**os.environ, "PYTHONPATH": str(Path(savl_package.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def fork(
    server: subprocess.Popen[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Forked]]:
    """Starts a program in a forked process whose current folder is `tmp_path`; the arguments become sys.argv[1:]."""
    streams = tmp_path_factory.mktemp("streams")
    started: list[Forked] = []

    def start(program: str, *arguments: str) -> Forked:
        assert server.stdin is not None
        assert server.stdout is not None
        out, err = streams / "stdout", streams / "stderr"
        out.unlink(missing_ok=True)
        job = {"program": program, "arguments": arguments, "folder": str(tmp_path)}
        server.stdin.write(json.dumps({**job, "stdout": str(out), "stderr": str(err)}) + "\n")
        server.stdin.flush()
        started.append(Forked(int(server.stdout.readline()), server, out, err))
        return started[-1]

    yield start
    for process in started:
        if not process.ended:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
