"""Pairs of a low-resolution image and its original in two folders: match them by name and read them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from torch import Tensor

from savl.bicubic import bicubic_downsample
from savl.images.folder import find_images, read_rgb
from savl.images.result_mark import MAP_MARKS, read_mark

_LR_NAME = re.compile(r"(?:^|[-_. ])lr(?:x?\d+)?$|x(?:[2-9]|[1-9]\d+)$", re.IGNORECASE)
"""Names of low-resolution images in a folder that also contains their originals: ``001_LR``, ``001_LR4``, ``001x4``."""


@dataclass(frozen=True)
class Pair:
    """Paths of a low-resolution image and of its original."""

    lr: Path
    hr: Path
    name: str
    """Name that both share: the file names without the suffixes by which the folders differ."""


def match_pairs(lr: str | Path, hr: str | Path, *, on_map: Callable[[Path], None] | None = None) -> list[Pair]:
    """Match the images of two folders by their file names. Maps of severity or strength that savl wrote are skipped.

    Names are compared without the file extension. They may differ by a suffix that all names of a folder share, such as
    ``Canon_001_LR4`` and ``Canon_001_HR`` (RealSR), ``DSC_1057_x4`` and ``DSC_1057_x1`` (DRealSR), or ``0001x4`` and
    ``0001`` (DIV2K). Such a suffix consists of parts that begin with ``-``, ``_``, a dot or a space and contain a
    letter, or it is x and a number. The suffixes with which most names match are removed, the shortest of several; none
    if the names match without this.

    If both folders are the same, names that end in ``LR``, ``LR4``, ``x4`` or the like (any number, but not ``x1``) are
    those of low-resolution images, and all others are those of originals.

    Args:
        lr: Folder of low-resolution images.
        hr: Folder of their originals.
        on_map: Function that is called with each map that is skipped.

    Returns:
        The pairs, sorted by name.

    Raises:
        ValueError: A folder is missing or empty, two files share a name, or a name is in one folder only; the message
            lists all such names.
    """
    found = {argument: find_images([folder], argument=argument) for argument, folder in (("lr", lr), ("hr", hr))}
    if Path(lr).resolve() == Path(hr).resolve():
        found = {
            "lr": [path for path in found["lr"] if _LR_NAME.search(path.stem)],
            "hr": [path for path in found["hr"] if not _LR_NAME.search(path.stem)],
        }
        if not all(found.values()):
            raise ValueError(
                f"lr and hr are one folder, {lr}; the names of its low-resolution images must end in LR, LR4, x4 or "
                f"the like, and those of their originals must not"
            )
    stems = {argument: {path.stem for path in paths} for argument, paths in found.items()}
    by_stem: list[dict[str, Path]] = []
    for argument, other, folder in (("lr", "hr", lr), ("hr", "lr", hr)):
        paths = []
        for path in found[argument]:
            if not _is_map(path, stems[argument], stems[other]):
                paths.append(path)
            elif on_map is not None:
                on_map(path)
        images = {path.stem: path for path in paths}
        if len(images) != len(paths):
            twice = sorted({path.stem for path in paths if images[path.stem] != path})
            raise ValueError(f"{argument}: {folder} has several images named {', '.join(twice)}")
        by_stem.append(images)
    lrs, hrs = _without_suffixes(*by_stem)
    if lone := sorted(set(lrs) ^ set(hrs)):
        sides = ", ".join(
            f"{lrs[name].stem} (only in lr)" if name in lrs else f"{hrs[name].stem} (only in hr)" for name in lone
        )
        raise ValueError(
            f"lr and hr must contain the same names, apart from a suffix that all names of a folder share; "
            f"unmatched: {sides}"
        )
    if not lrs:
        raise ValueError(f"lr and hr contain nothing but maps of severity or strength: {lr}, {hr}")
    return [Pair(lrs[name], hrs[name], name) for name in sorted(lrs)]


def match_results(
    pairs: Sequence[Pair],
    folder: str | Path,
    *,
    argument: str = "results",
    on_extra: Callable[[Path], None] | None = None,
) -> dict[str, Path]:
    """Find the upscaled image of every pair in a folder, by the rules for names of `match_pairs`.

    The results may be named as the pairs are or as their low-resolution images are, and all of them may have a suffix.

    Args:
        pairs: The pairs.
        folder: Folder of upscaled images.
        argument: The caller's name for `folder`, used in messages.
        on_extra: Function that is called with each image that belongs to no pair. Maps are skipped silently.

    Returns:
        Path of the result by the name of its pair.

    Raises:
        ValueError: The folder is missing or empty, two files share a name, or a pair has no result; the message lists
            all such names, and the names of the images that belong to no pair.
    """
    paths = find_images([folder], argument=argument)
    stems = {path.stem for path in paths}
    opposite = {name for pair in pairs for name in (pair.name, pair.lr.stem, pair.hr.stem)}
    paths = [path for path in paths if not _is_map(path, stems, opposite)]
    results = {path.stem: path for path in paths}
    if len(results) != len(paths):
        twice = sorted({path.stem for path in paths if results[path.stem] != path})
        raise ValueError(f"{argument}: {folder} has several images named {', '.join(twice)}")
    best: dict[str, Path] = {}
    for suffix in _common_suffixes(results):
        shortened = _shortened(results, suffix)
        for names in zip(*((pair.name, pair.lr.stem, pair.hr.stem) for pair in pairs), strict=True):
            found = {pair.name: shortened[name] for pair, name in zip(pairs, names, strict=True) if name in shortened}
            best = max(best, found, key=len)
    extra = sorted(set(paths) - set(best.values()))
    if missing := [pair.name for pair in pairs if pair.name not in best]:
        others = f"; it has images of other names: {', '.join(path.stem for path in extra)}" if extra else ""
        raise ValueError(f"{argument}: {folder} has no result named {', '.join(missing)}{others}")
    if on_extra is not None:
        for path in extra:
            on_extra(path)
    return best


def _without_suffixes(lrs: dict[str, Path], hrs: dict[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Remove from the names of each folder the suffix with which most names match, the shortest of several."""

    def matches(suffixes: tuple[str, str]) -> tuple[int, int]:
        ours, theirs = _shortened(lrs, suffixes[0]), _shortened(hrs, suffixes[1])
        return len(ours.keys() & theirs.keys()), -len("".join(suffixes))

    lr_suffix, hr_suffix = max(product(_common_suffixes(lrs), _common_suffixes(hrs)), key=matches)
    return _shortened(lrs, lr_suffix), _shortened(hrs, hr_suffix)


