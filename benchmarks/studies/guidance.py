"""Measure how much a network uses its degradation field: upscale with the field, and with parts of it replaced.

    python -m benchmarks.studies.guidance --lr FOLDER --hr FOLDER [--model savl-tiny] [--json FILE]

The field is estimated as usual and changed before the network reads it. Its mean is replaced by the average over the
image (the type of degradation without its position), by that of the next image (another type) or by that of all images
(no type); its severity map is replaced by 1. The loss of PSNR shows how much the trained network uses the part. A
network that is trained without it may be as good (`benchmarks.studies.baselines`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import savl
from savl.evaluation import fidelity
from savl.images.pairs import match_pairs, read_pair
from savl.network import SAVL, DegradationField

Change = Callable[[DegradationField, int], DegradationField]


def changes(means: Tensor) -> dict[str, Change]:
    """Return functions that change the field of image i, by the description of the changed field.

    Args:
        means: ``(n, R)``: spatial mean of mu for every image.
    """

    def with_mean(field: DegradationField, mean: Tensor) -> DegradationField:
        return replace(field, mu=mean[None, :, None, None].expand_as(field.mu).contiguous())

    def with_severity_1(field: DegradationField) -> DegradationField:
        assert field.severity is not None
        return replace(field, severity=torch.ones_like(field.severity))

    over_all_images = means.mean(dim=0)
    return {
        "unchanged": lambda field, i: field,
        "mean replaced by its average over the image": lambda field, i: with_mean(field, means[i]),
        "mean replaced by that of the next image": lambda field, i: with_mean(field, means[(i + 1) % len(means)]),
        "mean replaced by that of all images": lambda field, i: with_mean(field, over_all_images),
        "severity replaced by 1": lambda field, i: with_severity_1(field),
        "mean replaced by that of all images, severity by 1": lambda field, i: with_severity_1(
            with_mean(field, over_all_images)
        ),
    }


@torch.inference_mode()
def measure(model: SAVL, lr: str, hr: str) -> dict[str, float]:
    """Return the mean PSNR of luma in dB for every change of the field.

    Args:
        model: A network with a variational field, on the CPU.
        lr: Folder of degraded images.
        hr: Folder of their originals, with the same names.

    Raises:
        ValueError: The network has no severity, or the folders do not match.
    """
    scale = model.config.scale
    pairs = [read_pair(pair, scale) for pair in match_pairs(lr, hr)]
    means = []
    for small, _ in pairs:
        field = model.estimate(small[None])
        if field is None or field.severity is None:
            raise ValueError(f"model must have a variational degradation code, got {model.config.degradation_code!r}")
        means.append(field.mu.mean(dim=(2, 3))[0])
    variants = changes(torch.stack(means))
    scores: dict[str, list[float]] = {name: [] for name in variants}
    for i, (small, large) in enumerate(pairs):
        field = model.estimate(small[None])
        assert field is not None
        for name, change in variants.items():
            sr = model.reconstruct(small[None], change(field, i))[0].clamp(0, 1)
            scores[name].append(fidelity(sr, large, crop=scale).psnr_y)
    return {name: statistics.fmean(values) for name, values in scores.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", required=True, metavar="FOLDER", help="degraded images")
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="their originals, with the same names")
    parser.add_argument("--model", default="savl-tiny", help="shipped weights, or a file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    model = savl.load(options.model).eval()
    savl.use_fused_kernels(model=model)
    found = measure(model, options.lr, options.hr)
    unchanged, *_ = found.values()
    for name, psnr in found.items():
        print(f"{name}: {psnr:.3f} dB Y, {psnr - unchanged:+.3f}")
    if options.json is not None:
        folder = "/".join(Path(options.lr).resolve().parts[-2:])
        report = {"model": options.model, "lr": folder, "psnr_y": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
