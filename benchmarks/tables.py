"""Write the tables of README.md and of the model cards from committed results.

    python benchmarks/tables.py          # rewrite what stands between the markers
    python benchmarks/tables.py --check  # only say whether it is up to date

Scores come from `savl evaluate --json`, limits from benchmarks/limits.py, ratios from benchmarks/ratios.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCORES = ROOT / "savl" / "weights" / "scores"
LIMITS = ROOT / "benchmarks" / "results"


def scores(model: str) -> str:
    """Markdown table of a model's committed scores, bicubic beside it."""
    lines = [
        f"| images | bicubic PSNR Y / SSIM Y / PSNR RGB | {model} PSNR Y / SSIM Y / PSNR RGB | gain, dB Y |",
        "|---|---|---|---:|",
    ]
    for path in sorted((SCORES / model).glob("*.json")):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        bicubic, network = report["mean"]["bicubic"], report["mean"][model]
        gain = network["psnr_y"] - bicubic["psnr_y"]
        lines.append(
            f"| {path.stem} ({len(report['images'])}) | {_row(bicubic)} | {_row(network)} | {gain:+.2f} |",
        )
    return "\n".join(lines) + "\n"


def limits() -> str:
    """Markdown table of time, memory and seams, a row per machine."""
    lines = [
        "| machine | kernels | 128×128, median | 2000×1500 to JPEG | peak memory | tiled against untiled, worst |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for path in sorted(LIMITS.glob("*/limits.json")):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        large = report["large_photo"]
        lines.append(
            f"| {report['machine']['cpu']}, {report['machine']['threads']} threads | {report['machine']['kernels']} "
            f"| {report['small_photo']['seconds']['median']:.2f} s | {large['seconds']:.0f} s "
            f"| {large['peak_gib']:.1f} GiB | {min(row['psnr_db'] for row in report['seams']):.0f} dB |"
        )
    return "\n".join(lines) + "\n"


def ratios() -> str:
    """The promised ratios and what they are, a table per machine."""
    reports = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(LIMITS.glob("*/cpu_ratios.json")))
    return "\n".join(ratios_of(report) for report in reports)


def ratios_of(report: dict[str, Any]) -> str:
    """The table of one report of benchmarks/ratios.py."""
    facts = report["machine"]
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']} kernels, torch {facts['torch']}, "
        f"{facts['peak_gflops']:.0f} GFLOP/s in a large matrix product, {facts['memory_gb_per_second']:.0f} GB/s in a "
        "large copy:",
        "",
        "| what | against | ratio | wanted | fused |",
        "|---|---|---:|---:|---|",
    ]
    for row in report["ratios"]:
        wanted = f"{row['wanted']:g}" if row["met"] else f"{row['wanted']:g}, **missed**"
        lines.append(f"| {row['what']} | {row['against']} | {row['ratio']:.2f} | {wanted} | {row['detail']} |")
    return "\n".join(lines) + "\n"


def _row(scores: dict[str, float]) -> str:
    return f"{scores['psnr_y']:.2f} / {scores['ssim_y']:.4f} / {scores['psnr_rgb']:.2f}"


def documents() -> dict[Path, str]:
    """Every document with a table, and what it should say."""
    found = {ROOT / "README.md": "savl-tiny"}
    found |= {path: path.stem for path in (ROOT / "savl" / "weights").glob("*.md")}
    return {
        path: _between(
            "ratios",
            ratios(),
            _between("limits", limits(), _between("scores", scores(model), path.read_text(encoding="utf-8"))),
        )
        for path, model in found.items()
    }


def _between(name: str, table: str, text: str) -> str:
    marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    return marked.sub(lambda _: table, text)  # a function: a string would have its backslashes interpreted


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a table is out of date")
    check = parser.parse_args().check
    old = {path: path.read_text(encoding="utf-8") for path in documents()}
    stale = [path for path, text in documents().items() if text != old[path]]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
        if not check:
            path.write_text(documents()[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
