"""Measure the speedups on a GPU that have targets. Variants take turns in each round; a ratio is one of medians.

    python -m benchmarks.gpu_ratios                                   # results/<name of the GPU>/gpu_ratios.json
    python -m benchmarks.gpu_ratios --only window network             # some parts
    python -m benchmarks.gpu_ratios --only max-autotune               # against mode max-autotune; takes minutes
    python -m benchmarks.gpu_ratios --only dsca hab da-rhag           # blocks of savl-base
    python -m benchmarks.gpu_ratios --device cpu --side 32 --no-compile --network savl-tiny   # only checks that it runs

`benchmarks.timing` checks and times the variants. Results are written after every part. The exit code is 0 whether or
not the targets are reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine
from benchmarks.cases import FUSED_COMPILED, FUSED_GRAPH, BenchmarkCase, NotAvailableError, Run
from benchmarks.network_from_blocks import OTHER_LAYERS, network_from_blocks
from benchmarks.timing import COPY, ceilings, check_and_time, reason, release_memory, summary
from savl.atomic_write import write_atomically


@dataclass
class Report:
    """Results so far; the file is rewritten after every part."""

    path: Path | None
    content: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write the results so far."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


# Target ratios

Wanted = dict[str, float | None]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    run: Run
    rounds: int
    network: str

    def of_network(self, *variants: str) -> BenchmarkCase:
        """Return the benchmark of the network with some variants beside eager and fused."""
        return cases.network(self.run, self.network).only((*variants, "fused"))


@dataclass(frozen=True)
class Part:
    """One case, and how many times as fast as other variants the fused variant should be.

    The ratio to a copy is the share of the copy's bandwidth. Of variants whose names begin alike ("sdpa",
    "sdpa, padded"), the fastest is compared with. A variant whose ratio is None is measured, but has no target.
    """

    case: Callable[[Settings], BenchmarkCase]
    wanted: Wanted
    network: bool = False
    compiles: bool = False
    """Whether the part measures torch.compile of a network or block, which is done on CUDA GPUs only."""
    subject: str = "fused"
    """The variant whose speed is compared with that of the others."""


def _part(op: str, wanted: Wanted, **options: Any) -> Part:
    def case(settings: Settings) -> BenchmarkCase:
        made = cases.op_case(settings.run, op, **options)
        peers = [
            name for name in (*made.variants, *made.skipped) if any(_is_variant_of(name, against) for against in wanted)
        ]
        return made.only((*peers, "fused"))

    return Part(case, wanted)


def _is_variant_of(variant: str, against: str) -> bool:
    return variant == against or variant.startswith(f"{against}, ")


MEMORY_RATIO = 4
"""How many times as much peak memory as the fused network eager should need."""
COMPILE, MAX_AUTOTUNE = "compile", "compile, max-autotune"


def _block(name: str, variant: str, wanted: Wanted, compiles: bool = False) -> Part:
    """Return the part of a block of savl-base, or of the network without its groups, with one variant of its own."""

    def case(settings: Settings) -> BenchmarkCase:
        run = settings.run
        made = cases.without_groups(run, "savl-base") if name == OTHER_LAYERS else cases.block(run, name)
        return made.only((variant, "fused"))

    return Part(case, wanted, network=True, compiles=compiles)


PARTS: dict[str, Part] = {
    "window": _part("window_attention", {"eager": 8, "sdpa": 2, "flex": 1.5}),
    "window-backward": _part("window_attention", {"eager": 6, "sdpa": 1.5, "flex": 1.3}, backward=True),
    "overlapping": _part("overlapping_window_attention", {"eager": 8, "sdpa": None, "flex": None}),
    "overlapping-backward": _part(
        "overlapping_window_attention", {"eager": 6, "sdpa": None, "flex": None}, backward=True
    ),
    "posterior": _part("gaussian_posterior", {"eager": None, COPY: 0.9}),
    "posterior-plain": _part("gaussian_posterior", {"eager": None, COPY: 0.9}, noise=False),
    "modulation": _part("channel_modulation", {"eager": None, COPY: 0.9}),
    "layer-norm": _part("layer_norm", {"eager": None, COPY: 0.9}),
    "layer-norm-backward": _part("layer_norm", {"eager": None}, backward=True),
    "network": Part(
        lambda given: given.of_network("sdpa", FUSED_GRAPH), {"eager": 6, "sdpa": None, FUSED_GRAPH: None}, network=True
    ),
    "network-fused-compile": Part(
        # Not slower than the fused network by itself, apart from noise.
        lambda given: given.of_network(FUSED_COMPILED),
        {"fused": 0.98},
        network=True,
        compiles=True,
        subject=FUSED_COMPILED,
    ),
    "network-compile": Part(
        lambda given: given.of_network(COMPILE), {"eager": 6, COMPILE: None}, network=True, compiles=True
    ),
    "max-autotune": Part(
        lambda given: given.of_network(MAX_AUTOTUNE), {"eager": 6, MAX_AUTOTUNE: 2}, network=True, compiles=True
    ),
}
BLOCK_PARTS = {"dsca": "DSCA", "hab": "HAB", "da-rhag": "DA-RHAG", "other-layers": OTHER_LAYERS}
for _name, _what in BLOCK_PARTS.items():
    PARTS[_name] = _block(_what, FUSED_GRAPH, {"eager": None, FUSED_GRAPH: None})
for _name, _what in BLOCK_PARTS.items():
    PARTS[f"{_name}-max-autotune"] = _block(_what, MAX_AUTOTUNE, {"eager": None, MAX_AUTOTUNE: 2}, compiles=True)
ON_REQUEST = ("max-autotune", *(name for name in PARTS if name.endswith("-max-autotune")))
"""Parts that take long and run only if ``--only`` names them."""


def measure_part(name: str, settings: Settings, limits: Mapping[str, float]) -> dict[str, Any]:
    """Check and time the variants of a part, and return its ratios.

    Args:
        name: One of `PARTS`.
        settings: Device, dtype and size, and the number of rounds.
        limits: Result of `benchmarks.timing.ceilings`.
    """
    part, run = PARTS[name], settings.run
    if part.compiles:
        if not run.cuda:
            raise NotAvailableError("torch.compile of a network is measured on CUDA GPUs")
        if not run.compiled:
            raise NotAvailableError("torch.compile was switched off")
    case = part.case(settings)
    rounds = max(settings.rounds // 4, min(settings.rounds, 3)) if part.network else settings.rounds
    records = check_and_time(case, run, rounds, limits)
    for record in records.values():
        if "seconds" in record:
            record |= summary(record.pop("seconds"))
    what = case.title if part.subject == "fused" else f"{case.title}, {part.subject}"
    ratios = [ratio(what, against, wanted, records, subject=part.subject) for against, wanted in part.wanted.items()]
    if name == "network":
        exact = records if run.cuda else {}
        memory = ratio(f"{case.title}, peak memory", "eager", MEMORY_RATIO, exact, "peak_bytes")
        ratios.append(
            memory if run.cuda else memory | {"why": "not on this device: memory is read from CUDA's allocator"}
        )
    return {
        "state": "done",
        "what": case.title,
        "rounds": rounds,
        "subject": part.subject,
        "variants": records,
        "ratios": ratios,
    }


def ratio(
    what: str,
    against: str,
    wanted: float | None,
    records: Mapping[str, Any],
    figure: str = "median_ms",
    subject: str = "fused",
) -> dict[str, Any]:
    """Return a figure of another variant divided by that of a subject; of variants of similar names, the best is used.

    Args:
        what: Name of the row.
        against: The other variant.
        wanted: Target of the ratio, or None.
        records: Records of the variants.
        figure: Key of the figure in a record.
        subject: The variant to compare.
    """
    peers = {name: record for name, record in records.items() if name != subject and _is_variant_of(name, against)}
    known = {name: record[figure] for name, record in peers.items() if figure in record}
    row: dict[str, Any] = {"what": what, "against": against, "ratio": None, "wanted": wanted, "met": None}
    fused = records.get(subject, {})
    if known and figure in fused and fused[figure] > 0:
        best = min(known, key=lambda name: known[name])
        row |= {"against": best, "ratio": known[best] / fused[figure]}
        row["met"] = None if wanted is None else row["ratio"] >= wanted
    else:
        reasons = {name: record.get("failed", "not measured") for name, record in {**peers, subject: fused}.items()}
        missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if figure not in records.get(name, {}))
        row["why"] = missing or f"{against}: not measured"
    return row


# The run


def measure(settings: Settings, parts: Iterable[str], report: Report) -> dict[str, Any]:
    """Measure all parts, and write the results after each.

    Args:
        settings: Device, dtype and size, and the number of rounds.
        parts: Of `PARTS`.
        report: Where to write.

    Returns:
        The content of the report.
    """
    content, run = report.content, settings.run
    content |= {
        "machine": machine.device_facts(run.device),
        "settings": {
            "side": run.side,
            "dtype": str(run.dtype).removeprefix("torch."),
            "rounds": settings.rounds,
            "compiled": run.compiled,
            "network": settings.network,
        },
        "complete": False,
        "parts": {},
    }
    limits: dict[str, float] = {}
    try:
        limits = ceilings(run)
    except Exception as error:
        content["ceilings_failed"] = reason(error)
    content["ceilings"] = limits
    report.write()
    for name in parts:
        start = time.perf_counter()
        try:
            part = measure_part(name, settings, limits)
        except NotAvailableError as error:
            part = {"state": "not on this device", "why": str(error), "ratios": []}
        except Exception as error:
            part = {"state": "failed", "why": reason(error), "ratios": []}
        content["parts"][name] = {**part, "seconds": time.perf_counter() - start}
        if name in BLOCK_PARTS or name.removesuffix("-max-autotune") in BLOCK_PARTS:
            content["network_from_blocks"] = network_from_blocks(content["parts"])
        torch.compiler.reset()
        release_memory(run)
        report.write()
    content["complete"] = True
    report.write()
    return content


def table(content: Mapping[str, Any]) -> str:
    """Return a Markdown table of the ratios, and of the parts that were not measured and why."""
    device, settings = content["machine"]["device"], content["settings"]
    lines = [f"{device}, {settings['side']}×{settings['side']} tokens, {settings['dtype']}.", ""]
    if limits := content["ceilings"]:
        copy, product = f"{limits['copy_gb_per_second']:.0f} GB/s", f"{limits['product_tflops']:.2f} TFLOP/s"
        lines += [f"A large copy reaches {copy}, and a large matrix product {product}.", ""]
    lines += ["| benchmark | fused | baseline | ratio | target | result |", "|---|---:|---|---:|---:|---|"]
    for name, part in content["parts"].items():
        if part["state"] != "done":
            lines.append(f"| {name} | | | | | {part['state']}: {part['why']} |")
            continue
        fused = part["variants"][part.get("subject", "fused")]
        for row in part["ratios"]:
            key, unit = ("peak_bytes", 2**20) if "memory" in row["what"] else ("median_ms", 1)
            value = f"{fused[key] / unit:.3f} {'ms' if unit == 1 else 'MiB'}" if key in fused else ""
            found = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            wanted = "" if row["wanted"] is None else f"{row['wanted']:g}"
            verdict = row.get("why") or {True: "met", False: "missed", None: ""}[row["met"]]
            lines.append(f"| {row['what']} | {value} | {row['against']} | {found} | {wanted} | {verdict} |")
    if found := content.get("network_from_blocks"):
        lines += ["", "savl-base, computed from its blocks:", "", "| variant | ms | from |", "|---|---:|---|"]
        lines += [f"| {name} | {row['ms']:.1f} | {row['from']} |" for name, row in found.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write (default: results/<device>/)")
    parser.add_argument("--side", type=int, default=512, help="tokens along a side, a multiple of 16 from 32 on")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--rounds", type=int, default=30, help="number of measurements of each op; a quarter for networks"
    )
    parser.add_argument("--network", default="savl-base", help="network to measure end to end")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"parts to measure: {', '.join(PARTS)}"
    )
    parser.add_argument("--no-compile", action="store_true", help="measure no variant that uses torch.compile")
    given = parser.parse_args(arguments)
    if given.side < 32 or given.side % 16:
        parser.error(f"--side must be a multiple of 16 from 32 on, got {given.side}")
    device = torch.device(given.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("torch finds no GPU", file=sys.stderr)
            return 1
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    run = Run(device, getattr(torch, given.dtype), given.side, not given.no_compile)
    parts = given.only or [name for name in PARTS if name not in ON_REQUEST]
    named = "gpu_ratios.json" if not given.only else f"gpu_ratios_{'_'.join(given.only)}.json"
    path = given.json or machine.folder_of(machine.device_facts(device)) / named
    print(table(measure(Settings(run, given.rounds, given.network), parts, Report(path))))
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
