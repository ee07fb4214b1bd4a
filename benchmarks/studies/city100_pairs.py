"""Make ×4 pairs of City100 at the pixel size of the camera, to calibrate and evaluate the restoration strength.

    python -m benchmarks.studies.city100_pairs --city100 FOLDER --output FOLDER

City100 (Chen et al., CVPR 2019; MIT licence) has photographs of one scene at a short focal length, enlarged onto the
grid of the photograph at the long one. The enlarged image is reduced to the pixels that the camera recorded, and the
other one is resized to four times that size, so that both are as blurred as this camera blurs its own pixels
(`benchmarks.studies.camera_blur`). The files are ``OUTPUT/CAMERA/LR/SCENE.png`` and ``OUTPUT/CAMERA/HR/SCENE.png``. No
score in the documentation was measured on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from benchmarks.studies.camera_blur import RATIOS
from savl.bicubic import bicubic_resize
from savl.evaluation import match_pairs
from savl.images.folder import read_rgb

SCALE = 4


def write_pairs(city100: Path, output: Path) -> int:
    """Write the pairs of every camera and return their number.

    Args:
        city100: Folder with ``CAMERA_H`` and ``CAMERA_L`` for the cameras in `RATIOS`.
        output: Folder of the result; existing files are replaced.
    """
    count = 0
    for camera, ratio in RATIOS.items():
        for pair in match_pairs(city100 / f"{camera}_L", city100 / f"{camera}_H"):
            low, high = read_rgb(pair.lr)[None], read_rgb(pair.hr)[None]
            height, width = (round(side / ratio) for side in low.shape[2:])
            small = bicubic_resize(low, (height, width))
            large = bicubic_resize(high, (SCALE * height, SCALE * width))
            for kind, image in (("LR", small), ("HR", large)):
                _write(output / camera / kind / f"{pair.hr.stem}.png", image[0])
            count += 1
    return count


def _write(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pairs and print their number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--city100", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    print(f"{write_pairs(options.city100, options.output)} pairs in {options.output}")


if __name__ == "__main__":
    main()
