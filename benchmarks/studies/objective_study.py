"""Compare objectives of the degradation field in short trainings of the estimator and the likelihood decoder.

    python -m benchmarks.studies.objective_study --hr FOLDER --test FOLDER [--steps N] [--json FILE]

All variants start from the same weights and see the same batches. The network itself is not trained, so a variant takes
minutes and only the objective differs. Measured are the nats that the field carries, the reconstruction of y with the
field and with a sample of the prior instead, the agreement of its variance with a known mask
(`savl.evaluation.severity`), and the accuracy of a classifier of five noise levels on unseen scenes.
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

import torch
from torch import Tensor

from savl.degradation import Degradation, DegradationConfig, bicubic_downsample
from savl.degradation.config import SpatialConfig
from savl.evaluation.severity import severity_agreement
from savl.images.folder import find_images, read_rgb
from savl.network import CONFIGS, SAVL, DegradationField
from savl.training.data import Batch, PairPool
from savl.training.data_config import DataConfig
from savl.training.objective_config import ObjectiveConfig
from savl.training.objectives import Objective
from savl.training.patches import PatchSource

FIXED = ObjectiveConfig(alpha=1.0, beta=1e-3)
LEARNED = ObjectiveConfig(alpha=0.01, beta=0.01, likelihood_scale="learned")
SCHEDULED = replace(FIXED, kl_start=200, kl_warmup=200)
CHOSEN = replace(LEARNED, suppression=1.0, free_bits=1.0, calibration=0.3)
VARIANTS: dict[str, tuple[ObjectiveConfig, bool]] = {
    "L1, beta 1e-3": (FIXED, True),
    "L1, beta 1e-3 after 200 steps": (SCHEDULED, True),
    "L1, beta 3e-4 after 200 steps": (replace(SCHEDULED, beta=3e-4), True),
    "L1, beta 1e-3, lambda 1, after 200 steps": (replace(SCHEDULED, suppression=1.0), True),
    "L2, beta 1e-4 after 200 steps": (replace(SCHEDULED, likelihood="gaussian", beta=1e-4), True),
    "Laplacian of learned scale": (LEARNED, True),
    "Laplacian of learned scale, lambda 1, 1 nat free": (replace(CHOSEN, calibration=0.0), True),
    "the same, calibrated": (CHOSEN, True),
    "the same, Gaussian": (replace(CHOSEN, likelihood="gaussian"), True),
    "the same (Laplacian), image instead of high-pass": (CHOSEN, False),
    "calibration alone": (replace(CHOSEN, alpha=0.0), True),
}
"""Objective, and whether the estimator has its high-pass filter."""
LEVELS = (0.0, 5.0, 10.0, 20.0, 30.0)
"""Standard deviations of the noise that is classified, in 8-bit units."""
RATE = 2e-3


def train(model: SAVL, objective: Objective, batches: PairPool, steps: int) -> list[dict[str, float]]:
    """Train estimator and decoder; return the terms of the objective at every step."""
    parameters = [p for n, p in objective.named_parameters() if n.startswith(("model.estimator.", "decoder."))]
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
    found = []
    for step in range(steps):
        batch = batches(step)
        field = model.estimate(batch.y, seed=step)
        assert field is not None
        total, terms = objective.field_losses(field, batch, step)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append({name: float(value.detach()) for name, value in terms.items()})
    return found


@torch.no_grad()
def without_field(objective: Objective, batch: Batch, field: DegradationField) -> float | None:
    """Return L_rec with a sample of the prior instead of the field's; None without a decoder."""
    if objective.decoder is None:
        return None
    noise = torch.randn(field.mu.shape, generator=torch.Generator().manual_seed(0))
    _, terms = objective.field_losses(replace(field, sample=noise), batch, 0)
    return float(terms["reconstruction"])


@torch.no_grad()
def noise_accuracy(model: SAVL, images: Sequence[Path]) -> float:
    """Return the accuracy of the noise level on unseen scenes, by least squares on the mean of mu over 48×48 pixels."""
    features, scenes = [], []
    for scene, path in enumerate(images):
        z = bicubic_downsample(read_rgb(path)[None, :, :192, :192], 4)
        for level, sigma in enumerate(LEVELS):
            generator = torch.Generator().manual_seed(scene * len(LEVELS) + level)
            noisy = z + torch.randn(z.shape, generator=generator) * (sigma / 255.0)
            field = model.estimate((noisy.clamp(0.0, 1.0) * 255.0).round() / 255.0)
            assert field is not None
            features.append(field.mu.mean(dim=(0, 2, 3)))
            scenes.append(scene)
    x, scene_of = torch.stack(features).double(), torch.tensor(scenes)
    seen = scene_of < len(images) // 2
    mean, spread = x[seen].mean(dim=0), x[seen].std(dim=0) + 1e-9
    x = torch.cat(((x - mean) / spread, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    level_of = torch.arange(len(LEVELS)).repeat(len(images))
    target = torch.nn.functional.one_hot(level_of[seen], len(LEVELS)).to(x.dtype)
    gram = x[seen].T @ x[seen] + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype)
    weights: Tensor = torch.linalg.solve(gram, x[seen].T @ target)
    return float(((x[~seen] @ weights).argmax(dim=1) == level_of[~seen]).double().mean())


def measure(name: str, hr: str, test: str, steps: int) -> dict[str, Any]:
    """Train one variant and measure its field."""
    settings, high_pass = VARIANTS[name]
    torch.manual_seed(0)
    model = SAVL(replace(CONFIGS["savl-tiny"], estimator_high_pass=high_pass))
    objective = Objective(model, settings)
    data = DataConfig(hr=(hr,))
    degradation = DegradationConfig(strength=(0.0, 1.0), spatial=SpatialConfig(probability=0.4))
    patches = PatchSource(data.hr, (data.patch + 2 * data.margin) * 4)
    batches = PairPool(patches, Degradation(degradation, 4), data, seed=0)
    started = time.monotonic()
    found = train(model, objective, batches, steps)
    seconds = time.monotonic() - started
    last = found[-steps // 5 :]
    means = {term: statistics.fmean(each[term] for each in last) for term in last[0]}
    batch = batches(steps)
    field = model.estimate(batch.y, seed=0)
    assert field is not None
    images = find_images([test], argument="--test")
    agreement = [each.correlation for each in severity_agreement(model.eval(), images[:30])]
    return {
        **means,
        "reconstruction_by_prior": without_field(objective, batch, field),
        "severity": statistics.fmean(agreement),
        "noise_accuracy": noise_accuracy(model, images),
        "seconds": seconds,
        "objective": asdict(settings),
        "high_pass": high_pass,
    }


def table(report: dict[str, Any]) -> str:
    """Return the study as a Markdown table."""
    lines = [
        "| objective | KL, nats per pixel | L_rec | L_rec with the prior's sample | severity | noise level |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["variants"].items():
        digits = {"kl": 3, "reconstruction": 4, "reconstruction_by_prior": 4, "severity": 2}
        cells = [f"{row[key]:.{places}f}" if row.get(key) is not None else "" for key, places in digits.items()]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * row['noise_accuracy']:.0f} % |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all variants; print and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="high-resolution images to train on")
    parser.add_argument("--test", required=True, metavar="FOLDER", help="images to measure the field on")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"steps": options.steps, "learning_rate": RATE, "variants": {}}
    for name in VARIANTS:
        report["variants"][name] = measure(name, options.hr, options.test, options.steps)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(table(report), flush=True)


if __name__ == "__main__":
    main()
