"""Make the README's picture: a detail of a photograph, bicubic beside savl.

    python examples/side_by_side.py examples/chairs.webp 90 70 90 docs/chairs.webp

The numbers are left, top and side of the detail, in pixels of the photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import savl


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

    left, top, side = arguments.left, arguments.top, arguments.side
    box = (slice(4 * top, 4 * (top + side)), slice(4 * left, 4 * (left + side)))
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="compressed")
    for axis, title, image in ((axes[0], "bicubic", np.asarray(bicubic)), (axes[1], arguments.model, upscaled)):
        axis.imshow(image[box])
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(arguments.out, dpi=100, pil_kwargs={"quality": 90})


if __name__ == "__main__":
    main()
