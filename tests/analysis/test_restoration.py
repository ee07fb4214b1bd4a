"""Upscaling photographs that were degraded by the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from savl.analysis.restoration import restore
from savl.evaluation.fidelity import fidelity
from savl.images.folder import read_rgb
from savl.network import SAVL

Make = Callable[..., SAVL]
Write = Callable[..., list[Path]]


def test_a_fresh_network_with_an_image_residual_scores_as_bicubic_does(network: Make, photographs: Write) -> None:
    done: list[int] = []
    (found,) = restore([network()], photographs(2), seed=0, on_image=done.append)
    assert found.model == found.bicubic
    assert found.images == 2
    assert done == [1, 2]
    assert 5 < found.model.psnr_y < 40


def test_every_network_is_shown_the_same_images_and_scored_for_itself(network: Make, photographs: Write) -> None:
    paths, brighter = photographs(2), network()
    with torch.no_grad():
        assert brighter.upsampler.to_image.bias is not None
        brighter.upsampler.to_image.bias += 0.2
    first, second = restore([network(), brighter], paths, seed=0, on_image=lambda done: None)
    assert first.bicubic == second.bicubic == first.model
    assert second.model.psnr_rgb < first.model.psnr_rgb


def test_degradations_follow_from_the_seed_and_the_place(network: Make, photographs: Write) -> None:
    (path,) = photographs(1)
    model = network()

    def score(seed: int, times: int = 1) -> float:
        return restore([model], [path] * times, seed=seed, on_image=lambda done: None)[0].bicubic.psnr_rgb

    assert score(0) == score(0)
    assert score(0) != score(1)
    assert score(0, times=2) != score(0)


def test_scores_are_against_the_photograph(network: Make, photographs: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = photographs(1)
    seen = []

    def spy(sr: torch.Tensor, hr: torch.Tensor, *, crop: int) -> object:
        seen.append((hr, crop))
        return fidelity(sr, hr, crop=crop)

    monkeypatch.setattr("savl.analysis.restoration.fidelity", spy)
    restore([network()], [path], seed=0, on_image=lambda done: None)
    assert len(seen) == 2
    assert all(torch.equal(hr, read_rgb(path)) and crop == 4 for hr, crop in seen)
