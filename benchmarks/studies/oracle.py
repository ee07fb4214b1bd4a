"""Measure how much PSNR a field can add: train one small network with a true, a constant, and a learned field.

    python -m benchmarks.studies.oracle --hr FOLDER --test FOLDER [--estimator WEIGHTS ...] [--steps N] [--json FILE]

All networks begin with the same weights, see the same batches, and read their field in every DSCA from the first step.
Only the source of the field differs, and it is not trained:

- ``oracle`` encodes the recipe by which each pixel was degraded. It is the upper bound, except for images that were
  degraded by the whole pipeline: for them it encodes only the mask, and a learned field may be better.
- ``constant`` is 0 everywhere with severity 1. It is the lower bound: an unguided network of the same size, because
  the bias of the guidance can learn any fixed gamma.
- The estimator of each ``--estimator`` gives a learned field between the two.

Settings are those of ``configs/studies/oracle.toml``; ``--set`` changes them. Every training has a folder of its own
below ``runs/oracle``. An interrupted run resumes from its checkpoint; a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import savl
from savl.bicubic import bicubic_downsample, bicubic_upscale
from savl.degradation import Degradation, DegradationConfig
from savl.evaluation import fidelity
from savl.images.folder import find_images, read_rgb
from savl.network import SAVL, DegradationField
from savl.training import Trainer, load_config
from savl.training.config import TrainingConfig
from savl.training.data import Batch, PairPool
from savl.training.objectives import CALIBRATED_RANGE, Losses, Outcome, fidelity_loss
from savl.training.patches import PatchSource
from savl.training.trainer import WEIGHTS_NAME

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "studies" / "oracle.toml"
Source = Callable[[Batch], DegradationField]
"""Function that returns the degradation field of a batch."""

LARGEST = (2.0, 15.0, 80.0, 1.0, 0.78)
"""Values that count as 1: blur in LR pixels, noise in 8-bit units, 100 minus the JPEG quality, the whole pipeline, and
the standard deviation of a camera's point spread function in pixels."""
KNOTS = 4
"""Channels that encode a value. Gamma is linear in mu, so it can be any function that is linear between the knots."""
LENGTH = 7.0
"""Sum of mu over the channels that encode a value, at a knot. The sum of ``|mu|`` over the channels of savl-tiny is
also 7 (Kodak24). A step of Adam changes gamma by at most the learning rate times this sum."""
DRAWS = 3
"""Number of degradations of each test image, for each kind."""
SIDE = 256
"""Side of the test images in HR pixels."""
BICUBIC, MIXTURE = "bicubic reduction", "mean without bicubic reduction"
"""Kinds of test images beside those of the mixture."""
INTERPOLATION = "bicubic"
METRICS = ("psnr_y", "psnr_rgb")


def oracle_field(batch: Batch, latent: int) -> DegradationField:
    """Return the field that encodes the recipe of each pixel.

    The five values of `LARGEST` are scaled to [0, 1] and multiplied by the degradation mask. Each is interpolated
    between `KNOTS` equally spaced knots, which have a channel each, and 0, where all channels are 0. Every channel is
    repeated as often as there is room. The variance is 1 without degradation and 0.7 under
    full degradation, which is the target of `ObjectiveConfig.calibration`. Severity is computed as in the network.

    Args:
        batch: Batch with amounts and a degradation mask, of images with a strength of 1.
        latent: Channels R of the field, at least five times `KNOTS`.
    """
    assert batch.amounts is not None
    assert batch.degradation_mask is not None
    blur, noise, jpeg = batch.amounts.unbind(dim=1)
    whole, camera = blur.isnan(), jpeg.isnan() & ~blur.isnan()
    none = torch.zeros_like(blur)
    values = (blur.where(~camera, none), noise, jpeg, whole.float(), blur.where(camera, none))
    amounts = torch.stack(values, dim=1).nan_to_num(0.0) / batch.y.new_tensor(LARGEST)
    position = KNOTS * amounts.clamp(max=1.0)[:, :, None, None, None] * batch.degradation_mask[:, None, None]
    knots = torch.arange(1.0, KNOTS + 1.0, device=position.device).view(-1, 1, 1)
    code = (1.0 - (position - knots).abs()).clamp(min=0.0).flatten(1, 2)  # (B, 5 · KNOTS, h, w)
    repeats = latent // code.shape[1]
    mu = code.new_zeros(code.shape[0], latent, *code.shape[2:])
    mu[:, : repeats * code.shape[1]] = code.repeat_interleave(repeats, dim=1) * (LENGTH / repeats)
    logvar = (1.0 - CALIBRATED_RANGE * batch.degradation_mask).log()
    return DegradationField.from_posterior(mu, logvar[:, None].expand_as(mu).contiguous())


