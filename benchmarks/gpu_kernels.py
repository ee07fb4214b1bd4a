"""Run the Triton kernels of the ops under Nsight Compute, one op and pass in a process, and collect what limits them.

    python -m benchmarks.gpu_kernels --ncu FILE --seconds 95      # all ops, forward and then backward
    python -m benchmarks.gpu_kernels --list                       # the passes, and the names of the kernels
    python -m benchmarks.gpu_kernels --capture "window_attention forward"   # what ncu runs

Only one call of one op, after two calls that compile, is between cudaProfilerStart and cudaProfilerStop, and of its
kernels only those whose names are names of Triton kernels of savl are profiled. So a kernel in the results cannot be
that of another op. Results are appended to the file after every pass.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases, processes, timing
from savl.ops.library import FUSED, TRITON, TRITON_UNAVAILABLE
from savl.ops.op import OPS

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis")
"""Sections of Nsight Compute; WarpStateStats lists the reasons of stalls."""
SECONDS_OF_PASS = 30
"""Limit of the time of one pass under Nsight Compute."""
FORWARD, BACKWARD = "forward", "backward"


def passes() -> list[str]:
    """Return op and pass of everything that Triton kernels serve on CUDA, all forward passes first."""
    names = [name for name, op in OPS.items() if op.backend_for("cuda") == TRITON and op.benchmark is not None]
    return [f"{name} {which}" for which in (FORWARD, BACKWARD) for name in names]


def kernel_names() -> dict[str, list[str]]:
    """Return the names of the Triton functions of savl that may be launched, with the modules that define them."""
    import savl.kernels

    found: dict[str, list[str]] = {}
    for module in pkgutil.iter_modules(savl.kernels.__path__):
        content = vars(importlib.import_module(f"savl.kernels.{module.name}"))
        for name, value in content.items():
            function = getattr(value, "fn", None)
            if hasattr(value, "run") and getattr(function, "__module__", None) == f"savl.kernels.{module.name}":
                found.setdefault(name, []).append(module.name)
    return {name: modules for name, modules in found.items() if not name.startswith("_")}


def command(what: str, side: int) -> list[str]:
    """Return the command line that profiles one pass.

    Args:
        what: One of `passes`.
        side: Side of the image in tokens.
    """
    # The backward pass is that of a training step, which runs the forward kernels too.
    backward = what.endswith(BACKWARD)
    names = [name for name in kernel_names() if not (backward and name == FORWARD)]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    return [
        "ncu", "--clock-control", "none", "--profile-from-start", "off",
        "--kernel-name-base", "function", "--kernel-name", f"regex:^({'|'.join(names)})$", *sections,
        sys.executable, "-m", "benchmarks.gpu_kernels", "--capture", what, "--side", str(side),
    ]  # fmt: skip


def capture(what: str, run: cases.Run) -> None:
    """Call an op twice, and then once between cudaProfilerStart and cudaProfilerStop."""
    name, which = what.split()
    case = cases.op_case(run, name, backward=which == BACKWARD).only(("fused",))
    call = timing.computation(case, "fused", case.inputs)
    for _ in range(2):
        call()
    if run.cuda:
        torch.cuda.synchronize(run.device)
        torch.cuda.profiler.start()
    call()
    if run.cuda:
        torch.cuda.synchronize(run.device)
        torch.cuda.profiler.stop()


def profile_all(path: Path, seconds: float, side: int) -> int:
    """Profile all passes, as many as fit into the time; return the exit code."""
    if shutil.which("ncu") is None:
        print("ncu (Nsight Compute) is not on the PATH", file=sys.stderr)
        return 2
    end = time.monotonic() + seconds
    failed = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for what in passes():
        left = end - time.monotonic()
        if left < 10:
            failed.append(f"{what}: no time left")
            continue
        with path.open("ab") as output:
            output.write(f"=== {what}, {side}×{side}\n".encode())
            output.flush()
            outcome = processes.run(command(what, side), min(left, SECONDS_OF_PASS), output=output)
        if outcome.state != processes.OK:
            failed.append(f"{what}: {outcome.state}")
    for each in failed:
        print(each, file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, capture or list; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ncu", type=Path, metavar="FILE", help="profile all passes, and append the results to FILE")
    what.add_argument("--capture", choices=passes(), metavar="PASS", help="run one pass, as ncu does")
    what.add_argument("--list", action="store_true", help="list the passes and the kernels")
    parser.add_argument("--seconds", type=float, default=95, help="limit of the time of all passes")
    parser.add_argument("--side", type=int, default=512, help="tokens along a side, a multiple of 16 from 32 on")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join([*passes(), "", *kernel_names()]))
        return 0
    if given.ncu is not None:
        return profile_all(given.ncu, given.seconds, given.side)
    device = torch.device(given.device)
    if device.type == FUSED[TRITON].device and TRITON_UNAVAILABLE is not None:
        print(TRITON_UNAVAILABLE, file=sys.stderr)
        return 1
    capture(given.capture, cases.Run(device, torch.bfloat16 if device.type == "cuda" else torch.float32, given.side))
    return 0


if __name__ == "__main__":
    sys.exit(main())
