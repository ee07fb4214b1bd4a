"""Measure how far images that a network upscales in bfloat16 on a CPU are from those in float32.

    python -m benchmarks.studies.bfloat16 --set NAME LR [HR] [--set ...] [--model savl-tiny] [--json FILE]

Every image of the folders is upscaled by `savl.Upscaler` in float32 and in bfloat16, at two strengths: the one that the
network has learned, and 1, at which the errors of the network are largest. `savl upscale` chooses bfloat16 itself for
the weights in `savl.inference.device.MEASURED_IN_BFLOAT16`, which should stay within one 8-bit level of float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import savl
from savl.build_info import build_info
from savl.evaluation import fidelity
from savl.images.folder import find_images, read_rgb
from savl.images.pairs import check_sizes, match_pairs
from savl.inference.enlarge import Strength

STRENGTHS: tuple[Strength, ...] = ("auto", 1.0)


@dataclass(frozen=True)
class Difference:
    """Difference of an image or of a set from float32. A level is one of 8 bits."""

    pixels: int
    """Number of pixels."""
    differ: int
    """Pixels of which any channel differs after rounding to 8 bits."""
    above_one: int
    """Pixels of which any channel differs by more than one level after rounding."""
    worst: int
    """Largest difference of a channel after rounding, in levels."""
    worst_before_rounding: float
    """The same before rounding, in levels."""
    squared: float
    """Sum of the squared differences of all channels before rounding, of values in [0, 1]."""

    @staticmethod
    def between(first: Tensor, second: Tensor) -> Difference:
        """Compare two images ``(3, H, W)`` in [0, 1]."""
        exact = first.double() - second.double()
        levels = ((255 * first).round() - (255 * second).round()).abs().amax(dim=0)
        return Difference(
            levels.numel(),
            int((levels > 0).sum()),
            int((levels > 1).sum()),
            int(levels.max()),
            255 * float(exact.abs().max()),
            float(exact.square().sum()),
        )

    @staticmethod
    def of_set(images: Sequence[Difference]) -> Difference:
        """Return the difference of a set: sums, and maxima of the worst differences."""
        columns = zip(*(asdict(image).values() for image in images), strict=True)
        pixels, differ, above_one, worst, before, squared = columns
        return Difference(sum(pixels), sum(differ), sum(above_one), max(worst), max(before), math.fsum(squared))

    @property
    def psnr(self) -> float:
        """PSNR in dB before rounding."""
        return -10 * math.log10(self.squared / (3 * self.pixels)) if self.squared else math.inf


@dataclass(frozen=True)
class Result:
    """Result of a set of images at one strength."""

    images: int
    difference: Difference
    psnr_float32: float | None
    """Mean PSNR (RGB) of the float32 results against the originals in dB; None without originals."""
    psnr_bfloat16: float | None
    """The same of the bfloat16 results."""

    def report(self) -> dict[str, float | int | None]:
        """Return the figures for a JSON file."""
        found = self.difference
        return {
            "images": self.images,
            "pixels": found.pixels,
            "psnr_between": round(found.psnr, 2),
            "share_differing": round(found.differ / found.pixels, 5),
            "pixels_above_one_level": found.above_one,
            "worst_levels": found.worst,
            "worst_levels_before_rounding": round(found.worst_before_rounding, 3),
            "psnr_float32": self.psnr_float32 and round(self.psnr_float32, 4),
            "psnr_bfloat16": self.psnr_bfloat16 and round(self.psnr_bfloat16, 4),
        }


def measure(
    float32: savl.Upscaler, bfloat16: savl.Upscaler, images: Iterable[tuple[Tensor, Tensor | None]], strength: Strength
) -> Result:
    """Upscale images with two upscalers and compare the results.

    Args:
        float32: Upscaler to compare with.
        bfloat16: Upscaler to measure.
        images: LR images ``(3, h, w)`` and their originals ``(3, scale·h, scale·w)`` or None, in [0, 1].
        strength: As for `savl.Upscaler`.
    """
    differences, scores = [], []
    for lr, hr in images:
        exact, narrow = (upscaler(lr[None], strength=strength).sr[0] for upscaler in (float32, bfloat16))
        differences.append(Difference.between(narrow, exact))
        if hr is not None:
            scores.append([fidelity(sr, hr).psnr_rgb for sr in (exact, narrow)])
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)] if scores else (None, None)
    return Result(len(differences), Difference.of_set(differences), *means)


def read_set(lr: str, hr: str | None, every: int, scale: int) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Read the images of a folder one by one, and their originals from another if there is one.

    Args:
        lr: Folder of LR images.
        hr: Folder of the originals, or None.
        every: Read each n-th image only.
        scale: Expected ratio of the sizes.
    """
    if hr is None:
        for path in find_images([lr], argument="--set")[::every]:
            yield read_rgb(path), None
        return
    for pair in match_pairs(lr, hr)[::every]:
        small, large = read_rgb(pair.lr), read_rgb(pair.hr)
        check_sizes(pair, small.shape[1:], large.shape[1:], scale)
        yield small, large


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the results as a table and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set",
        required=True,
        action="append",
        nargs="+",
        metavar="WORD",
        help="name of a set, folder of its LR images, and optionally folder of the originals; may be repeated",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="measure each N-th image only")
    parser.add_argument("--model", default="savl-tiny", metavar="WEIGHTS", help="shipped weights, or a file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if wrong := [words for words in options.set if len(words) not in (2, 3)]:
        parser.error(f"--set takes a name and one or two folders, got {' '.join(wrong[0])}")
    if options.every < 1:
        parser.error(f"--every must be at least 1, got {options.every}")
    model = savl.load(options.model)
    float32, bfloat16 = (savl.Upscaler(model, device="cpu", dtype=each) for each in (torch.float32, torch.bfloat16))
    machine = f"{build_info()['kernel_instruction_set']} kernels, torch {torch.__version__}"
    print(f"{options.model}, {machine}\n")
    print("| images | strength | PSNR between, dB | pixels that differ | above one level | worst, levels | "
          "float32, dB | bfloat16, dB |\n|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    report: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for name, lr, *hr in options.set:
        for strength in STRENGTHS:
            images = read_set(lr, hr[0] if hr else None, options.every, model.config.scale)
            result = measure(float32, bfloat16, images, strength)
            row = report.setdefault(name, {})[str(strength)] = result.report()
            scores = ["" if each is None else f"{each:.3f}" for each in (result.psnr_float32, result.psnr_bfloat16)]
            print(
                f"| {name} ({result.images}) | {strength} | {row['psnr_between']:.1f} | {row['share_differing']:.2%} | "
                f"{row['pixels_above_one_level']} of {row['pixels']} | {row['worst_levels']} "
                f"({row['worst_levels_before_rounding']:.2f}) | {scores[0]} | {scores[1]} |",
                flush=True,
            )
    if options.json is not None:
        content = {"model": options.model, "machine": machine, "every": options.every, "sets": report}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
