"""Make the README's picture: a detail of a photograph, bicubic beside savl, and the severity map.

    python examples/side_by_side.py examples/church.webp 100 120 150 docs/church.webp

The numbers are left, top and side of the detail, in pixels of the photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
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
    lr = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float() / 255
    upscaled = savl.Upscaler(savl.load(arguments.model))(lr)
    sr = (upscaled.sr[0].permute(1, 2, 0) * 255).round().byte().numpy()

    left, top, side = arguments.left, arguments.top, arguments.side
    box = (slice(4 * top, 4 * (top + side)), slice(4 * left, 4 * (left + side)))
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="compressed")
    axes[0].imshow(np.asarray(bicubic)[box])
    axes[0].set_title("bicubic")
    axes[1].imshow(sr[box])
    axes[1].set_title(arguments.model)
    severity = upscaled.severity[0, top : top + side, left : left + side]
    image = axes[2].imshow(severity, vmin=0, vmax=2, cmap="viridis")
    axes[2].set_title("severity map")
    figure.colorbar(image, ax=axes[2], fraction=0.046)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(arguments.out, dpi=130, pil_kwargs={"quality": 90})


if __name__ == "__main__":
    main()
