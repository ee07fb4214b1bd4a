"""The promised ratios, all in one run: each variant in turn, round after round, medians.

    python -m benchmarks.ratios                                  # a table
    python -m benchmarks.ratios --json benchmarks/results/MACHINE/cpu_ratios.json
    python -m benchmarks.ratios --compile                        # with torch.compile of the network, minutes to compile

Exit code 0 whatever the table says: it reports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, peak_memory, subjects, tables
from benchmarks.subjects import Subject
from savl.atomic_write import write_atomically


@dataclass(frozen=True)
class Ratio:
    """One promise and what was measured."""

    what: str
    against: str
    ratio: float
    wanted: float
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.ratio >= self.wanted


MEMORY = "copy in memory"
"""The bandwidth of a copy too large for any cache; "copy" is one of as many bytes as the op moves, which fit there."""

OPS: list[tuple[str, dict[str, float]]] = [
    ("window_attention", {"eager": 8, "sdpa": 2, "sdpa, mask kept": 2}),
    ("overlapping_window_attention", {"eager": 6, "sdpa": 2, "sdpa, mask kept": 2}),
    ("gaussian_posterior", {"eager": 3, MEMORY: 0.8, "copy": 0.8}),
    ("channel_modulation", {"eager": 3, MEMORY: 0.8, "copy": 0.8}),
]
"""For each op, how many times as fast as what; against a copy, the share of its bandwidth."""


def of_op(
    subject: Subject, wanted: dict[str, float], rounds: int, peak: float, bandwidth: float
) -> tuple[list[Ratio], dict[str, Any]]:
    """Measure one op; ``peak`` in GFLOP/s and ``bandwidth`` in GB/s are the machine's."""
    subject.check()
    times = machine.interleaved({**subject.variants, **(subject.copies or {})}, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fused = medians["fused"]
    medians[MEMORY] = subject.bytes / bandwidth / 1e9
    bound = f"{subject.flops / fused / 1e9:.0f} GFLOP/s, {subject.flops / fused / 1e9 / peak:.0%} of the peak"
    if subject.copies:
        bound = f"{subject.bytes / fused / 1e9:.1f} GB/s"
    ratios = [Ratio(subject.name, name, medians[name] / fused, least, bound) for name, least in wanted.items()]
    return ratios, {"median_seconds": medians, "rounds": rounds, "flops": subject.flops, "bytes": subject.bytes}


def of_network(name: str, wanted: dict[str, float], rounds: int, compiled: bool) -> tuple[list[Ratio], dict[str, Any]]:
    """Measure one network on a 64×64 tile."""
    subject = subjects.network(name, compiled=compiled)
    subject.check()
    times = machine.interleaved(subject.variants, rounds, warm_up=1)
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    ratios = [
        Ratio(f"{name}, 64×64", variant, medians[variant] / medians["fused"], least, f"{medians['fused']:.2f} s")
        for variant, least in wanted.items()
        if variant in medians
    ]
    return ratios, {"median_seconds": medians, "rounds": rounds}


def of_memory(name: str) -> tuple[list[Ratio], dict[str, Any]]:
    """Peak memory of a tile, fused against eager."""
    peaks = {variant: peak_memory.measure(name, variant) for variant in ("eager", "sdpa", "fused")}
    detail = f"{peaks['fused'] / 2**20:.0f} MiB"
    return [Ratio(f"{name}, 64×64: peak memory", "eager", peaks["eager"] / peaks["fused"], 2, detail)], {"bytes": peaks}


def measure(compiled: bool, rounds: int) -> dict[str, Any]:
    """Everything, as plain data."""
    peak, bandwidth = machine.peak_gflops(), machine.memory_bandwidth()
    facts = machine.facts() | {"peak_gflops": peak, "memory_gb_per_second": bandwidth}
    report: dict[str, Any] = {"machine": facts, "ratios": [], "measured": {}}

    def add(key: str, found: tuple[list[Ratio], dict[str, Any]]) -> None:
        ratios, measured = found
        report["ratios"] += [asdict(ratio) | {"met": ratio.met} for ratio in ratios]
        report["measured"][key] = measured

    for op, wanted in OPS:
        add(op, of_op(getattr(subjects, op)(), wanted, rounds, peak, bandwidth))
    add("savl-base", of_network("savl-base", {"eager": 3, "sdpa": 1.8, "compile": 1}, max(rounds // 4, 3), compiled))
    add("hat-s", of_network("hat-s", {"eager": 1.8, "sdpa": 1}, max(rounds // 4, 3), False))
    add("peak memory", of_memory("savl-base"))
    return report


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network too")
    parser.add_argument("--rounds", type=int, default=21, help="times each op is measured")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    report = measure(arguments.compile, arguments.rounds)
    print(tables.ratios_of(report))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
