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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine, peak_memory
from benchmarks.cases import FUSED_BFLOAT16, BenchmarkCase, Run
from benchmarks.peers.runtimes import ONNX_RUNTIME, OPENVINO, OPENVINO_DEFAULT, summary, unavailable
from benchmarks.reporting import tables
from benchmarks.timing import COPY, ceilings, check, check_and_time, time_in_turn
from savl.atomic_write import write_atomically
from savl.inference.device import is_faster_in_bfloat16
from savl.ops.op import OPS as OP_RECORDS

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
    ("window_attention", {"eager": 8, "sdpa": 2, "sdpa, mask kept": 2.5}),
    ("overlapping_window_attention", {"eager": 6, "sdpa": 2, "sdpa, mask kept": 2}),
    ("gaussian_posterior", {"eager": 3, MEMORY: 0.8, COPY: 0.8}),
    ("channel_modulation", {"eager": 3, MEMORY: 0.8, COPY: 0.8}),
]
"""Targets of each op by baseline: the speedup, or against a copy the share of its bandwidth."""

IN_BFLOAT16 = {"window_attention": 1.7, "overlapping_window_attention": 1.7, "convolution": 1.7}
"""Target speedup of a fused kernel in bfloat16 over float32, where the processor multiplies bfloat16."""

RUNTIMES = {ONNX_RUNTIME: 1.5, OPENVINO: 1.35, OPENVINO_DEFAULT: 1.5}
NETWORKS: dict[str, Mapping[str, float]] = {
    "savl-tiny": {"eager": 1.6, "sdpa": 1.6, "compile": 1.6, ONNX_RUNTIME: 1.6, OPENVINO: 1.6, OPENVINO_DEFAULT: 1.5},
    "savl-base": {"eager": 3, "sdpa": 1.8, "compile": 1, **RUNTIMES},
    "hat-s": {"eager": 1.8, "sdpa": 1, **RUNTIMES, ONNX_RUNTIME: 1.6},
}
"""Target speedups of each network by baseline. A baseline in bfloat16 is compared with `FUSED_BFLOAT16`."""

TRAINING: dict[str, Mapping[str, float]] = {
    "savl-tiny": {"eager": 1.8, "fused": 1.5},
    "savl-base": {"eager": 3, "fused": 1.5},
}
"""Target speedups of a training step: in float32 over eager, and in bfloat16 over the fused kernels in float32."""


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


def of_bfloat16(op: str, wanted: float, run: Run, rounds: int) -> tuple[list[Ratio], dict[str, Any]]:
    """Measure the fused kernel of an op in bfloat16 against that in float32."""
    calls, flops = {}, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        own = replace(run, dtype=dtype)
        case = cases.op_case(own, op).only(("fused",))
        found, records = check(case, own)
        if "fused" not in found:
            raise RuntimeError(f"{op} in {dtype}: {records['fused']}")
        calls[str(dtype)], flops = found["fused"], case.flops
    medians = {name: statistics.median(seconds) for name, seconds in time_in_turn(calls, run, rounds)[0].items()}
    exact, narrow = medians["torch.float32"], medians["torch.bfloat16"]
    detail = f"{flops / narrow / 1e9:.0f} GFLOP/s"
    ratio = Ratio(f"{OP_RECORDS[op].title} in bfloat16", "fused in float32", exact / narrow, wanted, detail)
    return [ratio], {"median_seconds": medians, "rounds": rounds, "flops": flops}


def of_training(name: str, wanted: Mapping[str, float], run: Run) -> tuple[list[Ratio], dict[str, Any]]:
    """Measure a training step: the fused kernels against eager, and in bfloat16 against float32."""
    case = cases.training_step(run, name)
    if "fused" not in wanted:  # of no use where the processor does not multiply bfloat16
        case = case.only(("fused",))
    records = check_and_time(case, run, 3, {})
    medians = {variant: statistics.median(record["seconds"]) for variant, record in records.items()}
    ratios = [
        Ratio(case.title, "eager", medians["eager"] / medians["fused"], wanted["eager"], f"{medians['fused']:.3g} s")
    ]
    if "fused" in wanted:
        narrow = medians[FUSED_BFLOAT16]
        title = f"{case.title}, in bfloat16"
        ratios.append(Ratio(title, "fused in float32", medians["fused"] / narrow, wanted["fused"], f"{narrow:.3g} s"))
    return ratios, {"median_seconds": medians, "rounds": 3}


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
    bfloat16 = is_faster_in_bfloat16(run.device)
    for op, least in IN_BFLOAT16.items() if bfloat16 else ():
        add(f"{op}, bfloat16", of_bfloat16(op, least, run, rounds))
    few = max(rounds // 40, 3)
    for name, wanted in NETWORKS.items():
        peers = {peer: least for peer, least in wanted.items() if compiled or peer != "compile"}
        add(name, of_case(cases.network(run, name), peers, run, few, limits))
    for name, wanted in TRAINING.items():
        add(f"{name}, training", of_training(name, wanted if bfloat16 else {"eager": wanted["eager"]}, run))
    add("peak memory", of_memory("savl-base"))
    return report


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the networks")
    counts = "number of measurements of each op; networks are measured a fortieth as often, but at least 3 times"
    parser.add_argument("--rounds", type=int, default=121, help=counts)
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
