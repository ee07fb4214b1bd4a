"""Compare methods on pairs of images: networks, images upscaled by other programs, and bicubic interpolation."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from savl.bicubic import bicubic_resize, bicubic_upscale
from savl.evaluation.fidelity import Fidelity, fidelity, luma
from savl.evaluation.natural_scenes import Brisque, Niqe
from savl.evaluation.perceptual import Dists, Lpips, MetricUnavailable
from savl.images.folder import read_rgb
from savl.images.pairs import Pair, read_pair
from savl.images.read import read_size
from savl.inference.enlarge import ImageUpscaler, Strength

BICUBIC = "bicubic"
ORIGINAL = "original"
OPTIONAL = {"lpips": "LPIPS", "dists": "DISTS", "niqe": "NIQE", "brisque": "BRISQUE"}
"""Titles of the scores that need optional packages or data, by the field of `Fidelity`."""
CROP_SIDE = 96
"""Side in pixels of the crops of a report."""
_THUMBNAIL = 192

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Method:
    """A method that upscales the low-resolution image of a pair."""

    label: str
    """Name in tables."""
    upscale: Callable[[Pair, Tensor], Tensor]
    """Function of a pair and its low-resolution image ``(3, h, w)`` that returns ``(3, H, W)`` in [0, 1]."""
    column: str
    """Name in the rows of JSON and CSV files: ``model`` for the only network of a comparison, otherwise the label."""
    source: str = ""
    """Network or folder, as it was given."""
    strength: Strength | None = None
    """Restoration strength of a network, "auto" or a number from 0 to 1; None for other methods."""


@dataclass
class OptionalMetrics:
    """Metrics that this machine can measure, and why it cannot measure the others."""

    paired: dict[str, Callable[[Tensor, Tensor], float | None]] = field(default_factory=dict)
    """Functions of two images ``(3, H, W)`` in [0, 1], the upscaled one first, by the field of `Fidelity`."""
    single: dict[str, Callable[[Tensor], float | None]] = field(default_factory=dict)
    """Functions of one image ``(3, H, W)`` in [0, 1], by the field of `Fidelity`."""
    no_value: dict[str, str] = field(default_factory=dict)
    """Reason for which a metric returns None for an image, such as "too small for AlexNet"."""
    missing: dict[str, MetricUnavailable] = field(default_factory=dict)

    @classmethod
    def load(cls) -> OptionalMetrics:
        """Load all metrics that are available; nothing is downloaded."""
        found = cls()
        kinds: dict[str, type[Lpips | Dists | Niqe | Brisque]] = {
            "lpips": Lpips, "dists": Dists, "niqe": Niqe, "brisque": Brisque,
        }  # fmt: skip
        for name, kind in kinds.items():
            try:
                metric = kind()
            except MetricUnavailable as error:
                found.missing[name] = error
                continue
            found.no_value[name] = metric.no_value
            if isinstance(metric, Niqe | Brisque):
                found.single[name] = metric
            else:
                found.paired[name] = metric
        return found

    def score(self, sr: Tensor, hr: Tensor, *, crop: int) -> Fidelity:
        """Return all scores of an upscaled image; the arguments are those of `fidelity`."""
        others: dict[str, Any] = {name: metric(sr, hr) for name, metric in self.paired.items()}
        return replace(fidelity(sr, hr, crop=crop), **others, **self.score_alone(sr))

    def score_alone(self, image: Tensor) -> dict[str, Any]:
        """Return the scores of an image that need no original, None where there is no value."""
        return {name: metric(image) for name, metric in self.single.items()}


@dataclass(frozen=True)
class ImageScores:
    """Scores of one pair."""

    name: str
    methods: Mapping[str, Fidelity]
    """Scores by the label of the method."""
    original: Mapping[str, float | None]
    """Scores of the original that need no original, by the field of `Fidelity`."""


@dataclass(frozen=True)
class Crop:
    """The place of one pair where the methods differ most; all pictures are ``(h, w, 3)`` uint8."""

    difference: float
    """Root mean square over the crop of the methods' deviation from their mean, in levels of luma."""
    name: str
    left: int
    top: int
    size: tuple[int, int]
    """Width and height of the original in pixels."""
    lr: Picture
    """The crop of the low-resolution image, at its own size."""
    methods: Mapping[str, Picture]
    original: Picture
    thumbnail: Picture
    """The whole original, reduced."""


