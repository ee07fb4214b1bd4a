"""Generate the tables of README.md, of the model cards and of docs/ from committed results.

Scores come from `savl evaluate --json`, limits from `benchmarks.limits`, ratios from `benchmarks.ratios`.
`benchmarks.reporting.report` writes them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import savl

ROOT = Path(__file__).resolve().parents[2]
SCORES = ROOT / "savl" / "weights" / "scores"
LIMITS = ROOT / "benchmarks" / "results"
PUBLISHED = LIMITS / "training" / "published.csv"


def scores(model: str) -> str:
    """Return a Markdown table of the committed scores of a model and of bicubic upsampling."""
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
    """Return a Markdown table of time, memory, and the agreement of tiled with untiled output, one row per machine."""
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


def ratios_of(report: dict[str, Any]) -> str:
    """Return the table of one report of `benchmarks.ratios`."""
    facts = report["machine"]
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']} kernels, torch {facts['torch']}. "
        f"A large matrix product reaches {facts['peak_gflops']:.0f} GFLOP/s and a large copy "
        f"{facts['memory_gb_per_second']:.0f} GB/s.",
        "",
        "| benchmark | baseline | ratio | target | fused |",
        "|---|---|---:|---:|---|",
    ]
    for row in report["ratios"]:
        wanted = f"{row['wanted']:g}" if row["met"] else f"{row['wanted']:g}, **missed**"
        lines.append(f"| {row['what']} | {row['against']} | {row['ratio']:.2f} | {wanted} | {row['detail']} |")
    return "\n".join(lines) + "\n"


def architectures() -> str:
    """Return tables of other authors' architectures, as they are and accelerated, one for each machine."""
    parts = []
    for path in sorted(LIMITS.glob("*/architectures.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        facts = report["devices"]["cpu"]
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        for each in report["benchmarks"]:
            entry, _, variant = each["params"]["of_suite"]
            rows.setdefault(entry.removesuffix(", tile"), {})[variant] = each
        columns = ("architecture", "eager", "SDPA", "OpenVINO", "accelerated", "speedup", "over the fastest baseline")
        lines = [
            f"{facts['device']}, {facts['threads']} threads, {facts['instruction_set']} kernels, torch "
            f"{facts['torch']}, float32, one tile of 64×64 pixels. All variants of a row were timed in turn.",
            "",
            f"| {' | '.join(columns)} |",
            f"|---|{'---:|' * (len(columns) - 1)}",
        ]
        for name, variants in rows.items():
            seconds = {variant: each["stats"]["median"] for variant, each in variants.items()}
            eager, fast = seconds["eager"], seconds["accelerated"]
            baseline = min(value for variant, value in seconds.items() if not variant.startswith("accelerated"))
            cells = [
                f"{seconds[each]:.3g} s" if each in seconds else "-" for each in ("eager", "sdpa", "openvino, float32")
            ]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {fast:.3g} s | {eager / fast:.2f} | {baseline / fast:.2f} |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def published(model: str) -> str:
    """Return a Markdown table of the scores in the SAVL paper, and the committed scores of bicubic and of a model."""
    lines = [
        "| method | parameters, M | RealSR PSNR | DRealSR PSNR / SSIM | SVSR PSNR |",
        "|---|---:|---:|---:|---:|",
    ]
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            lines.append(
                f"| {row['method']}, as published | {row['parameters_millions']} | {row['realsr_psnr']} "
                f"| {row['drealsr_psnr']} / {row['drealsr_ssim']} | {row['svsr_psnr']} |"
            )
    means = [
        json.loads((SCORES / model / f"{name}.json").read_text(encoding="utf-8"))["mean"]
        for name in ("RealSR", "DRealSR")
    ]
    count = sum(parameter.numel() for parameter in savl.load(model).parameters())
    for method, size in {"bicubic": "-", model: f"{count / 1e6:.2f}"}.items():
        for channels in ("rgb", "y"):
            realsr, drealsr = (mean[method] for mean in means)
            lines.append(
                f"| {method}, measured, {channels.upper()} | {size} | {realsr[f'psnr_{channels}']:.2f} "
                f"| {drealsr[f'psnr_{channels}']:.2f} / {drealsr[f'ssim_{channels}']:.4f} | - |"
            )
    return "\n".join(lines) + "\n"


def _row(scores: dict[str, float]) -> str:
    return f"{scores['psnr_y']:.2f} / {scores['ssim_y']:.4f} / {scores['psnr_rgb']:.2f}"


def documents(readme: Mapping[str, str]) -> dict[Path, str]:
    """Return the text of every document with a table, by path.

    Args:
        readme: Tables that only README.md contains, by the name of their marker.
    """
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("models", "comparison", "accelerating"))]
    found = dict.fromkeys(pages, "savl-tiny")
    found |= {path: path.stem for path in (ROOT / "savl" / "weights").glob("*.md")}
    texts = {}
    for path, model in found.items():
        text = path.read_text(encoding="utf-8")
        for name, table in {
            "scores": scores(model),
            "limits": limits(),
            "published": published(model),
            "architectures": architectures(),
            **readme,
        }.items():
            text = between(name, table, text)
        texts[path] = text
    return texts


def between(name: str, table: str, text: str) -> str:
    """Return the text with a table put between the markers of its name, if the text has them."""
    marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    return marked.sub(lambda _: table, text)  # a function: a string would have its backslashes interpreted
