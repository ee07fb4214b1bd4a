"""Draw examples of the degradations: single operations, whole recipes, strengths, cameras, and masks.

python -m savl.degradation.contact_sheet examples/teddy.webp -o docs/degradation.webp
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.bicubic import bicubic_downsample
from savl.degradation.blur_kernels import BlurKernel, GaussianBlurKernel, SincBlurKernel
from savl.degradation.config import CameraConfig, DegradationConfig, SpatialConfig
from savl.degradation.pipeline import Degradation
from savl.degradation.recipe import Noise, Recipe, Resize, Stage
from savl.images.errors import ImageFileError
from savl.images.folder import decode_rgb
from savl.images.format import format_of_suffix
from savl.images.write import write_image

SIDE = 384
"""Width and height of the part of the photograph that is degraded, in pixels; the results have SIDE / 4."""
TILE = 192
"""Width and height of a tile in pixels: a detail of the photograph, or a low-resolution image enlarged twice."""
COLUMNS = 6
_GAP = 8
_LABEL = 20
_HEADING = 34
_DPI = 100

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Section:
    """A heading with rows of labelled tiles below it."""

    heading: str
    tiles: tuple[tuple[str, Pixels], ...]


def sections(x: Tensor, left: int, top: int) -> list[Section]:
    """Return all sections of the sheet.

    Args:
        x: ``(1, 3, SIDE, SIDE)`` float32 in [0, 1].
        left: Left edge of the detail, in pixels.
        top: Upper edge of the detail, in pixels.
    """
    return [
        Section("Single operations on a detail, before any resizing", tuple(_operations(x, left, top))),
        Section("Whole recipes, ×4, pixels doubled", tuple(_recipes(x))),
        Section("One recipe at several strengths", tuple(_strengths(x))),
        Section("One camera at two focal lengths, without noise", tuple(_photographs(x, left, top))),
        Section("Through a mask; beside it, the degradation mask, dark 0 to bright 1", tuple(_masked(x))),
    ]


def draw(content: list[Section]) -> Pixels:
    """Draw the sheet, ``(H, W, 3)``: all tiles in rows of `COLUMNS` on a white background."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    row = _LABEL + TILE + _GAP
    heights = [_HEADING + row * math.ceil(len(section.tiles) / COLUMNS) for section in content]
    width, height = _GAP + COLUMNS * (TILE + _GAP), sum(heights) + _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    places: list[tuple[int, int, Pixels]] = []
    top = 0
    for section, section_height in zip(content, heights, strict=True):
        figure.text(_GAP / width, 1 - (top + _HEADING - 9) / height, section.heading, fontsize=11, weight="bold")
        for index, (label, pixels) in enumerate(section.tiles):
            y = top + _HEADING + row * (index // COLUMNS)
            x = _GAP + (TILE + _GAP) * (index % COLUMNS)
            figure.text(x / width, 1 - (y + _LABEL - 5) / height, label, fontsize=8.5)
            places.append((y + _LABEL, x, pixels))
        top += section_height
    canvas.draw()
    sheet = np.array(canvas.buffer_rgba())[:, :, :3]
    for y, x, pixels in places:  # copied into the array, because matplotlib would resample them
        sheet[y : y + TILE, x : x + TILE] = pixels
    return sheet


def _operations(x: Tensor, left: int, top: int) -> list[tuple[str, Pixels]]:
    detail = x[:, :, top : top + TILE, left : left + TILE]
    alone = Degradation(DegradationConfig(), scale=1)

    def gaussian(first: float, second: float, degrees: float = 0.0) -> BlurKernel:
        shape = "iso" if first == second else "aniso"
        return GaussianBlurKernel(shape, 21, (first, second), math.radians(degrees), 1.0)

    recipes: list[tuple[str, Recipe]] = []
    recipes += [(f"blur, σ {sigma:g}", _only(blur=gaussian(sigma, sigma))) for sigma in (0.5, 1.5, 3.0)]
    recipes += [
        (f"blur, σ {first:g} and {second:g}, {degrees}°", _only(blur=gaussian(first, second, degrees)))
        for first, second, degrees in ((1.0, 0.3, 0), (2.0, 0.3, 45), (3.0, 0.3, 90))
    ]
    recipes += [
        (f"sinc, cut-off π/{divisor:g}", _only(blur=SincBlurKernel(21, math.pi / divisor))) for divisor in (1.5, 3, 5)
    ]
    recipes += [(f"JPEG, quality {quality}", _only(quality=quality)) for quality in (95, 60, 30)]
    for title, kind, amounts, gray in (
        ("Gaussian noise, σ", "gaussian", (5.0, 15.0, 30.0), False),
        ("gray Gaussian noise, σ", "gaussian", (5.0, 15.0, 30.0), True),
        ("Poisson noise, ×", "poisson", (0.5, 1.5, 3.0), False),
        ("gray Poisson noise, ×", "poisson", (0.5, 1.5, 3.0), True),
    ):
        for amount in amounts:
            noise = Noise("gaussian" if kind == "gaussian" else "poisson", amount, gray)
            recipes.append((f"{title} {amount:g}", _only(noise=noise)))
    return [
        (label, _pixels(alone.apply(detail, recipe, None, torch.Generator().manual_seed(0)), 1))
        for label, recipe in recipes
    ]


def _only(blur: BlurKernel | None = None, noise: Noise | None = None, quality: float | None = None) -> Recipe:
    """Return a recipe of one operation, without a change of size."""
    stage = Stage((blur,), Resize(1.0, "area"), (noise,), (quality,))
    return Recipe(stage, None, "area", (None,), (None,), (False,), (1.0,), (False,))


def _recipes(x: Tensor) -> list[tuple[str, Pixels]]:
    degradation = Degradation(DegradationConfig())
    return [(f"seed {seed}", _pixels(degradation(x, seed).y, 2)) for seed in range(2 * COLUMNS)]


def _strengths(x: Tensor) -> list[tuple[str, Pixels]]:
    clean = bicubic_downsample(x, 4)
    tiles = [("bicubic, for comparison", _pixels(clean, 2))]
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        degradation = Degradation(DegradationConfig(strength=(strength, strength)))
        tiles.append((f"seed 1, strength {strength:g}", _pixels(degradation(x, 1).y, 2)))
    return tiles


def _photographs(x: Tensor, left: int, top: int) -> list[tuple[str, Pixels]]:
    tiles = [("bicubic, for comparison", _pixels(bicubic_downsample(x, 4), 2))]
    targets = []
    for sigma, amount in ((0.57, 0.0), (0.64, 0.77), (0.78, 2.4)):
        camera = CameraConfig(1.0, (sigma, sigma), (amount, amount), (1.0, 1.0), (0.0, 0.0))
        degraded = Degradation(DegradationConfig(camera=camera))(x, 0)
        tiles.append((f"σ {sigma:g}, sharpening {amount:g}", _pixels(degraded.y, 2)))
        targets.append(
            (f"target: σ {sigma:g}, sharp. {amount:g}", degraded.x[:, :, top : top + TILE, left : left + TILE])
        )
    return tiles + [(label, _pixels(target, 1)) for label, target in targets[1:]]


def _masked(x: Tensor) -> list[tuple[str, Pixels]]:
    tiles = []
    # Recipes with strong noise, on which the effect of a mask is easy to see.
    for seed, ramp in ((1, False), (6, False), (4, True), (7, False), (2, False), (6, True)):
        spatial = SpatialConfig(probability=1.0, ramp_probability=1.0 if ramp else 0.0)
        degraded = Degradation(replace(DegradationConfig(), spatial=spatial))(x, seed)
        tiles.append((f"seed {seed}, {'ramp' if ramp else 'smooth mask'}", _pixels(degraded.y, 2)))
        tiles.append(("degradation mask", _coloured(degraded.degradation_mask[0])))
    return tiles


def _pixels(image: Tensor, factor: int) -> Pixels:
    """Convert ``(1, 3, h, w)`` in [0, 1] to 8-bit samples, every pixel repeated ``factor`` times in both directions."""
    samples = (image[0] * 255.0).round().byte().permute(1, 2, 0).numpy()
    return samples.repeat(factor, axis=0).repeat(factor, axis=1)


def _coloured(mask: Tensor) -> Pixels:
    from matplotlib import colormaps

    coloured: Pixels = colormaps["viridis"](mask.numpy(), bytes=True)[:, :, :3]
    return coloured.repeat(2, axis=0).repeat(2, axis=1)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, help=f"at least {SIDE}x{SIDE} pixels; its centre is taken")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG, JPEG, WebP or TIFF")
    parser.add_argument(
        "--detail",
        type=int,
        nargs=2,
        metavar=("LEFT", "TOP"),
        default=((SIDE - TILE) // 2,) * 2,
        help=f"where the detail of {TILE}x{TILE} pixels begins, within the centre",
    )
    parser.add_argument("-q", "--quality", type=int, default=80, help="for JPEG and WebP")
    arguments = parser.parse_args()
    image_format = format_of_suffix(arguments.output)
    if image_format is None:
        parser.error(f"{arguments.output}: name a .png, .jpg, .webp or .tiff")
    if not all(0 <= start <= SIDE - TILE for start in arguments.detail):
        parser.error(f"--detail must lie between 0 and {SIDE - TILE}, got {arguments.detail}")
    if find_spec("matplotlib") is None:
        parser.error("drawing needs matplotlib; pip install 'savl[analyze]' brings it")
    try:
        photo = decode_rgb(arguments.photo)
    except ImageFileError as error:
        parser.error(str(error))
    top, left = ((side - SIDE) // 2 for side in photo.shape[:2])
    if min(top, left) < 0:
        parser.error(f"{arguments.photo} measures {photo.shape[1]}x{photo.shape[0]}; at least {SIDE}x{SIDE} are needed")
    x = torch.from_numpy(photo[top : top + SIDE, left : left + SIDE]).permute(2, 0, 1)[None].float() / 255.0
    sheet = draw(sections(x, *arguments.detail))
    write_image(arguments.output, sheet, image_format=image_format, quality=arguments.quality, overwrite=True)


if __name__ == "__main__":
    main()
