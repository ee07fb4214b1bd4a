"""Measure how much of a degradation the best linear filter can undo, as a reference for the gain of a network.

    python -m benchmarks.studies.linear_oracle --lr FOLDER --hr FOLDER [--taps 9] [--json FILE]

For every image the filter is fitted by least squares to the original of that image, on luma: ``scale²`` filters of
``taps`` × ``taps`` LR pixels, one for each position of an output pixel within an LR pixel, and a constant. No linear
filter of that size does better on the image, and none that must infer the degradation does as well. A larger gain of a
network is due to its nonlinearity: edges, and the statistics of photographs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.bicubic import bicubic_upscale
from savl.evaluation.fidelity import luma
from savl.images.pairs import match_pairs, read_pair

RIDGE = 0.1
"""Added to the diagonal of the normal equations per pixel, in squared 8-bit levels; flat images need it."""


def best_linear(lr: Tensor, hr: Tensor, taps: int) -> Tensor:
    """Return the result of the best linear filter on an LR image.

    Args:
        lr: ``(h, w)`` float64.
        hr: ``(scale·h, scale·w)`` float64, the original.
        taps: Side of the filters in LR pixels, odd.

    Returns:
        ``(scale·h, scale·w)`` float64.
    """
    (height, width), scale = lr.shape, hr.shape[0] // lr.shape[0]
    padded = F.pad(lr[None, None], (taps // 2,) * 4, mode="reflect")
    x = F.unfold(padded, taps)[0].T
    x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    y = F.pixel_unshuffle(hr[None], scale).flatten(1).T
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    filters = torch.linalg.solve(gram, x.T @ y)
    return F.pixel_shuffle((x @ filters).T.reshape(-1, height, width), scale)[0]


def measure(lr: str, hr: str, taps: int, scale: int = 4) -> list[dict[str, Any]]:
    """Return the PSNR of luma in dB of bicubic interpolation and of the best linear filter, for every pair."""
    rows = []
    for pair in match_pairs(lr, hr):
        small, large = read_pair(pair, scale)
        truth = luma(255.0 * large.double())[0]
        bicubic = luma(255.0 * bicubic_upscale(small[None], scale)[0].double())[0]
        linear = best_linear(luma(255.0 * small.double())[0], truth, taps)
        scores = {name: _psnr(image, truth, scale) for name, image in (("bicubic", bicubic), ("linear", linear))}
        rows.append({"name": pair.lr.stem, **scores})
    return rows


def _psnr(image: Tensor, truth: Tensor, crop: int) -> float:
    error = (image.clamp(16.0, 235.0) - truth)[crop:-crop, crop:-crop]
    return float(10 * torch.log10(255.0**2 / error.square().mean()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the result and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", required=True, metavar="FOLDER", help="degraded images")
    parser.add_argument("--hr", required=True, metavar="FOLDER", help="their originals, with the same names")
    parser.add_argument("--taps", type=int, default=9, metavar="N", help="side of the filters in LR pixels, odd")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.taps < 1 or options.taps % 2 == 0:
        parser.error(f"--taps must be odd, got {options.taps}")
    rows = measure(options.lr, options.hr, options.taps)
    gain = statistics.fmean(row["linear"] - row["bicubic"] for row in rows)
    print(f"{len(rows)} images, {options.taps} x {options.taps} taps: {gain:+.2f} dB Y over bicubic interpolation")
    if options.json is not None:
        report = {"taps": options.taps, "gain": gain, "images": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