def _shortened(paths: dict[str, Path], suffix: str) -> dict[str, Path]:
    return {name.removesuffix(suffix): path for name, path in paths.items()}


def _common_suffixes(names: Iterable[str]) -> list[str]:
    """Return the suffixes that may be removed from names because all of them have it; the empty one first."""
    names = list(names)
    common = os.path.commonprefix([name[::-1] for name in names])[::-1]
    longest = min(len(common), min(map(len, names), default=1) - 1)
    return ["", *(common[-length:] for length in range(1, longest + 1) if _is_suffix(common, length))]


def _is_suffix(name: str, length: int) -> bool:
    """Return whether the end of a name is ``x4``, or consists of parts like ``_LR4`` that contain a letter each."""
    rest, end = name[:-length], name[-length:]
    if re.fullmatch(r"[xX]\d+", end):
        return not re.search(r"[-_. ]$", rest)  # otherwise the suffix begins one character earlier
    first, *parts = re.split(r"[-_. ]", end)
    return not first and all(re.search(r"[^\W\d_]", part) for part in parts)


def _is_map(path: Path, beside: set[str], opposite: set[str]) -> bool:
    """Return whether an image is a map of severity or strength: by savl's mark in the file, otherwise by its name.

    Args:
        path: Path of the image.
        beside: Names without extension in its folder.
        opposite: Names without extension in the other folder; an image with a partner there is no map.
    """
    mark = read_mark(path)
    if mark is not None:
        return mark in MAP_MARKS
    picture = path.stem.removesuffix("_severity").removesuffix("_strength")
    return picture != path.stem and picture in beside and path.stem not in opposite


def check_sizes(pair: Pair, lr: Sequence[int], hr: Sequence[int], scale: int, *, remedy: str = "") -> None:
    """Check that an original is ``scale`` times as large as its low-resolution image.

    Args:
        pair: The files, for the message.
        lr: Height and width of the low-resolution image.
        hr: Height and width of the original.
        scale: The expected ratio.
        remedy: What reduces LR images of the size of their originals, for the message, such as "set x = true".

    Raises:
        ValueError: The ratio of the sizes is not ``scale``.
    """
    expected = [scale * side for side in lr]
    if list(hr) == expected:
        return
    message = (
        f"{pair.hr} must be {scale} times as large as {pair.lr}: {expected[1]}x{expected[0]} pixels, "
        f"got {hr[1]}x{hr[0]}"
    )
    if list(lr) == list(hr):
        message += "; the low-resolution image was enlarged to the size of the original and has to be reduced"
        message += f" ({remedy})" if remedy else ""
    raise ValueError(message)


def read_pair(pair: Pair, scale: int, *, reduce_lr: bool = False, remedy: str = "") -> tuple[Tensor, Tensor]:
    """Decode both images of a pair.

    Args:
        pair: The two files.
        scale: Size of the original divided by that of the low-resolution image.
        reduce_lr: Whether to reduce a low-resolution image that has the size of its original, by `reduced`. Both images
            are first cropped at the bottom and right to multiples of the scale.
        remedy: What sets ``reduce_lr``, for the message; see `check_sizes`.

    Returns:
        ``(3, h, w)`` and ``(3, scale·h, scale·w)``, float32 in [0, 1], multiples of 1/255.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The ratio of the sizes is not the scale.
    """
    lr, hr = read_rgb(pair.lr), read_rgb(pair.hr)
    if reduce_lr and lr.shape == hr.shape:
        height, width = (side - side % scale for side in hr.shape[1:])
        lr, hr = reduced(lr[:, :height, :width], scale), hr[:, :height, :width]
    check_sizes(pair, lr.shape[1:], hr.shape[1:], scale, remedy=remedy)
    return lr, hr


def reduced(image: Tensor, scale: int) -> Tensor:
    """Reduce an image by antialiased bicubic interpolation and round it to 8 bits.

    Args:
        image: ``(3, H, W)`` in [0, 1], H and W multiples of ``scale``.
        scale: Factor, at least 1.

    Returns:
        ``(3, H/scale, W/scale)``, multiples of 1/255.
    """
    return (bicubic_downsample(image[None], scale)[0] * 255.0).round() / 255.0
