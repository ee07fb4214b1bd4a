"""Scoring folders of pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.evaluation import evaluate_pair, match_pairs
from savl.network import SAVLConfig


def upscaler() -> savl.Upscaler:
    config = SAVLConfig(
        channels=6, depths=(1,), heads=1, window=4, cab_compress=3, cab_squeeze=3, upsampler="pixelshuffledirect",
        image_residual=True, degradation_code="none",
    )  # fmt: skip
    return savl.Upscaler(savl.build(config))


def test_a_fresh_network_with_an_image_residual_scores_as_bicubic_does(pair_folders: tuple[Path, Path]) -> None:
    scores = evaluate_pair(match_pairs(*pair_folders)[0], upscaler())
    assert scores.name == "a"
    assert scores.model == scores.bicubic
    assert scores.model.lpips is None


def test_lpips_compares_both_images_with_the_original(pair_folders: tuple[Path, Path]) -> None:
    asked = []

    def lpips(sr: torch.Tensor, hr: torch.Tensor) -> float:
        asked.append((sr, hr))
        return float(len(asked))

    pair = match_pairs(*pair_folders)[0]
    scores = evaluate_pair(pair, upscaler(), lpips=lpips)
    assert {scores.model.lpips, scores.bicubic.lpips} == {1.0, 2.0}
    original = torch.from_numpy(np.array(Image.open(pair.hr))).permute(2, 0, 1) / 255
    assert all(torch.equal(hr, original) and sr.shape == hr.shape for sr, hr in asked)


def test_a_wrong_ratio_of_sizes_is_reported(pair_folders: tuple[Path, Path]) -> None:
    lr, hr = pair_folders
    Image.new("RGB", (32, 28)).save(hr / "a.png")
    with pytest.raises(ValueError, match="must be 4 times as large as .*a.png: 32x32 pixels, got 32x28"):
        evaluate_pair(match_pairs(lr, hr)[0], upscaler())
