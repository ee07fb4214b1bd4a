"""Learn the restoration strength of a network, and measure it on cameras that it was not learned from.

    python -m benchmarks.studies.city100_pairs --city100 FOLDER --output pairs
    python -m benchmarks.studies.restoration_strength --hr FOLDER --pairs pairs [--model WEIGHTS] [--output FILE]

With d the difference of the network's image from bicubic interpolation b, and t that of the original, the squared error
of the image b + s · d is a quadratic function of the strengths s. So the sums of d · t and d · d over the HR pixels of
every LR pixel are computed once, and the strength is then fitted to thousands of patches in seconds. `savl train` would
need many more steps, because the error varies much more from patch to patch than with the strength.

Half of the patches are from the pairs, the others are photographs degraded by the pipeline, without cameras. The
originals of the pairs are shifted at random by `MISREGISTRATION` pixels (`PairsConfig.misregistration`): City100 shows
flat prints, which are registered better than scenes with depth. The loss is minus the PSNR of a patch.

Every camera is left out in turn, and the strength is measured on this camera and on other degraded patches. The
strength that is written is fitted to all cameras.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import savl
from benchmarks.studies.camera_blur import RATIOS
from savl.bicubic import bicubic_upscale
from savl.degradation import Degradation
from savl.network import SAVL
from savl.network.estimator import RestorationStrength
from savl.training import load_config
from savl.training.data import Batch, PairPool
from savl.training.data_config import PairsConfig
from savl.training.paired_patches import PairedPatches
from savl.training.patches import PatchSource

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "savl_tiny.toml"
MISREGISTRATION = 1.0
"""Standard deviation of the shift of an original along each axis, in HR pixels."""
PATCH = 32
BATCH = 32
FITTED = 0.75
"""Share of the degraded patches that the strength is fitted to; it is measured on the others."""
STEPS = 1500
FIXED = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Patches:
    """Field and quadratic error of patches, as functions of the strength."""

    mu: Tensor
    """``(N, R, h, w)``."""
    logvar: Tensor
    """``(N, R, h, w)``."""
    along: Tensor
    """``(N, h, w)``: sum of d · t over channels and HR pixels of each LR pixel."""
    square: Tensor
    """``(N, h, w)``: the same of d · d."""
    rest: Tensor
    """``(N,)``: sum of t · t over the patch."""
    count: int
    """Number of values of an HR patch."""

    def __getitem__(self, rows: Tensor | slice) -> Patches:
        return Patches(
            self.mu[rows], self.logvar[rows], self.along[rows], self.square[rows], self.rest[rows], self.count
        )

    def __len__(self) -> int:
        return len(self.rest)

    def psnr(self, strength: Tensor) -> Tensor:
        """Return the PSNR of every patch in dB, ``(N,)``, for strengths that broadcast to ``(N, h, w)``."""
        error = (strength.square() * self.square - 2.0 * strength * self.along).sum(dim=(1, 2)) + self.rest
        return -10.0 * (error / self.count).clamp(min=1e-6).log10()


def joined(parts: Sequence[Patches]) -> Patches:
    """Return the patches of several sets as one."""
    names = ("mu", "logvar", "along", "square", "rest")
    return Patches(*(torch.cat([getattr(part, name) for part in parts]) for name in names), parts[0].count)


@torch.no_grad()
def measured(model: SAVL, batch: Batch) -> Patches:
    """Run a network on a batch and return what the error depends on.

    Args:
        model: Network with a variational field.
        batch: ``(B, 3, h, w)`` images y and their ``(B, 3, scale·h, scale·w)`` originals x, in [0, 1].
    """
    scale = model.config.scale
    field = model.estimate(batch.y)
    assert field is not None
    assert field.logvar is not None
    bicubic = bicubic_upscale(batch.y, scale)
    d = model.reconstruct(batch.y, replace(field, strength=None)) - bicubic
    t = batch.x - bicubic

    def by_lr_pixel(values: Tensor) -> Tensor:
        cells: Tensor = values.sum(dim=1).unflatten(2, (-1, scale)).unflatten(1, (-1, scale)).sum(dim=(2, 4))
        return cells

    return Patches(
        field.mu.half(),
        field.logvar.half(),
        by_lr_pixel(d * t),
        by_lr_pixel(d * d),
        t.square().sum(dim=(1, 2, 3)),
        t[0].numel(),
    )


def fitted(model: SAVL, pairs: Patches, degraded: Patches, steps: int, seed: int) -> RestorationStrength:
    """Fit a strength from random initial weights.

    Args:
        model: Network whose configuration the strength gets.
        pairs: Patches of real pairs.
        degraded: Degraded patches; every step draws `BATCH` of both.
        steps: Number of steps of Adam.
        seed: Seed of the initial weights and of all draws.
    """
    torch.manual_seed(seed)
    strength = RestorationStrength(model.config)
    optimizer = torch.optim.Adam(strength.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        losses = []
        for patches in (pairs, degraded):
            some = patches[torch.randint(len(patches), (BATCH,))]
            losses.append(-some.psnr(strength(some.mu.float(), some.logvar.float())).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
    return strength


@torch.no_grad()
def scores(strength: RestorationStrength, patches: Patches) -> dict[str, Any]:
    """Return the PSNR and the strength on patches, means, and the PSNR at `FIXED` strengths."""
    learned = strength(patches.mu.float(), patches.logvar.float())
    fixed = {str(value): float(patches.psnr(torch.tensor(value)).mean()) for value in FIXED}
    return {"learned": float(patches.psnr(learned).mean()), "strength": float(learned.mean()), "fixed": fixed}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [f"| PSNR RGB, dB | {' | '.join(map(str, FIXED))} | learned | mean strength |", f"|---|{'---:|' * 7}"]
    for name, row in results.items():
        cells = [f"{value:.3f}" for value in (*row["fixed"].values(), row["learned"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['strength']:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the patches, leave out each camera in turn, and write a strength that is fitted to all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", required=True, action="append", metavar="FOLDER", help="photographs to degrade")
    parser.add_argument("--pairs", type=Path, required=True, metavar="FOLDER", help="output of city100_pairs")
    parser.add_argument("--model", default="savl-tiny", metavar="WEIGHTS", help="shipped weights, or a file")
    parser.add_argument(
        "--patches", type=int, default=768, metavar="N", help="degraded patches, and patches of a camera"
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="steps of a fit")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="weights with the new strength")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    model = savl.load(options.model).eval()
    if not model.config.restoration_strength or model.config.degradation_code != "variational":
        parser.error(f"--model must have a restoration strength and a variational field, got {options.model}")
    if options.patches < 2 * BATCH:
        parser.error(f"--patches must be at least {2 * BATCH}, got {options.patches}")
    savl.use_fused_kernels(model=model)
    scale = model.config.scale
    config = load_config(CONFIG, [f"data.hr={json.dumps(options.hr)}"])
    data = replace(config.data, patch=PATCH, batch=BATCH, fresh=BATCH, pool=BATCH)
    without_cameras = replace(config.degradation, camera=replace(config.degradation.camera, probability=0.0))
    degradation = Degradation(without_cameras, scale)

    def collected(pool: PairPool) -> Patches:
        return joined([measured(model, pool(step)) for step in range(options.patches // BATCH)])

    photographs = PatchSource(data.hr, (PATCH + 2 * data.margin) * scale)
    degraded = collected(PairPool(photographs, degradation, data, seed=options.seed))
    cameras = {}
    for camera in RATIOS:
        folders = [(str(options.pairs / camera / kind),) for kind in ("LR", "HR")]
        source = PairedPatches(PairsConfig(*folders, misregistration=MISREGISTRATION), PATCH, scale)
        cameras[camera] = collected(PairPool(None, degradation, data, seed=options.seed, pairs=source))
    known = round(FITTED * len(degraded))
    results = {}
    for camera, held_out in cameras.items():
        others = joined([patches for name, patches in cameras.items() if name != camera])
        strength = fitted(model, others, degraded[:known], options.steps, options.seed)
        results[f"{camera}, left out"] = scores(strength, held_out)
        results[f"degraded, without {camera}"] = scores(strength, degraded[known:])
    strength = fitted(model, joined(list(cameras.values())), degraded, options.steps, options.seed)
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.output is not None:
        model.strength = strength.eval()
        savl.save(model, options.output)


if __name__ == "__main__":
    main()