def constant_field(batch: Batch, latent: int) -> DegradationField:
    """Return a field of 0 with severity 1."""
    size = batch.y.shape[0], latent, *batch.y.shape[2:]
    return DegradationField.from_posterior(torch.zeros(size), torch.zeros(size))


def learned_field(batch: Batch, model: SAVL) -> DegradationField:
    """Return the field that a network estimates, without its restoration strength, which the other fields lack."""
    with torch.no_grad():
        field = model.estimate(batch.y)
    assert field is not None
    return replace(field, strength=None)


def trained(config: TrainingConfig, name: str, field: Source, batches: PairPool) -> Callable[[Batch], Tensor]:
    """Return the upscaling by the averaged network after the training with a source, in a folder of the given name."""
    folder = f"{name}-seed{config.run.seed}-steps{config.run.steps}"
    run = replace(config.run, output=str(Path(config.run.output) / folder))
    trainer = Trainer(replace(config, run=run), batches)

    def guided(batch: Batch, seed: int, step: int) -> Outcome:
        used = field(batch)
        image = trainer.model.reconstruct(batch.y, used).float()
        loss = fidelity_loss(image, batch.x, config.objective.fidelity)
        return Outcome(Losses(loss, loss), image, used.severity)

    trainer.objective = guided  # the estimator of the network is not used and stays random
    started = time.monotonic()
    trainer.train()
    print(f"{folder}: {time.monotonic() - started:.0f} s", flush=True)
    model = savl.load(Path(run.output) / WEIGHTS_NAME)
    savl.use_fused_kernels(config.run.fused, model=model)
    return lambda batch: model.reconstruct(batch.y, field(batch))


def mixtures(config: DegradationConfig) -> dict[str, DegradationConfig]:
    """Return the degradation of each kind of images by the name of the kind."""
    others = replace(config, camera=replace(config.camera, probability=0.0))
    kinds = {
        name: replace(others, single_operation=1.0, single=replace(config.single, operations=(name,)))
        for name in config.single.operations
    }
    kinds["whole pipeline"] = replace(others, single_operation=0.0)
    if config.camera.probability > 0:
        kinds["camera"] = replace(config, camera=replace(config.camera, probability=1.0))
    return kinds


def degraded_images(folder: str, config: DegradationConfig, scale: int) -> dict[str, list[list[Batch]]]:
    """Return test images, `DRAWS` batches of one image each, by kind and image; the same ones in every call."""
    kinds = {name: Degradation(mixture, scale) for name, mixture in mixtures(config).items()}
    found: dict[str, list[list[Batch]]] = {name: [] for name in (*kinds, BICUBIC)}
    for index, path in enumerate(find_images([folder], argument="--test")):
        x = read_rgb(path)[None]
        for axis in (2, 3):  # the centre of the image
            side = min(x.shape[axis], SIDE) // scale * scale
            x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
        z = bicubic_downsample(x, scale)
        for name, degradation in kinds.items():
            draws = [degradation(x, (draw, index)) for draw in range(DRAWS)]
            found[name].append(
                [Batch(d.y, d.x, z, d.degradation_mask, 1, torch.from_numpy(d.recipe.amounts())) for d in draws]
            )
        y = (z.clamp(0.0, 1.0) * 255.0).round() / 255.0
        found[BICUBIC].append([Batch(y, x, z, torch.zeros_like(z[:, 0]), 1, torch.zeros(1, 3))])
    return found


