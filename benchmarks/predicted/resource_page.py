"""Write the tables of docs/kernel-resources.md from committed results.

    python -m benchmarks.predicted.resource_page          # rewrite the tables between the markers
    python -m benchmarks.predicted.resource_page --check  # only check whether it is up to date

The figures come from `benchmarks.predicted.triton_resources` and `benchmarks.predicted.cuda_resources`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.predicted import cuda_resources, triton_resources
from savl.ops.op import OPS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/kernel-resources.md"
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def triton_tables(report: dict[str, Any]) -> str:
    """Return a Markdown table for each dtype: a row for each kernel and problem, a column for each architecture.

    Args:
        report: Results of `benchmarks.predicted.triton_resources`.
    """
    lines = [f"The tables summarise {len(report['rows'])} compilations with Triton {report['triton']}."]
    others = [row for row in report["rows"] if "shape" in row]
    attention = [row for row in report["rows"] if "shape" not in row]
    by_rule = [row for row in attention if row["source"] == triton_resources.RULE]
    architectures = list(dict.fromkeys(row["gpu"] for row in by_rule))
    for dtype in triton_resources.DTYPES:
        lines += [
            "",
            f"### {dtype}",
            "",
            f"| kernel | d | windows | tiles | {' | '.join(architectures)} | shared | stack |",
            f"|---|---:|---:|---|{'---:|' * len(architectures)}---:|---:|",
        ]
        groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
        for row in by_rule:
            if row["dtype"] == dtype:
                key = (row["kernel"], row["head_dim"], row["window"], row["key_window"])
                groups.setdefault(key, {})[row["gpu"]] = row
        for (kernel, head_dim, window, key_window), group in groups.items():
            cells = " | ".join(_cell(group.get(each)) for each in architectures)
            shared = max(row["shared"] for row in group.values()) / 1024
            stack = max(row["stack"] for row in group.values())
            lines.append(
                f"| `{kernel}` | {head_dim} | {window}, {key_window} | {_tiles(group)} | {cells} "
                f"| {shared:.1f} KiB | {stack} |"
            )
    for op in dict.fromkeys(row["op"] for row in others):
        lines += ["", f"### {OPS[op].title.capitalize()}", ""]
        lines.append(f"| kernel | dtype | channels | {' | '.join(architectures)} | shared | stack |")
        lines.append(f"|---|---|---|{'---:|' * len(architectures)}---:|---:|")
        shapes: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
        for row in others:
            if row["op"] == op:
                shapes.setdefault((row["kernel"], row["dtype"], row["shape"]), {})[row["gpu"]] = row
        for (kernel, dtype, shape), group in shapes.items():
            cells = " | ".join(_cell(group.get(each)) for each in architectures)
            shared, stack = (max(row[what] for row in group.values()) for what in ("shared", "stack"))
            lines.append(f"| `{kernel}` | {_SHORT[dtype]} | {shape} | {cells} | {shared / 1024:.1f} KiB | {stack} |")
    if for_gpus := [row for row in attention if row["source"] != triton_resources.RULE]:
        lines += ["", "### Block sizes shipped for single GPUs", ""]
        lines.append("| GPU | kernel | dtype | d | windows | tiles | registers · programs | stack |")
        lines.append("|---|---|---|---:|---:|---|---:|---:|")
        for row in for_gpus:
            lines.append(
                f"| {row['source']} | `{row['kernel']}` | {_SHORT[row['dtype']]} | {row['head_dim']} "
                f"| {row['window']}, {row['key_window']} | {triton_resources.tiles(row['config'])} | {_cell(row)} "
                f"| {row['stack']} |"
            )
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['registers']} · {row['programs']}"


def _tiles(group: dict[str, dict[str, Any]]) -> str:
    """Return block sizes, and the architectures where they differ."""
    found: dict[str, list[str]] = {}
    for architecture, row in group.items():
        found.setdefault(triton_resources.tiles(row["config"]), []).append(architecture.removeprefix("sm_"))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{tiles} on {', '.join(architectures)}" for tiles, architectures in found.items())


def filled(page: str) -> str:
    """Return the page with the tables of all results that exist.

    Args:
        page: The present page.
    """
    if triton_resources.COMMITTED.is_file():
        tables = triton_tables(json.loads(triton_resources.COMMITTED.read_text(encoding="utf-8")))
        marked = re.compile(r"(?<=<!-- triton -->\n).*?(?=<!-- /triton -->)", re.DOTALL)
        page = marked.sub(lambda _: tables, page)  # a function: a string would have its backslashes interpreted
    if cuda_resources.COMMITTED.is_file():
        page = cuda_resources.with_table(page, json.loads(cuda_resources.COMMITTED.read_text(encoding="utf-8")))
    return page


def main() -> int:
    """Rewrite or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old)
    if new == old:
        return 0
    print(f"{PAGE.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main())
