"""Measure the time of a step, and with torch.profiler the time of each operation and range."""

from __future__ import annotations

import gzip
import json
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from savl.atomic_write import write_atomically
from savl.ops.op import OPS
from savl.profile.ranges import range_names
from savl.profile.workload import PHASES, STEP, Workload, synchronise

_OP = re.compile(rf"({'|'.join(OPS)}) \[\w+\]")
_INDEX = re.compile(r"^group \d+ | \d+$")


@dataclass(frozen=True)
class Time:
    """Time of an operation or range in one step, averaged over the profiled steps."""

    name: str
    seconds: float
    """For an operation: without the operations that it calls. For a range: from its beginning to its end, or on a GPU
    the time of the kernels launched in it."""
    share: float
    """For an operation: share of the sum of all operations. For a range: share of the step."""
    calls: float


@dataclass(frozen=True)
class Profile:
    """Result of `profile`."""

    seconds: float
    """Median time of a step without profiler and ranges."""
    profiled_seconds: float
    """Mean time of a step with profiler and ranges."""
    operations: tuple[Time, ...]
    """Operations of the CPU or kernels of the GPU, the longest first."""
    ranges: tuple[Time, ...]
    """Ranges in the order of the network: phases, stages, then blocks (all of a kind together) and ops."""


def warm_up(workload: Workload, steps: int) -> None:
    """Run steps without measuring them."""
    for _ in range(steps):
        workload.step()
    synchronise(workload.device)


def median_seconds(workload: Workload, steps: int) -> float:
    """Return the median time of a step in seconds, by the clock."""
    times = []
    for _ in range(steps):
        synchronise(workload.device)
        start = time.perf_counter()
        workload.step()
        synchronise(workload.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def profile(workload: Workload, *, warm_up_steps: int, steps: int) -> tuple[Profile, Any]:
    """Time a step, then profile it with torch.profiler.

    Args:
        workload: The step.
        warm_up_steps: Number of steps before.
        steps: Number of steps to time, and then number of steps to profile.

    Returns:
        The result, and the profiler for `write_trace`.
    """
    warm_up(workload, warm_up_steps)
    seconds = median_seconds(workload, steps)
    on_gpu = workload.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with workload.ranges(), torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            workload.step()
        synchronise(workload.device)
    averages = profiler.key_averages()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    own: dict[str, list[float]] = {
        each.key: [each.self_device_time_total if on_gpu else each.self_cpu_time_total, each.count]
        for each in averages
        if each.device_type == wanted and not each.is_user_annotation
    }
    total = sum(time for time, _ in own.values()) or 1.0
    operations = [Time(name, 1e-6 * time / steps, time / total, calls / steps) for name, (time, calls) in own.items()]
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    wall = 0.0
    kinds = _kinds(workload)
    for each in averages:
        if each.device_type != DeviceType.CPU or not each.is_user_annotation:
            continue
        kind = each.key if _OP.fullmatch(each.key) else kinds.get(each.key)
        if kind is not None:
            found[kind][0] += each.device_time_total if on_gpu else each.cpu_time_total
            found[kind][1] += each.count
        if each.key == STEP:
            wall = each.cpu_time_total
    whole = found[STEP][0] or 1.0
    order = {kind: index for index, kind in enumerate(dict.fromkeys(kinds.values()))}
    ranges = [
        Time(kind, 1e-6 * time / steps, time / whole, calls / steps)
        for kind, (time, calls) in sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    ]
    operations.sort(key=lambda each: -each.seconds)
    return Profile(seconds, 1e-6 * wall / steps, tuple(operations), tuple(ranges)), profiler


def write_trace(profiler: Any, path: Path, *, overwrite: bool) -> None:
    """Write a Chrome trace for Perfetto or chrome://tracing. An error leaves no partial file.

    Args:
        profiler: A `torch.profiler.profile` that has ended.
        path: Ends in ``.json`` or ``.json.gz``.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file is there and ``overwrite`` is False.
        OSError: It cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(plain)
        data = Path(plain).read_bytes()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    write_atomically(path, data, overwrite=overwrite)


def write_json(found: Profile, title: str, path: Path, *, overwrite: bool) -> None:
    """Write all times of a profile, in seconds, as JSON.

    Args:
        found: The profile.
        title: Model, size and settings.
        path: The file.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: The file is there and ``overwrite`` is False.
        OSError: It cannot be written.
    """
    data = (json.dumps({"title": title, **asdict(found)}, indent=1) + "\n").encode()
    write_atomically(path, data, overwrite=overwrite)


def _kinds(workload: Workload) -> dict[str, str]:
    """Return the row of the table for each range, in the order of the rows: stages, then kinds of blocks."""
    names = [name for module in workload.annotated for name in range_names(module).values()]
    names.sort(key=lambda name: _row(name) != name)
    return {name: name for name in (STEP, *PHASES)} | {name: _row(name) for name in names}


def _row(name: str) -> str:
    """Return the row of a range: ``group 0`` for itself, ``all HAB`` for ``group 0 HAB 1``."""
    if not re.match(r"group \d+ ", name):
        return name
    return f"all {_INDEX.sub('', name).split()[-1]}"