@torch.inference_mode()
def psnr(upscale: Callable[[Batch], Tensor], tests: dict[str, list[list[Batch]]], crop: int) -> dict[str, Any]:
    """Return the PSNR of every image, mean over its draws, by metric and by kind.

    The kind `MIXTURE` is the mean over all kinds but `BICUBIC`.
    """
    found: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
    for kind, images in tests.items():
        scores = [[fidelity(upscale(each)[0].clamp(0, 1), each.x[0], crop=crop) for each in draws] for draws in images]
        for name, by_kind in found.items():
            by_kind[kind] = [statistics.fmean(getattr(score, name) for score in draws) for draws in scores]
    for by_kind in found.values():
        kinds = [values for kind, values in by_kind.items() if kind != BICUBIC]
        by_kind[MIXTURE] = [statistics.fmean(values) for values in zip(*kinds, strict=True)]
    return found


def gain(scores: Sequence[float], lower: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference over the images and its standard error."""
    differences = [a - b for a, b in zip(scores, lower, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def summary(scores: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return the mean of a metric by source, gains over the constant field, and the learned fields' shares, by kind.

    A gain is a mean difference with its standard error. A share is the gain of a learned field divided by that of the
    oracle, and None where the oracle gains less than twice its standard error.
    """
    found = {}
    for kind, lower in scores["constant"][metric].items():
        by_source = {name: each[metric][kind] for name, each in scores.items()}
        gains = {name: gain(each, lower) for name, each in by_source.items() if name not in (INTERPOLATION, "constant")}
        bound, error = gains.get("oracle", (0.0, 0.0))
        shares = {name: value / bound if bound > 2 * error else None for name, (value, _) in gains.items()}
        shares.pop("oracle", None)
        means = {name: statistics.fmean(each) for name, each in by_source.items()}
        found[kind] = {"mean": means, "gain": gains, "share": shares}
    return found


def table(rows: dict[str, Any], metric: str) -> str:
    """Return a summary as a Markdown table."""
    first = next(iter(rows.values()))
    head = [f"{metric}, dB", *first["mean"], *(f"{name} - constant" for name in first["gain"])]
    head += [f"share of {name}" for name in first["share"]]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for kind, row in rows.items():
        cells = [kind, *(f"{value:.3f}" for value in row["mean"].values())]
        cells += [f"{value:+.3f} ± {error:.3f}" for value, error in row["gain"].values()]
        cells += ["" if share is None else f"{100 * share:.0f} %" for share in row["share"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every source; print and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", required=True, action="append", metavar="FOLDER", help="photographs to train on")
    parser.add_argument("--test", required=True, metavar="FOLDER", help="high-resolution images to measure with")
    parser.add_argument("--estimator", action="append", metavar="WEIGHTS", help="learned fields; savl-tiny by default")
    parser.add_argument("--steps", type=int, metavar="N", help="number of steps, instead of that in the settings")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.NAME=VALUE", help="change a setting")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    steps = [f"run.steps={options.steps}"] if options.steps else []
    config = load_config(CONFIG, [f"data.hr={json.dumps(options.hr)}", *steps, *options.set])
    if config.degradation.strength != (1.0, 1.0):
        raise ValueError(
            f"degradation.strength must be (1, 1): the mask contains it, got {config.degradation.strength}"
        )
    latent, scale = config.model.latent, config.model.scale
    sources: dict[str, Source] = {
        "constant": partial(constant_field, latent=latent),
        "oracle": partial(oracle_field, latent=latent),
    }
    folders = {name: name for name in sources}
    for weights in options.estimator or ["savl-tiny"]:
        model = savl.load(weights).eval()
        savl.use_fused_kernels(config.run.fused, model=model)
        sources[weights] = partial(learned_field, model=model)
        assert model.estimator is not None
        digest = zlib.crc32(b"".join(each.numpy().tobytes() for each in model.estimator.state_dict().values()))
        folders[weights] = f"learned-{digest:08x}"
    tests = degraded_images(options.test, config.degradation, scale)
    scores = {INTERPOLATION: psnr(lambda batch: bicubic_upscale(batch.y, scale), tests, scale)}
    patches = PatchSource(config.data.hr, (config.data.patch + 2 * config.data.margin) * scale)
    batches = PairPool(patches, Degradation(config.degradation, scale), config.data, seed=config.run.seed)
    for name, field in sources.items():
        scores[name] = psnr(trained(config, folders[name], field, batches), tests, scale)
        rows = {metric: summary(scores, metric) for metric in METRICS}
        if options.json is not None:
            report = {"settings": config.to_dict(), "summary": rows, "images": scores}
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for metric in METRICS:
            print(table(rows[metric], metric), flush=True)


if __name__ == "__main__":
    main()
