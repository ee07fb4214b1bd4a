"""Facts about the machine that measurements depend on."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import savl
from savl.build_info import build_info
from savl.profile.roofline import cpu_name

ROOT = Path(__file__).resolve().parents[1]


def facts() -> dict[str, Any]:
    """Return processor, threads, versions and commit."""
    info = build_info()
    return {
        "cpu": cpu_name(),
        "instruction_set": info["kernel_instruction_set"],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiler": info["compiler"],
        "savl": savl.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return `facts` with the name of the device as ``device``, and driver and libraries of a CUDA GPU."""
    if device.type != "cuda":
        return {"device": cpu_name(), **facts()}
    properties = torch.cuda.get_device_properties(device)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": triton,
        **facts(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.CalledProcessError):
        return None


def folder_of(facts: dict[str, Any]) -> Path:
    """Return the folder for the results of a machine, named after its GPU, or its CPU, instruction set and threads."""
    words = [facts["device"]]
    if "capability" not in facts:
        words += [facts["instruction_set"], str(facts["threads"]), "threads"]
    return ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def seconds(call: Callable[[], object]) -> float:
    """Return the wall-clock time of one call in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
