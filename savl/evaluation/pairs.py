"""Scores of a network and of bicubic interpolation on pairs of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from savl.evaluation.comparison import BICUBIC, OptionalMetrics, bicubic, compare, network
from savl.evaluation.fidelity import Fidelity
from savl.images.pairs import Pair
from savl.inference.enlarge import ImageUpscaler


@dataclass(frozen=True)
class PairScores:
    """Scores of one pair."""

    name: str
    model: Fidelity
    bicubic: Fidelity


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
    metrics = OptionalMetrics(paired={} if lpips is None else {"lpips": lpips})
    methods = [bicubic(upscaler.scale), network("model", upscaler, source="", only=True)]
    scores = compare([pair], methods, scale=upscaler.scale, metrics=metrics).images[0].methods
    return PairScores(pair.name, model=scores["model"], bicubic=scores[BICUBIC])
