"""Folders of image pairs: match them by name, score a network and bicubic interpolation beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from savl.evaluation.fidelity import Fidelity, fidelity
from savl.images.folder import find_images, read_rgb
from savl.inference.enlarge import ImageUpscaler
from savl.network.savl import bicubic_upscale


@dataclass(frozen=True)
class Pair:
    """A low-resolution image and its original."""

    lr: Path
    hr: Path


@dataclass(frozen=True)
class PairScores:
    """What one pair scored."""

    name: str
    model: Fidelity
    bicubic: Fidelity


def match_pairs(lr: str | Path, hr: str | Path) -> list[Pair]:
    """Match two folders by file name, suffixes aside.

    Raises:
        ValueError: A folder is missing or empty, two files share a name, or a name is on one side only (all are named).
    """
    by_stem: list[dict[str, Path]] = []
    for argument, folder in (("lr", lr), ("hr", hr)):
        paths = find_images([folder], argument=argument)
        stems = {path.stem: path for path in paths}
        if len(stems) != len(paths):
            twice = sorted({path.stem for path in paths if stems[path.stem] != path})
            raise ValueError(f"{argument}: {folder} has several images named {', '.join(twice)}")
        by_stem.append(stems)
    lrs, hrs = by_stem
    if lone := sorted(set(lrs) ^ set(hrs)):
        sides = ", ".join(f"{name} (only in {'lr' if name in lrs else 'hr'})" for name in lone)
        raise ValueError(f"lr and hr must hold the same names; unmatched: {sides}")
    return [Pair(lrs[name], hrs[name]) for name in sorted(lrs)]


def read_pair(pair: Pair, scale: int) -> tuple[Tensor, Tensor]:
    """Decode both images of a pair.

    Returns:
        ``(3, h, w)`` and ``(3, scale·h, scale·w)``, float32 in [0, 1].

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The sizes are not in the ratio of the scale.
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
    """Upscale one image and compare it, and bicubic interpolation, with the original.

    Args:
        pair: The two files.
        upscaler: The network.
        lpips: Compares ``(3, H, W)`` images in [0, 1], the upscaled one first; an `Lpips`, or None to leave it out.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The sizes are not in the ratio of the network's scale, or too small to be scored.
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
