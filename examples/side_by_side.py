"""Make the images in README.md: details of photographs, bicubic beside savl, and the severity map.

    python examples/side_by_side.py examples/chairs.webp,70,60,105 -o docs/chairs.webp
    python examples/side_by_side.py noisy.jpg,0,0,96 old.jpg,40,10,96 --severity -o docs/photographs.webp
    python examples/side_by_side.py examples/chairs.webp,70,60,64 --strengths 0 .25 .5 .75 1 -o docs/strengths.webp

A detail is a file, and its left, top and side in pixels of the file. One row each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import savl
from savl.images.severity_map import viridis

GAP = 12
"""Pixels between the parts."""


def row(detail: str, models: list[str], severity: bool, strengths: list[float]) -> Image.Image:
    """One detail: bicubic, each model and, if asked for, the severity of the first; or strengths of the first."""
    name, *numbers = detail.rsplit(",", 3)
    photo = Image.open(Path(name)).convert("RGB")
    bicubic = photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float() / 255
    upscalers = [savl.Upscaler(savl.load(model)) for model in models]
    upscaled = [upscaler(pixels) for upscaler in upscalers]
    parts = [bicubic, *(_picture(each.sr) for each in upscaled)]
    if strengths:
        parts = [_picture(upscalers[0](pixels, strength=strength).sr) for strength in strengths]
    if severity:
        colours = Image.fromarray(viridis(upscaled[0].severity[0].numpy() / 2))
        parts.append(colours.resize(bicubic.size, Image.Resampling.NEAREST))
    left, top, side = (4 * int(number) for number in numbers)
    drawn = Image.new("RGB", (len(parts) * (side + GAP) - GAP, side), "white")  # one pixel of the results is one here
    for index, part in enumerate(parts):
        drawn.paste(part.crop((left, top, left + side, top + side)), (index * (side + GAP), 0))
    return drawn


def _picture(sr: torch.Tensor) -> Image.Image:
    return Image.fromarray((sr[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("details", nargs="+", metavar="FILE,LEFT,TOP,SIDE")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--severity", action="store_true")
    parser.add_argument("--strengths", type=float, nargs="+", default=[], metavar="X")
    parser.add_argument("--model", action="append", metavar="WEIGHTS", help="may be repeated; default: savl-tiny")
    arguments = parser.parse_args()
    models = arguments.model or ["savl-tiny"]
    rows = [row(detail, models, arguments.severity, arguments.strengths) for detail in arguments.details]
    height = sum(each.height + GAP for each in rows) - GAP
    picture = Image.new("RGB", (max(each.width for each in rows), height), "white")
    top = 0
    for each in rows:
        picture.paste(each, (0, top))
        top += each.height + GAP
    picture.save(arguments.out, quality=90)


if __name__ == "__main__":
    main()
