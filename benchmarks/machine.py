"""What figures depend on, and the ceilings they are held against."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import savl
from savl.build_info import build_info

ROOT = Path(__file__).resolve().parents[1]


def facts() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    info = build_info()
    return {
        "cpu": cpu_name(),
        "instruction_set": info["kernel_instruction_set"],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiler": info["compiler"],
        "savl": savl.__version__,
        "commit": _commit(),
    }


def cpu_name() -> str:
    """As the operating system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every call in turn, round after round, so that whatever else the machine does hits all alike."""
    for _ in range(warm_up):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def peak_gflops(rounds: int = 7) -> float:
    """GFLOP/s of a large matrix product in float32: what this machine's cores can do together."""
    a, b, out = (torch.randn(1536, 1536) for _ in range(3))
    times = interleaved({"mm": lambda: torch.mm(a, b, out=out)}, rounds)["mm"]
    return 2 * 1536**3 / statistics.median(times) / 1e9


def memory_bandwidth(rounds: int = 7) -> float:
    """GB/s, bytes read and bytes written counted, of copying 256 MiB: far more than any cache holds."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * 4 * 2**26 / statistics.median(times) / 1e9
