"""Times of a step: by the clock, and by torch.profiler per operation and per range."""

from __future__ import annotations

import gzip
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
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
    """Time of something in one step, the mean over the steps profiled."""

    name: str
    seconds: float
    """Of an operation: in it but not in those that it calls. Of a range: from its beginning to its end; on a GPU, of
    the kernels launched in it."""
    share: float
    """Of the sum of the operations; of a range, of the step."""
    calls: float


@dataclass(frozen=True)
class Profile:
    """What `profile` finds."""

    seconds: float
    """Median time of a step without the profiler, nor ranges."""
    profiled_seconds: float
    """Mean time of a step with both."""
    operations: tuple[Time, ...]
    """Of the CPU, or the kernels of the GPU; the longest first."""
    ranges: tuple[Time, ...]
    """In the order of the network: phases, stages, then blocks, all of a kind together, and ops."""


def warm_up(workload: Workload, steps: int) -> None:
    """Run steps that nobody looks at."""
    for _ in range(steps):
        workload.step()
    synchronise(workload.device)


def median_seconds(workload: Workload, steps: int) -> float:
    """Median time of a step by the clock."""
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
        warm_up_steps: Steps before.
        steps: How often the step is timed, and again how often it is profiled.

    Returns:
        What was found, and the profiler, for `write_trace`.
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
    """Write a Chrome trace, which Perfetto and chrome://tracing show, whole or not at all.

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


def _kinds(workload: Workload) -> dict[str, str]:
    """Which row of the table a range belongs to, in the order of the rows: stages alone, then blocks of a kind."""
    names = [name for module in workload.annotated for name in range_names(module).values()]
    names.sort(key=lambda name: _row(name) != name)
    return {name: name for name in (STEP, *PHASES)} | {name: _row(name) for name in names}


def _row(name: str) -> str:
    """``group 0`` stays; ``group 0 HAB 1 CAB`` becomes ``all CAB``, ``group 0 HAB 1`` becomes ``all HAB``."""
    if not re.match(r"group \d+ ", name):
        return name
    return f"all {_INDEX.sub('', name).split()[-1]}"
