"""Generate docs/benchmarks.md with its figures, and the tables of README.md and model cards, from committed results.

    python -m benchmarks.reporting.report           # rewrite the documents
    python -m benchmarks.reporting.report --check   # change nothing; exit with 1 if a document is out of date

The results are the files in results/<machine>/: suite.json (``pytest benchmarks/ --benchmark-only --benchmark-json``),
scaling.json (`benchmarks.scaling`), allocation.json (`benchmarks.allocation`), ratios (`benchmarks.ratios`,
`benchmarks.gpu_ratios`) and limits.json (`benchmarks.limits`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import allocation
from benchmarks.cases import FUSED_BFLOAT16
from benchmarks.peers.runtimes import ONNX_RUNTIME, OPENVINO, OPENVINO_DEFAULT
from benchmarks.reporting import tables
from benchmarks.scaling import growth
from benchmarks.timing import COMPILED
from savl.ops import op as ops
from savl.profile.roofline import Ceilings, Point

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
FIGURES = ROOT / "docs/benchmarks"
VARIANTS = ("eager", "sdpa", "sdpa, mask kept", "flex", "compile", "compile, max-autotune", ONNX_RUNTIME, OPENVINO,
            OPENVINO_DEFAULT, "copy", "fused", "fused, CUDA graph", FUSED_BFLOAT16)  # fmt: skip
OPS = {op.title: name for name, op in ops.OPS.items()}
"""Name of the op whose forward pass each benchmark entry measures, by entry."""
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Dtype in which the suites ran, by device type."""
README_ENTRIES = (
    "window attention",
    "overlapping attention",
    "window attention and gradients",
    "DSCA",
    "savl-tiny, tile",
    "savl-base, tile",
    "hat-s, tile",
    "savl-base, training step",
)
"""Entries in the table of README.md; docs/benchmarks.md has all."""
BACKENDS = {"cpu": "cpp", "cuda": "triton and cuda"}
"""Backends that run the fused variants, by device type."""
PEERS = tuple(name for name in VARIANTS if not name.startswith(("fused", "copy", OPENVINO_DEFAULT)))
"""Baselines that compute the same as the fused kernels, in the same precision."""

Entries = dict[str, dict[str, dict[str, Any]]]


def entries(suite: Mapping[str, Any]) -> Entries:
    """Return the benchmarks of a file by group (entry and device) and variant: median, quartiles and further data."""
    found: Entries = {}
    for each in suite["benchmarks"]:
        variant = each["params"]["of_suite"][2]
        stats = each["stats"]
        record = {"median": stats["median"], "q1": stats["q1"], "q3": stats["q3"], "rounds": stats["rounds"]}
        found.setdefault(each["group"], {})[variant] = record | each["extra_info"]
    return found


def entry_of(group: str) -> str:
    """Return the entry of a group: the name of the group without the device at its end."""
    return group.rsplit(", ", 1)[0]


def duration(seconds: float) -> str:
    """Return a time with three digits and a suitable unit."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    if seconds >= 999.5:
        return f"{seconds / 60:.3g} min"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def best_peer(variants: Mapping[str, Mapping[str, Any]]) -> tuple[str, float] | None:
    """Return the fastest variant that is not savl's own, and the speedup of the fused variant over it."""
    peers = {name: record["median"] for name, record in variants.items() if name in PEERS}
    if not peers or "fused" not in variants:
        return None
    best = min(peers, key=lambda name: peers[name])
    return best, peers[best] / variants["fused"]["median"]


