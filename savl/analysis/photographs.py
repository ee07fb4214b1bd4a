"""Photographs of an analysis: choose them, name them in the report, and cut them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from savl.degradation import bicubic_downsample
from savl.evaluation.intervals import AnalysisUnavailable
from savl.images.folder import read_rgb

OnProgress = Callable[[str, int, int], None]
"""Callback with the name of a task, the number of finished steps, and the number of all steps."""


def sample_photographs() -> list[Path]:
    """Return two photographs that come with scikit-learn and, if installed, one of matplotlib's sample data.

    They are JPEG files of about 0.3 megapixels each.

    Raises:
        AnalysisUnavailable: scikit-learn is not installed.
    """
    try:
        folder = Path(str(files("sklearn.datasets.images")))
    except ImportError as error:
        raise AnalysisUnavailable("an analysis", "scikit-learn", error) from error
    paths = [folder / "china.jpg", folder / "flower.jpg"]
    with suppress(ImportError):
        import matplotlib

        paths.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    return [path for path in paths if path.is_file()]


def evenly_spaced(paths: Sequence[Path], count: int) -> list[Path]:
    """Return at most ``count`` of the paths, evenly spaced and in their order."""
    if len(paths) <= count:
        return list(paths)
    return [paths[place] for place in np.linspace(0, len(paths) - 1, count).round().astype(int).tolist()]


def distinct_names(paths: Sequence[Path], *, suffix: bool = False, folder: bool = False) -> list[str]:
    r"""Return short names that distinguish the files: the shortest sufficient end of each path.

    Args:
        paths: The files.
        suffix: Keep the suffix even if it is not needed.
        folder: Keep the name of the file's folder, and the suffix, even if they are not needed.

    Returns:
        One name per file, as valid UTF-8: other bytes of a file name are written as ``\udcff``. If a path occurs twice,
        so does its name.
    """
    longest = max((len(path.parts) for path in paths), default=0)
    names = [str(Path(*path.parts[-2:])) if folder else path.name if suffix else path.stem for path in paths]
    for parts in range(1, longest + 1):
        owners = Counter(name for name, _ in set(zip(names, paths, strict=True)))
        names = [
            str(Path(*path.parts[-parts:])) if owners[name] > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def read_crops(path: Path, *, crops: int, side: int, scale: int, seed: Sequence[int]) -> Tensor | None:
    """Read a photograph and cut clean low-resolution crops out of it.

    Args:
        path: A high-resolution image.
        crops: Largest number of crops K. Crops do not overlap if the photograph is large enough; otherwise neighbours
            overlap by at most half.
        side: Side of a crop in low-resolution pixels.
        scale: High over low resolution.
        seed: Numbers ≥ 0 that determine the choice of positions.

    Returns:
        ``(K, 3, side, side)`` float32 in [0, 1]; None if the photograph is smaller than one crop.

    Raises:
        ImageFileError: The image cannot be read.
    """
    x = read_rgb(path)
    large = side * scale
    corners = _corners(x.shape[1], x.shape[2], large, crops)
    if not corners:
        return None
    chosen = sorted(np.random.default_rng(list(seed)).permutation(len(corners))[:crops].tolist())
    cut = [x[:, top : top + large, left : left + large] for top, left in (corners[place] for place in chosen)]
    return bicubic_downsample(torch.stack(cut), scale)


def _corners(height: int, width: int, side: int, wanted: int) -> list[tuple[int, int]]:
    """Return top left corners of crops on an even grid: adjacent crops, or half as far apart if those are too few."""
    if min(height, width) < side:
        return []

    def grid(step: int) -> list[tuple[int, int]]:
        tops, lefts = (
            np.linspace(0, length - side, 1 + (length - side) // step).round().astype(int).tolist()
            for length in (height, width)
        )
        return [(top, left) for top in tops for left in lefts]

    adjacent = grid(side)
    return adjacent if len(adjacent) >= wanted else grid(max(side // 2, 1))


def read_centre(path: Path, largest: int, multiple: int) -> Tensor:
    """Read an image and crop it to ``largest`` pixels around its centre and to multiples of ``multiple``.

    Returns:
        ``(3, H, W)`` float32 in [0, 1]. An image that is only cut to multiples loses its right and bottom edge.

    Raises:
        ImageFileError: The image cannot be read.
    """
    x = read_rgb(path)
    height, width = (min(side, largest) // multiple * multiple for side in x.shape[1:])
    top, left = ((side - largest) // 2 if side > largest else 0 for side in x.shape[1:])
    return x[:, top : top + height, left : left + width]
