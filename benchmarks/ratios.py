"""Measure the speedups on a CPU that have targets. Variants take turns in each round; a ratio is one of medians.

    python -m benchmarks.ratios                                  # a table
    python -m benchmarks.ratios --json benchmarks/results/MACHINE/cpu_ratios.json
    python -m benchmarks.ratios --compile                        # also torch.compile of the networks, takes minutes

The exit code is 0 whether or not the targets are reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine, peak_memory
from benchmarks.cases import FUSED_BFLOAT16, BenchmarkCase, Run
from benchmarks.peers.runtimes import ONNX_RUNTIME, OPENVINO, OPENVINO_DEFAULT, summary, unavailable
from benchmarks.reporting import tables
from benchmarks.timing import COPY, ceilings, check_and_time
from savl.atomic_write import write_atomically

SIDE = 64
"""Side of the measured tile in pixels."""


@dataclass(frozen=True)
class Ratio:
    """A measured ratio and its target."""

    what: str
    against: str
    ratio: float
    wanted: float
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio >= self.wanted


MEMORY = "copy in memory"
"""A copy too large for any cache. "copy" is a copy of as many bytes as the op moves, which fit into the cache."""

OPS: list[tuple[str, Mapping[str, float]]] = [
    ("window_attention", {"eager": 8, "sdpa": 2, "sdpa, mask kept": 2}),
    ("overlapping_window_attention", {"eager": 6, "sdpa": 2, "sdpa, mask kept": 2}),
    ("gaussian_posterior", {"eager": 3, MEMORY: 0.8, COPY: 0.8}),
    ("channel_modulation", {"eager": 3, MEMORY: 0.8, COPY: 0.8}),
]
"""Targets of each op by baseline: the speedup, or against a copy the share of its bandwidth."""

RUNTIMES = {ONNX_RUNTIME: 1.5, OPENVINO: 1.35, OPENVINO_DEFAULT: 1.5}
NETWORKS: dict[str, Mapping[str, float]] = {
    "savl-tiny": {"eager": 1.6, "sdpa": 1.6, "compile": 1.6, ONNX_RUNTIME: 1.6, OPENVINO: 1.6, OPENVINO_DEFAULT: 1.5},
    "savl-base": {"eager": 3, "sdpa": 1.8, "compile": 1, **RUNTIMES},
    "hat-s": {"eager": 1.8, "sdpa": 1, **RUNTIMES, ONNX_RUNTIME: 1.6},
}
"""Target speedups of each network by baseline. A baseline in bfloat16 is compared with `FUSED_BFLOAT16`."""


def of_case(
    case: BenchmarkCase, wanted: Mapping[str, float], run: Run, rounds: int, limits: Mapping[str, float]
) -> tuple[list[Ratio], dict[str, Any]]:
    """Measure one case.

    Args:
        case: The case.
        wanted: Target by baseline.
        run: Device, dtype and size.
        rounds: Number of measurements of each variant.
        limits: Ceilings of the machine, from `benchmarks.timing.ceilings`.

    Returns:
        The ratios, and the measurements that they are computed from. Baselines that the case skips are left out.

    Raises:
        RuntimeError: The fused variant or a baseline with a target could not be measured.
    """
    wanted = {name: least for name, least in wanted.items() if name not in case.skipped}
    ours = {name: FUSED_BFLOAT16 if name in case.precisions else "fused" for name in wanted}
    case = case.only((*wanted, *ours.values(), "fused"))
    records = check_and_time(case, run, rounds, limits)
    broken = {name: record["failed"] for name, record in records.items() if "failed" in record and name in wanted}
    broken |= {name: records[name] for name in {*ours.values(), "fused"} if "seconds" not in records[name]}
    if broken:
        raise RuntimeError(f"{case.title}: {broken}")
    medians = {name: statistics.median(record["seconds"]) for name, record in records.items() if "seconds" in record}
    fused = medians["fused"]
    detail = f"{fused:.3g} s"
    if case.bandwidth_bound:
        medians[MEMORY] = case.moved / limits["copy_gb_per_second"] / 1e9
        detail = f"{case.moved / fused / 1e9:.1f} GB/s"
    elif case.flops:
        rate = case.flops / fused / 1e9
        detail = f"{rate:.0f} GFLOP/s, {rate / 1000 / limits['product_tflops']:.0%} of the peak"
    ratios = []
    for name, least in wanted.items():
        in_bfloat16 = f"{medians[ours[name]]:.3g} s in bfloat16" if name in case.precisions else detail
        ratios.append(Ratio(case.title, name, medians[name] / medians[ours[name]], least, in_bfloat16))
    return ratios, {"median_seconds": medians, "rounds": rounds, "flops": case.flops, "bytes": case.moved}


def of_memory(name: str) -> tuple[list[Ratio], dict[str, Any]]:
    """Measure the peak memory of a 64×64 tile, fused against eager."""
    peaks = {variant: peak_memory.measure(name, variant) for variant in ("eager", "sdpa", "fused")}
    detail = f"{peaks['fused'] / 2**20:.0f} MiB"
    return [Ratio(f"{name}, 64×64: peak memory", "eager", peaks["eager"] / peaks["fused"], 2, detail)], {"bytes": peaks}


def measure(compiled: bool, rounds: int) -> dict[str, Any]:
    """Measure all ratios and return them as JSON values."""
    run = Run(torch.device("cpu"), torch.float32, SIDE, compiled=False, precomputed_masks=True)
    limits = ceilings(run)
    facts = machine.facts() | {
        "peak_gflops": 1000 * limits["product_tflops"],
        "memory_gb_per_second": limits["copy_gb_per_second"],
    }
    report: dict[str, Any] = {"machine": facts, "ratios": [], "measured": {}}

    def add(key: str, found: tuple[list[Ratio], dict[str, Any]]) -> None:
        ratios, measured = found
        report["ratios"] += [asdict(ratio) | {"met": ratio.met} for ratio in ratios]
        report["measured"][key] = measured

    for op, wanted in OPS:
        add(op, of_case(cases.op_case(run, op), wanted, run, rounds, limits))
    few = max(rounds // 4, 3)
    for name, wanted in NETWORKS.items():
        peers = {peer: least for peer, least in wanted.items() if compiled or peer != "compile"}
        add(name, of_case(cases.network(run, name), peers, run, few, limits))
    add("peak memory", of_memory("savl-base"))
    return report


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the networks")
    parser.add_argument("--rounds", type=int, default=21, help="number of measurements of each op")
    arguments = parser.parse_args()
    report = measure(arguments.compile, arguments.rounds)
    print(tables.ratios_of(report))
    print(summary())
    for name, why in unavailable().items():
        print(f"{name} was not measured: {why}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