@dataclass(frozen=True)
class Comparison:
    """Scores of several methods on a set of pairs."""

    methods: tuple[Method, ...]
    images: tuple[ImageScores, ...]
    scale: int
    missing: Mapping[str, str | None]
    """For each optional score, why there is no mean; None if there is one."""
    notes: Mapping[str, str]
    """The same reasons with a remedy, for the terminal. They may contain paths of this machine."""
    crops: tuple[Crop, ...]
    reduce_lr: bool = False
    """Whether low-resolution images that had the size of their originals were reduced."""

    @property
    def means(self) -> dict[str, Fidelity]:
        """Mean scores by the label of the method."""
        return {
            method.label: Fidelity.mean([image.methods[method.label] for image in self.images])
            for method in self.methods
        }

    @property
    def original(self) -> dict[str, float | None]:
        """Mean scores of the originals that need no original; empty if none was measured."""
        means = {}
        for name in self.images[0].original:
            values = [value for image in self.images if (value := image.original[name]) is not None]
            means[name] = math.fsum(values) / len(values) if len(values) == len(self.images) else None
        return means


def bicubic(scale: int) -> Method:
    """Return bicubic interpolation by a scale."""
    return Method(BICUBIC, lambda _, lr: bicubic_upscale(lr[None], scale)[0], BICUBIC)


def network(
    label: str, upscaler: ImageUpscaler, *, source: str, only: bool, strength: Strength | None = None
) -> Method:
    """Return a network as a method.

    Args:
        label: Name of the method.
        upscaler: The network.
        source: Name or file of the network, as it was given.
        only: Whether it is the only network of the comparison.
        strength: The strength with which the upscaler restores, for the reports.
    """
    return Method(label, lambda _, lr: upscaler(lr[None]).sr[0], "model" if only else label, source, strength)


def results(label: str, files: Mapping[str, Path], *, source: str) -> Method:
    """Return images that another program upscaled as a method.

    Args:
        label: Name of the method.
        files: Path of the result by the name of its pair.
        source: Folder, as it was given.
    """
    return Method(label, lambda pair, _: read_rgb(files[pair.name]), label, source)


def check_result_sizes(
    pairs: Iterable[Pair], files: Mapping[str, Path], scale: int, *, reduce_lr: bool = False
) -> None:
    """Compare the sizes in the headers of results with those of their originals, before networks are run.

    Args:
        pairs: The pairs.
        files: Path of the result by the name of its pair.
        scale: Scale of the comparison.
        reduce_lr: As for `compare`; the originals of images that are reduced are cropped to multiples of the scale.

    Raises:
        ValueError: A result does not have the size of its original.
    """
    for pair in pairs:
        got, wanted = read_size(files[pair.name]), read_size(pair.hr)
        if reduce_lr and wanted is not None and sorted(read_size(pair.lr) or ()) == sorted(wanted):
            wanted = (wanted[0] - wanted[0] % scale, wanted[1] - wanted[1] % scale)
        # The EXIF orientation is not applied here, so width and height may be swapped.
        if got is not None and wanted is not None and sorted(got) != sorted(wanted):
            raise ValueError(_wrong_size(str(files[pair.name]), pair, got[::-1], wanted[::-1]))


def common_scale(pairs: Sequence[Pair], *, reduce_lr: bool = False) -> int:
    """Return the ratio of the sizes of the first pair.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The ratio is not an integer, or it is 1 and the low-resolution image is to be reduced.
    """
    lr, hr = read_rgb(pairs[0].lr), read_rgb(pairs[0].hr)
    if reduce_lr and lr.shape == hr.shape:
        raise ValueError(
            f"{pairs[0].lr} has the size of its original, from which no scale follows: to reduce it, a network is "
            f"needed, whose scale is used (--model)"
        )
    scale = hr.shape[1] // lr.shape[1]
    read_pair(pairs[0], max(scale, 1))
    return scale


