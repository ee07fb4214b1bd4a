"""Make the README's picture: a detail of a photograph, bicubic beside savl.

    python examples/side_by_side.py examples/chairs.webp 70 60 105 docs/chairs.webp

The numbers are left, top and side of the detail, in pixels of the photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import savl

GAP = 12
"""Pixels between the two halves."""


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("left", type=int)
    parser.add_argument("top", type=int)
    parser.add_argument("side", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="savl-tiny")
    arguments = parser.parse_args()

    photo = Image.open(arguments.photo).convert("RGB")
    bicubic = photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.BICUBIC)
    upscaled = savl.upscale(photo, model=arguments.model)

    left, top, side = (4 * value for value in (arguments.left, arguments.top, arguments.side))
    box = (left, top, left + side, top + side)
    picture = Image.new("RGB", (2 * side + GAP, side), "white")  # one pixel of the results is one of the picture
    picture.paste(bicubic.crop(box), (0, 0))
    picture.paste(Image.fromarray(upscaled).crop(box), (side + GAP, 0))
    picture.save(arguments.out, quality=92)


if __name__ == "__main__":
    main()
