"""Scores of a network and of bicubic interpolation on pairs of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from savl.bicubic import bicubic_upscale
from savl.evaluation.fidelity import Fidelity, fidelity
from savl.images.pairs import Pair, read_pair
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
    lr, hr = read_pair(pair, upscaler.scale)
    sr = upscaler(lr[None]).sr[0]
    bicubic = bicubic_upscale(lr[None], upscaler.scale)[0]

    def score(image: Tensor) -> Fidelity:
        scores = fidelity(image, hr, crop=upscaler.scale)
        return scores if lpips is None else replace(scores, lpips=lpips(image, hr))

    try:
        return PairScores(pair.name, model=score(sr), bicubic=score(bicubic))
    except ValueError as error:
        raise ValueError(f"{pair.hr}: {error}") from error