def compare(
    pairs: Iterable[Pair],
    methods: Sequence[Method],
    *,
    scale: int,
    metrics: OptionalMetrics,
    crops: int = 0,
    reduce_lr: bool = False,
) -> Comparison:
    """Score methods on pairs of images.

    Args:
        pairs: The pairs, at least one.
        methods: The methods; their labels differ.
        scale: Size of the originals divided by that of the low-resolution images.
        metrics: Metrics besides PSNR and SSIM.
        crops: Number of images of which a crop is kept: those where the methods differ most.
        reduce_lr: Whether to reduce low-resolution images that have the size of their originals, by antialiased bicubic
            interpolation, as `savl.images.pairs.read_pair` does.

    Raises:
        ImageFileError: An image cannot be read.
        ValueError: The sizes of a pair or of a result do not fit, or the images are too small to be scored.
    """
    images: list[ImageScores] = []
    kept: list[tuple[float, int, Crop]] = []  # ordered by the two numbers, because crops cannot be compared
    for number, pair in enumerate(pairs):
        lr, hr = read_pair(pair, scale, reduce_lr=reduce_lr, remedy="savl evaluate --reduce-lr does so")
        upscaled = {}
        for method in methods:
            sr = upscaled[method.label] = method.upscale(pair, lr)
            if sr.shape != hr.shape:
                what = f"{method.label}: the result of {pair.lr}"
                raise ValueError(_wrong_size(what, pair, sr.shape[1:], hr.shape[1:]))
        try:
            scores = {label: metrics.score(sr, hr, crop=scale) for label, sr in upscaled.items()}
        except ValueError as error:
            raise ValueError(f"{pair.hr}: {error}") from error
        images.append(ImageScores(pair.name, scores, metrics.score_alone(hr)))
        if crops:
            crop = _crop(pair.name, lr, hr, upscaled, scale)
            heapq.heappush(kept, (crop.difference, -number, crop))
            if len(kept) > crops:
                heapq.heappop(kept)
    missing: dict[str, str | None] = {}
    notes = {}
    for name in OPTIONAL:
        without = [
            image.name for image in images if any(getattr(each, name) is None for each in image.methods.values())
        ]
        missing[name] = None
        if name in metrics.missing:
            missing[name], notes[name] = metrics.missing[name].reason, str(metrics.missing[name])
        elif name not in metrics.paired and name not in metrics.single:
            missing[name] = "not asked for"
        elif without:
            missing[name] = notes[name] = f"{metrics.no_value.get(name, 'no value')}: {', '.join(without)}"
    best = tuple(crop for _, _, crop in sorted(kept, key=lambda entry: entry[:2], reverse=True))
    return Comparison(tuple(methods), tuple(images), scale, missing, notes, best, reduce_lr)


def _wrong_size(what: str, pair: Pair, got: Sequence[int], wanted: Sequence[int]) -> str:
    """Return a message about a result; sizes are height and width."""
    return f"{what} must be as large as {pair.hr}: {wanted[1]}x{wanted[0]} pixels, got {got[1]}x{got[0]}"


def _crop(name: str, lr: Tensor, hr: Tensor, upscaled: Mapping[str, Tensor], scale: int) -> Crop:
    """Cut the square out of an image where the methods differ most.

    If there are at least two other methods, bicubic interpolation is left out, because it differs most from all others.
    """
    compared = [sr for label, sr in upscaled.items() if label != BICUBIC or len(upscaled) < 3]
    lumas = torch.cat([luma(_levels(sr)) for sr in compared]).float()
    spread = lumas.var(dim=0, correction=0)
    side = max(1, min(CROP_SIDE, *hr.shape[1:]) // scale) * scale
    means = F.avg_pool2d(spread[None], side, stride=scale)[0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    top, left = row * scale, column * scale

    def cut(image: Tensor, factor: int = 1) -> Picture:
        part = image[:, top // factor : (top + side) // factor, left // factor : (left + side) // factor]
        return _picture(part)

    height, width = hr.shape[1:]
    reduction = min(1.0, _THUMBNAIL / max(height, width))
    small = bicubic_resize(hr[None], (max(1, round(height * reduction)), max(1, round(width * reduction))))[0]
    return Crop(
        difference=math.sqrt(float(means[row, column])),
        name=name,
        left=left,
        top=top,
        size=(width, height),
        lr=cut(lr, scale),
        methods={label: cut(sr) for label, sr in upscaled.items()},
        original=cut(hr),
        thumbnail=_picture(small),
    )


def _levels(image: Tensor) -> Tensor:
    return torch.round(image.double().clamp(0, 1) * 255)


def _picture(image: Tensor) -> Picture:
    return np.ascontiguousarray(_levels(image).permute(1, 2, 0).numpy().astype(np.uint8))
