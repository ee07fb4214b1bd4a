"""Benchmarks of start-up: imports, loading of weights, and the first call, each in a new process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks.cases import Run
from benchmarks.suite import Entry, Records

LOAD = "import torch, savl; model = savl.load('savl-tiny').eval()"
CALL = "with torch.no_grad(): model(torch.zeros(1, 3, 16, 16))"
PROGRAMS = {
    "import torch": "import torch",
    "import savl": "import savl",
    "load savl-tiny": LOAD,
    "first call, eager": f"{LOAD}\nsavl.use_fused_kernels(False)\n{CALL}",
    "first call, fused": f"{LOAD}\nsavl.use_fused_kernels()\n{CALL}",
}


def start(run: Run, rounds: int) -> Records:
    """Measure whole processes in turn."""
    from benchmarks import timing

    def process(program: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

    times, failed = timing.time_in_turn({name: process(program) for name, program in PROGRAMS.items()}, run, rounds)
    return {name: {"seconds": seconds} for name, seconds in times.items()} | {
        name: {"failed": why} for name, why in failed.items()
    }


ENTRIES = [Entry("start", None, tuple(PROGRAMS), rounds=5, measure=start, devices=("cpu",))]


def test_start(hand_over: Callable[[], None]) -> None:
    hand_over()
