"""PSNR and SSIM against values known in closed form, and against those of torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from savl.evaluation import Fidelity, fidelity
from savl.evaluation.fidelity import as_8_bit, luma


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


def photograph(height: int, width: int) -> torch.Tensor:
    """Return a smooth image with edges, a white area and a black one; ``(3, H, W)`` in [0, 1]."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)
    image[:, : height // 4, : width // 3] = 1
    image[:, -height // 5 :] = 0
    return image


@pytest.mark.parametrize("size", [(11, 11), (19, 40), (700, 60)], ids=str)
@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_ssim_and_psnr_are_those_of_torchmetrics(size: tuple[int, int], noise: float) -> None:
    hr = photograph(*size)
    sr = (hr + noise * torch.randn(hr.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    scores = fidelity(sr, hr, crop=0)
    a, b = as_8_bit(sr, hr)
    for psnr, ssim, x, y in (
        (scores.psnr_rgb, scores.ssim_rgb, a, b),
        (scores.psnr_y, scores.ssim_y, luma(a), luma(b)),
    ):
        judged = structural_similarity_index_measure(x[None], y[None], data_range=255.0, sigma=1.5, kernel_size=11)
        assert ssim == pytest.approx(float(judged), abs=1e-9)  # type: ignore[arg-type]
        assert psnr == pytest.approx(float(peak_signal_noise_ratio(x, y, data_range=255.0)))


def test_shapes_that_differ_are_reported() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 40, 30\) and \(3, 40, 31\)"):
        fidelity(torch.rand(3, 40, 30), torch.rand(3, 40, 31))