def suite_tables(found: Entries) -> str:
    """Return a table with the times of each entry, and the speedup of the fused variant over the fastest baseline."""
    used = [name for name in VARIANTS if any(name in variants for variants in found.values())]
    lines = [
        f"| benchmark | {' | '.join(used)} | speedup of fused over the fastest baseline |",
        f"|---|{'---:|' * len(used)}---|",
    ]
    for group, variants in found.items():
        if "fused" not in variants:
            continue
        cells = [duration(variants[name]["median"]) if name in variants else "" for name in used]
        peer = best_peer(variants)
        verdict = "" if peer is None else f"{peer[1]:.2f} × {peer[0]}" + ("" if peer[1] >= 1 else ", **slower**")
        lines.append(f"| {entry_of(group)} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"


def bound_table(found: Entries) -> str:
    """Return a table with the fraction of the ceilings that the fused kernels reach, and the peak memory."""
    lines = [
        "| fused | GFLOP/s | share of matrix product | GB/s | share of copy | share of roofline | peak memory "
        "| peak memory of eager |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group, variants in found.items():
        fused = variants.get("fused", {})
        if not {"of_roofline", "peak_bytes"} & set(fused):
            continue
        flops = (
            [f"{1000 * fused['tflops']:.1f}", f"{fused['of_product_tflops']:.0%}"] if "tflops" in fused else ["", ""]
        )
        moved = (
            [f"{fused['gb_per_second']:.1f}", f"{fused['of_copy_bandwidth']:.0%}"]
            if "gb_per_second" in fused
            else ["", ""]
        )
        share = f"{fused['of_roofline']:.0%}" if "of_roofline" in fused else ""
        memory = [
            f"{record['peak_bytes'] / 2**20:.0f} MiB" if record.get("peak_bytes") else ""
            for record in (fused, variants.get("eager", {}))
        ]
        lines.append(f"| {entry_of(group)} | {' | '.join([*flops, *moved, share, *memory])} |")
    return "\n".join(lines) + "\n"


def start_table(found: Entries) -> str:
    """Return the table of the times that new processes take, without "import savl", which loads no torch."""
    rows = [
        f"| {name} | {duration(record['median'])} |"
        for name, record in found.get("start, cpu", {}).items()
        if name != "import savl"
    ]
    if not rows:
        return ""
    note = "`import savl` is not listed, because it loads PyTorch only when a function of savl is first used."
    return "\n".join(["| in a new process | time |", "|---|---:|", *rows, "", note]) + "\n"


def compile_table(found: Entries) -> str:
    """Return the table of the first calls of the variants that compile."""
    rows = [
        f"| {entry_of(group)} | {name} | {duration(record['first_call_seconds'])} |"
        for group, variants in found.items()
        for name, record in variants.items()
        if name.startswith(COMPILED) and "first_call_seconds" in record
    ]
    return (
        "\n".join(["| benchmark | variant | first call, including compilation |", "|---|---|---:|", *rows]) + "\n"
        if rows
        else ""
    )


def scaling_section(report: Mapping[str, Any]) -> str:
    """Return the section about how time and memory grow with the image area, batch, window and threads."""
    points, lines = report["points"], []
    for subject in dict.fromkeys(row["subject"] for row in points if row["series"] == "area"):
        for variant in ("eager", "fused"):
            rows = [r for r in points if (r["series"], r["subject"], r["variant"]) == ("area", subject, variant)]
            in_time, in_memory = growth(rows), growth(rows, "peak_bytes")
            if in_time is None or in_memory is None:
                continue
            lost = [f"{row['side']}²" for row in rows if row.get("failed") == "out of memory"]
            out = f"; out of memory at {' and '.join(lost)}" if lost else ""
            lines.append(
                f"- {subject}, {variant}: time grows as area^{in_time:.2f}, memory as area^{in_memory:.2f}{out}"
            )
    tiled = [row for row in points if row["tile"] and "seconds" in row]
    for row in tiled:
        lines.append(
            f"- {row['subject']}, {row['variant']}, {row['side'] ** 2 / 2**20:.0f} megapixels "
            f"in tiles of {row['tile']}: "
            f"{duration(row['seconds'])}, {(row['peak_bytes'] or 0) / 2**20:.0f} MiB"
        )
    lines += ["", "| benchmark | setting | eager | fused | speedup |", "|---|---|---:|---:|---:|"]
    for series, key in (("area", "side"), ("batch", "batch"), ("window", "window"), ("threads", "threads")):
        rows = [row for row in points if row["series"] == series and not row["tile"]]
        for subject, value in dict.fromkeys((row["subject"], row[key]) for row in rows):
            pair = {row["variant"]: row for row in rows if (row["subject"], row[key]) == (subject, value)}
            cells = [
                f"{duration(row['seconds'])}, {(row['peak_bytes'] or 0) / 2**20:.0f} MiB"
                if "seconds" in row
                else row["failed"]
                for row in (pair["eager"], pair["fused"])
            ]
            both = all("seconds" in row for row in pair.values())
            ratio = f"{pair['eager']['seconds'] / pair['fused']['seconds']:.2f}" if both else ""
            shown = (
                f"{value}²"
                if key == "side"
                else f"{value} thread{'s' if value > 1 else ''}"
                if key == "threads"
                else value
            )
            label = "" if series in ("area", "threads") else f"{series} "
            lines.append(f"| {subject} | {label}{shown} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines) + "\n"


def section(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the section of the page about one machine, and its figures by name."""
    from benchmarks.reporting import figures

    def read(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    suite, scaling, gpu = read("suite.json"), read("scaling.json"), read("gpu_ratios.json")
    drawn: dict[str, str] = {}
    parts: list[str] = []

    def show(name: str, words: str, content: str) -> None:
        drawn[f"{folder.name}-{name}.svg"] = content
        parts.append(f"![{words}](benchmarks/{folder.name}-{name}.svg)\n")

    if suite is not None:
        found = entries(suite)
        parts.append(_machine(suite["devices"]))
        for device in suite["devices"]:
            here = {group: variants for group, variants in found.items() if group.endswith(f", {device}")}
            times = {
                entry_of(group): {name: record["median"] for name, record in variants.items() if name != "copy"}
                for group, variants in here.items()
                if {"eager", "fused"} <= set(variants)
            }
            parts += ["Median times. All variants of a row were timed in turn.\n", suite_tables(here)]
            show(f"speed-{device}", "Speedup of each variant over eager", figures.speedups(times))
            parts += [bound_table(here)]
            points = roofline_points(here, device)
            if points:
                limits = suite["ceilings"][device]
                ceilings = Ceilings(1000 * limits["product_tflops"], limits["copy_gb_per_second"])
                name, dtype = suite["devices"][device]["device"], DTYPES[device]
                drawing = figures.roofline(name, dtype, ceilings, points)
                show(f"roofline-{device}", "Roofline of the ops", drawing)
            parts += [compile_table(here)]
        parts.append(start_table(found))
    if scaling is not None:
        words = f"Each point was measured in a separate process, with a memory limit of {scaling['limit_gib']:g} GiB."
        parts.append(f"### Growth with the image area\n\n{words}\n")
        show(
            "time",
            "Time against the area of the image",
            figures.growth(scaling["points"], "seconds", scaling["limit_gib"]),
        )
        drawing = figures.growth(scaling["points"], "peak_bytes", scaling["limit_gib"])
        show("memory", "Memory against the area of the image", drawing)
        parts.append(scaling_section(scaling))
    if (allocated := read("allocation.json")) is not None:
        words = f"Measured by `benchmarks.allocation` in separate processes, with a 64×64 tile of {allocated['model']}."
        parts.append(f"### Cost of memory allocation\n\n{words}\n\n{allocation.table(allocated)}")
    if (promised := read("cpu_ratios.json")) is not None:
        parts.append("### Speedups and targets\n\n" + tables.ratios_of(promised))
    if gpu is not None:
        from benchmarks import gpu_ratios

        parts.append("### Speedups and targets, GPU\n\n" + gpu_ratios.table(gpu))
    return "\n".join(part for part in parts if part), drawn


def roofline_points(found: Entries, device: str) -> list[Point]:
    """Return the measurements of the ops' forward passes on a device, eager and fused."""
    points = []
    for group, op in OPS.items():
        variants = next((each for name, each in found.items() if entry_of(name) == group), {})
        for variant in ("eager", "fused"):
            record = variants.get(variant, {})
            if {"tflops", "gb_per_second"} <= set(record):
                seconds = record["median"]
                flops, moved = 1e12 * record["tflops"] * seconds, 1e9 * record["gb_per_second"] * seconds
                points.append(Point(op, variant if variant == "eager" else BACKENDS[device], flops, moved, seconds))
    return points


def _machine(devices: Mapping[str, Mapping[str, Any]]) -> str:
    said = []
    for name, facts in devices.items():
        words = [facts["device"]]
        if name == "cpu":
            words += [f"{facts['threads']} threads", f"{facts['instruction_set']} kernels"]
        else:
            words += [f"CUDA {facts['cuda']}", f"driver {facts['driver']}", f"Triton {facts['triton']}"]
        words += [f"torch {facts['torch']}", f"Python {facts['python']}", f"savl {facts['commit']}"]
        said.append(f"{', '.join(words)}.")
    return " ".join(said) + "\n"


def page() -> tuple[str, dict[str, str]]:
    """Return the content of docs/benchmarks.md, and its figures by name."""
    lines = [
        "# Benchmarks",
        "",
        "`python -m benchmarks.reporting.report` generates this page from the files in benchmarks/results.",
        "[benchmarks/README.md](../benchmarks/README.md) explains the measurements and the variants. The times of a",
        "section come from one machine and one run, in which the variants of an entry were timed in turn.",
        "",
    ]
    drawn: dict[str, str] = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        text, figures = section(folder)
        if text:
            lines += [f"## {folder.name}", "", text]
            drawn |= figures
    return "\n".join(lines), drawn


def performance() -> str:
    """Return README's table of the entries in `README_ENTRIES`: fused kernels, eager, and the fastest baseline."""
    parts = []
    for path in sorted(RESULTS.glob("*/suite.json")):
        suite = json.loads(path.read_text(encoding="utf-8"))
        for device, facts in suite["devices"].items():
            heads = ("", "eager", "fastest baseline", "fused", "speedup over eager", "speedup over the baseline")
            lines = [_machine({device: facts}), f"|{' | '.join(heads)} |", "|---|---:|---|---:|---:|---:|"]
            for group, variants in entries(suite).items():
                peer = best_peer(variants)
                if entry_of(group) not in README_ENTRIES:
                    continue
                if peer is None or not group.endswith(f", {device}") or "eager" not in variants:
                    continue
                eager, fused = variants["eager"]["median"], variants["fused"]["median"]
                peer_label = f"{peer[0]}, {duration(variants[peer[0]]['median'])}"
                against = f"{peer[1]:.2f}" + ("" if peer[1] >= 1 else ", **slower**")
                lines.append(
                    f"| {entry_of(group)} | {duration(eager)} | {peer_label} | {duration(fused)} "
                    f"| {eager / fused:.2f} | {against} |"
                )
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def documents() -> dict[Path, str]:
    """Return the generated documents by path, with the content that they should have."""
    return {**tables.documents({"performance": performance()}), PAGE: page()[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the documents. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a document is out of date")
    check = parser.parse_args(arguments).check
    wanted = documents()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    if not check:
        FIGURES.mkdir(exist_ok=True)
        for name, content in page()[1].items():
            (FIGURES / name).write_text(content, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
