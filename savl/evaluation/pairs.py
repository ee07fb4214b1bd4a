"""Image pairs in two folders: match them by name and score a network and bicubic interpolation on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from savl.bicubic import bicubic_upscale
from savl.evaluation.fidelity import Fidelity, fidelity
from savl.images.folder import find_images, read_rgb
from savl.images.result_mark import SEVERITY_MAP, read_mark
from savl.inference.enlarge import ImageUpscaler


@dataclass(frozen=True)
class Pair:
    """Paths of a low-resolution image and of its original."""

    lr: Path
    hr: Path


@dataclass(frozen=True)
class PairScores:
    """Scores of one pair."""

    name: str
    model: Fidelity
    bicubic: Fidelity


def match_pairs(lr: str | Path, hr: str | Path, *, on_map: Callable[[Path], None] | None = None) -> list[Pair]:
    """Match the images of two folders by their file names without suffix. Severity maps that savl wrote are skipped.

    Args:
        lr: Folder of low-resolution images.
        hr: Folder of their originals.
        on_map: Function that is called with each severity map that is skipped.

    Raises:
        ValueError: A folder is missing or empty, two files share a name, or a name is in one folder only; the message
            lists all such names.
    """
    found = {argument: find_images([folder], argument=argument) for argument, folder in (("lr", lr), ("hr", hr))}
    stems = {argument: {path.stem for path in paths} for argument, paths in found.items()}
    by_stem: list[dict[str, Path]] = []
    for argument, other, folder in (("lr", "hr", lr), ("hr", "lr", hr)):
        paths = []
        for path in found[argument]:
            if not _is_severity_map(path, stems[argument], stems[other]):
                paths.append(path)
            elif on_map is not None:
                on_map(path)
        images = {path.stem: path for path in paths}
        if len(images) != len(paths):
            twice = sorted({path.stem for path in paths if images[path.stem] != path})
            raise ValueError(f"{argument}: {folder} has several images named {', '.join(twice)}")
        by_stem.append(images)
    lrs, hrs = by_stem
    if lone := sorted(set(lrs) ^ set(hrs)):
        sides = ", ".join(f"{name} (only in {'lr' if name in lrs else 'hr'})" for name in lone)
        raise ValueError(f"lr and hr must hold the same names; unmatched: {sides}")
    if not lrs:
        raise ValueError(f"lr and hr hold nothing but severity maps: {lr}, {hr}")
    return [Pair(lrs[name], hrs[name]) for name in sorted(lrs)]


def _is_severity_map(path: Path, beside: set[str], opposite: set[str]) -> bool:
    """Return whether an image is a severity map: by savl's mark in the file, otherwise by its name.

    Args:
        path: Path of the image.
        beside: Names without suffix in its folder.
        opposite: Names without suffix in the other folder; an image with a partner there is no severity map.
    """
    mark = read_mark(path)
    if mark is not None:
        return mark == SEVERITY_MAP
    picture = path.stem.removesuffix("_severity")
    return picture != path.stem and picture in beside and path.stem not in opposite


def read_pair(pair: Pair, scale: int) -> tuple[Tensor, Tensor]:
    """Decode both images of a pair.

    Returns:
        ``(3, h, w)`` and ``(3, scale·h, scale·w)``, float32 in [0, 1].

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The ratio of the sizes is not the scale.
    """
    lr, hr = read_rgb(pair.lr), read_rgb(pair.hr)
    expected = tuple(scale * side for side in lr.shape[1:])
    if tuple(hr.shape[1:]) != expected:
        raise ValueError(
            f"{pair.hr} must be {scale} times as large as {pair.lr}: {expected[1]}x{expected[0]} pixels, "
            f"got {hr.shape[2]}x{hr.shape[1]}"
        )
    return lr, hr


def evaluate_pair(
    pair: Pair, upscaler: ImageUpscaler, *, lpips: Callable[[Tensor, Tensor], float | None] | None = None
) -> PairScores:
    """Upscale one image and compare the result, and bicubic interpolation, with the original.

    Args:
        pair: The two files.
        upscaler: The network.
        lpips: Function of two ``(3, H, W)`` images in [0, 1], the upscaled one first, such as an `Lpips`; None omits
            LPIPS.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The ratio of the sizes is not the network's scale, or the images are too small to be scored.
    """
    lr, hr = read_pair(pair, upscaler.scale)
    sr = upscaler(lr[None]).sr[0]
    bicubic = bicubic_upscale(lr[None], upscaler.scale)[0]

    def score(image: Tensor) -> Fidelity:
        scores = fidelity(image, hr, crop=upscaler.scale)
        return scores if lpips is None else replace(scores, lpips=lpips(image, hr))

    try:
        return PairScores(pair.lr.stem, model=score(sr), bicubic=score(bicubic))
    except ValueError as error:
        raise ValueError(f"{pair.hr}: {error}") from error
