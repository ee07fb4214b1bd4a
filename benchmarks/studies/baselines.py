"""Train SAVL, its baselines and its ablations under the same conditions, and compare them in one table.

    python -m benchmarks.studies.baselines --hr FOLDER --test FOLDER [--pairs LR HR] [--steps N] [--quick] [--json FILE]
                                           [CONFIG ...]

Every configuration (``configs/baselines/*.toml`` by default) is trained in a folder of its own below ``runs/``. An
interrupted run resumes from its checkpoint; a finished run is not repeated. All networks are then analysed on
photographs that none of them was trained on (`savl.analysis`), and upscale the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import savl
from savl.analysis.report import json_value
from savl.analysis.run import AnalysisConfig, ModelResult, analyze
from savl.evaluation import evaluate_pair, match_pairs
from savl.images.folder import find_images
from savl.network import SAVL
from savl.training import Trainer, load_config
from savl.training.trainer import WEIGHTS_NAME

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "baselines"


def trained(config: Path, hr: Sequence[str], steps: int | None) -> SAVL:
    """Return the network of a configuration; train it if there are no weights of it."""
    changes = [f"data.hr={json.dumps(list(hr))}", *([f"run.steps={steps}"] if steps else [])]
    settings = load_config(config, changes)
    weights = Path(settings.run.output) / WEIGHTS_NAME
    if not weights.exists():
        print(f"training {config.stem}", flush=True)
        started = time.monotonic()
        Trainer(settings).train()
        print(f"{config.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return savl.load(weights)


def pair_scores(model: SAVL, lr: str, hr: str) -> dict[str, Any]:
    """Return the mean PSNR of pairs and that of bicubic interpolation, in dB."""
    upscaler = savl.Upscaler(model)
    scores = [evaluate_pair(pair, upscaler) for pair in match_pairs(lr, hr)]
    return {
        "pairs": "/".join(Path(lr).resolve().parts[-2:]),
        "psnr_y": statistics.fmean(score.model.psnr_y for score in scores),
        "psnr_rgb": statistics.fmean(score.model.psnr_rgb for score in scores),
        "bicubic_psnr_y": statistics.fmean(score.bicubic.psnr_y for score in scores),
        "bicubic_psnr_rgb": statistics.fmean(score.bicubic.psnr_rgb for score in scores),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table."""
    head = ["", "scene", "noise level", "MINE content", "MINE degradation", "HSIC content", "severity"]
    pairs = bool(rows) and "pairs" in rows[0]
    head += ["degraded, dB Y", *(["pairs, dB Y"] if pairs else [])]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        found = row["evidence"]["factorial"]
        noise, restoration, agreement = found["variations"][0], found["restoration"], found["agreement"]
        gain = restoration["model"]["psnr_y"] - restoration["bicubic"]["psnr_y"]
        cells = [
            row["name"],
            f"{100 * noise['scene']['accuracy']['value']:.1f} %",
            f"{100 * noise['level']['accuracy']['value']:.1f} %",
            f"{found['content']['mine']['value']:.2f}",
            f"{found['degradation']['mine']['value']:.2f}",
            f"{found['content']['hsic']['normalised']:.3f}",
            "" if agreement is None else f"{agreement['mean']:.2f}",
            f"{gain:+.2f}",
        ]
        if pairs:
            cells.append(f"{row['pairs']['psnr_y'] - row['pairs']['bicubic_psnr_y']:+.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, analyse, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG")
    parser.add_argument("--hr", required=True, action="append", metavar="FOLDER", help="photographs to train on")
    parser.add_argument("--test", required=True, metavar="FOLDER", help="photographs to analyse with")
    parser.add_argument("--pairs", nargs=2, metavar=("LR", "HR"), help="real pairs to upscale")
    parser.add_argument("--steps", type=int, metavar="N", help="steps instead of those of the configurations")
    parser.add_argument(
        "--quick", action="store_true", help="few repeats of the probes, but as many images for the scores"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    configs = options.configs or sorted(CONFIGS.glob("*.toml"))
    savl.use_fused_kernels()
    models = {config.stem: trained(config, options.hr, options.steps) for config in configs}
    settings = AnalysisConfig()
    if options.quick:
        settings = replace(settings.quick(), images=settings.images)
    analysis = analyze(models, hr=find_images([options.test], argument="--test"), config=settings)
    rows = [_row(model, models[model.name], options.pairs) for model in analysis.models]
    print(table(rows))
    if options.json is not None:
        report = {"analysis": asdict(settings), "models": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _row(result: ModelResult, model: SAVL, pairs: Sequence[str] | None) -> dict[str, Any]:
    found = json_value(result)
    if found["factorial"] is not None:
        found["factorial"].pop("channels")  # long; the report of `savl analyze` contains it
    return {"name": result.name, "evidence": found, **({"pairs": pair_scores(model, *pairs)} if pairs else {})}


if __name__ == "__main__":
    main()
