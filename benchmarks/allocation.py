"""Measure what memory allocation costs a network: with glibc's allocator as it is, and set to keep freed memory.

    python -m benchmarks.allocation [--model savl-base] [--rounds 3] [--json FILE]

By default glibc returns large blocks to the system as soon as they are freed. The next operation then needs memory that
is mapped and zeroed again, with a page fault for every 4 KiB. Eager networks allocate memory for every operation, fused
ones for few. ``GLIBC_TUNABLES`` takes effect when a process starts, so every measurement is one of separate processes,
which take turns. It needs Linux with glibc.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

BACKENDS = ("eager", "fused")
KEPT = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"}
"""Settings with which no block is mapped separately and freed memory at the end of the heap is kept."""
SETTINGS: dict[str, Mapping[str, str]] = {"as it is": {}, "kept": KEPT}
_LABELS = {"as it is": "default", "kept": "keeps freed memory"}
CALLS = 3


def measure_here(name: str, backend: str) -> dict[str, float]:
    """Measure a 64×64 tile in this process.

    Args:
        name: A configuration; the weights are random.
        backend: One of `BACKENDS`.

    Returns:
        Medians of three calls after a warm-up: ``seconds``, ``system_seconds`` (those spent in the operating system)
        and ``page_faults``.
    """
    import torch

    import savl

    torch.manual_seed(0)
    model = savl.build(name).eval()
    lr = torch.rand(1, 3, 64, 64)
    records: list[tuple[float, float, float]] = []
    with torch.no_grad(), savl.use_fused_kernels(backend == "fused"):
        model(lr)
        for _ in range(CALLS):
            before = resource.getrusage(resource.RUSAGE_SELF)
            seconds = machine.seconds(lambda: model(lr))
            after = resource.getrusage(resource.RUSAGE_SELF)
            records.append((seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt))
    medians = (statistics.median(column) for column in zip(*records, strict=True))
    return dict(zip(("seconds", "system_seconds", "page_faults"), medians, strict=True))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure all backends and settings in turn in each round, and return the medians of the rounds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for setting, variables in SETTINGS.items():
            for backend in BACKENDS:
                command = [sys.executable, "-m", "benchmarks.allocation", "--model", name, "--here", backend]
                environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | dict(variables)
                done = subprocess.run(
                    command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, check=True
                )
                found.setdefault((setting, backend), []).append(json.loads(done.stdout.splitlines()[-1]))
    rows = [
        {
            "allocator": setting,
            "backend": backend,
            **{key: statistics.median(each[key] for each in records) for key in records[0]},
        }
        for (setting, backend), records in found.items()
    ]
    return {"model": name, "rounds": rounds, "machine": machine.facts(), "tunables": KEPT, "rows": rows}


def table(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown table."""
    lines = ["| allocator | kernels | time per tile | of it in the system | page faults |"]
    lines.append("|---|---|---:|---:|---:|")
    for row in report["rows"]:
        lines.append(
            f"| {_LABELS[row['allocator']]} | {row['backend']} | {row['seconds']:.2f} s "
            f"| {row['system_seconds']:.2f} s | {row['page_faults']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="savl-base", help="a configuration; its weights are random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--here", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here is not None:
        print(json.dumps(measure_here(options.model, options.here)))
        return
    report = measure(options.model, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
