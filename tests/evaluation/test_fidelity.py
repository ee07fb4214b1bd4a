"""PSNR and SSIM against values known in closed form."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from savl.evaluation import Fidelity, fidelity
from savl.evaluation.fidelity import luma


def test_identical_images_score_infinity_and_one() -> None:
    image = torch.rand(3, 40, 30)
    scores = fidelity(image, image)
    assert scores.psnr_y == scores.psnr_rgb == math.inf
    assert scores.ssim_y == pytest.approx(1)
    assert scores.ssim_rgb == pytest.approx(1)


def test_a_constant_error_of_ten_levels_scores_what_the_formula_says() -> None:
    hr = torch.full((3, 40, 30), 100 / 255)
    sr = torch.full((3, 40, 30), 110 / 255)
    scores = fidelity(sr, hr)
    assert scores.psnr_rgb == pytest.approx(20 * math.log10(255 / 10))
    # On luma ten levels become 10 · (65.481 + 128.553 + 24.966) / 255.
    assert scores.psnr_y == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)))


def test_luma_of_white_and_black_is_235_and_16() -> None:
    assert luma(torch.full((3, 1, 1), 255.0)).item() == pytest.approx(235)
    assert luma(torch.zeros(3, 1, 1)).item() == pytest.approx(16)


def test_luma_scores_leave_the_border_out_and_rgb_scores_do_not() -> None:
    hr = torch.rand(3, 40, 30)
    sr = hr.clone()
    sr[:, :4] = 0
    scores = fidelity(sr, hr)
    assert scores.psnr_y == math.inf
    assert scores.psnr_rgb < 30


def test_images_are_compared_as_the_8_bit_files_they_become() -> None:
    hr = torch.full((3, 40, 30), 100 / 255)
    assert fidelity(hr + 0.4 / 255, hr).psnr_rgb == math.inf


def test_mean_averages_each_score() -> None:
    assert Fidelity.mean([Fidelity(10, 0.5, 20, 0.25), Fidelity(30, 0.7, 40, 0.75)]) == Fidelity(20, 0.6, 30, 0.5)


def test_lpips_is_averaged_where_every_image_has_it_and_left_out_otherwise() -> None:
    measured, other, none = Fidelity(1, 1, 1, 1, 0.25), Fidelity(1, 1, 1, 1, 0.75), Fidelity(1, 1, 1, 1)
    assert Fidelity.mean([measured, other]).lpips == 0.5
    assert Fidelity.mean([measured, none]) == Fidelity.mean([none, none]) == none


def test_a_torchmetrics_that_does_not_import_is_told_with_its_likely_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(RuntimeError, match=r"SSIM needs torchmetrics.*torchvision made for another torch"):
        fidelity(torch.rand(3, 40, 30), torch.rand(3, 40, 30))


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 40, 30\) and \(3, 40, 31\)"):
        fidelity(torch.rand(3, 40, 30), torch.rand(3, 40, 31))
