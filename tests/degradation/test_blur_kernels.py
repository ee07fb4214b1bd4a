"""Blur kernels: their values, against formulas, moments and spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from savl.degradation.blur_kernels import SIDE, BlurKernel, GaussianBlurKernel, SincBlurKernel, draw_blur_kernel
from savl.degradation.config import SHAPES, BlurConfig

MIDDLE = SIDE // 2
STEPS = torch.arange(SIDE, dtype=torch.float64) - MIDDLE


def drawn(count: int) -> list[BlurKernel]:
    random = np.random.default_rng(0)
    return [draw_blur_kernel(BlurConfig(sinc_probability=0.2), random) for _ in range(count)]


def published(kernel: GaussianBlurKernel) -> NDArray[np.float64]:
    """Compute the kernel as Real-ESRGAN does, with the inverse of the covariance matrix."""
    cosine, sine = math.cos(kernel.rotation), math.sin(kernel.rotation)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    inverse = np.linalg.inv(turn @ np.diag(np.square(kernel.sigma)) @ turn.T)
    steps = np.arange(kernel.size) - kernel.size // 2
    grid = np.stack(np.meshgrid(steps, steps), axis=-1)
    distance = np.einsum("yxi,ij,yxj->yx", grid, inverse, grid) ** kernel.beta
    values = 1 / (1 + distance) if kernel.shape.startswith("plateau") else np.exp(-0.5 * distance)
    return np.asarray(values / values.sum())


def spectrum(kernel: BlurKernel) -> tuple[Tensor, Tensor]:
    """Radial frequencies, radians per pixel, and the kernel's response there."""
    frequencies = 2 * math.pi * torch.fft.fftfreq(128)
    values = torch.zeros(128, 128)
    values[:SIDE, :SIDE] = kernel.values()
    response = torch.fft.fft2(torch.roll(values, (-MIDDLE, -MIDDLE), (0, 1)))
    assert response.imag.abs().max() < 1e-5, "a symmetric kernel moves nothing"
    return torch.hypot(frequencies[:, None], frequencies[None, :]), response.real


def test_kernels_add_up_to_1_and_are_symmetric() -> None:
    for kernel in drawn(300):
        values = kernel.values()
        assert values.shape == (SIDE, SIDE)
        assert values.dtype == torch.float32
        assert values.double().sum().item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(values, values.rot90(2), rtol=0, atol=1e-7)
        if not (isinstance(kernel, GaussianBlurKernel) and kernel.shape.endswith("aniso")):
            torch.testing.assert_close(values, values.T, rtol=0, atol=1e-7)
            torch.testing.assert_close(values, values.flip(0), rtol=0, atol=1e-7)


def test_kernels_are_zero_outside_their_size() -> None:
    for kernel in (GaussianBlurKernel("plateau_iso", 7, (3.0, 3.0), 0.0, 1.0), SincBlurKernel(7, 1.5)):
        values = kernel.values()
        inner = values[MIDDLE - 3 : MIDDLE + 4, MIDDLE - 3 : MIDDLE + 4]
        assert torch.count_nonzero(inner) == 49
        assert torch.count_nonzero(values) == 49


def test_gaussian_kernels_are_those_of_the_published_formula() -> None:
    kernels = [kernel for kernel in drawn(300) if isinstance(kernel, GaussianBlurKernel)]
    assert {kernel.shape for kernel in kernels} == set(SHAPES)
    for kernel in kernels:
        margin = (SIDE - kernel.size) // 2
        values = kernel.values()[margin : SIDE - margin, margin : SIDE - margin]
        np.testing.assert_allclose(values.numpy(), published(kernel), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.8, 1.5, 2.5])
def test_the_second_moment_of_an_isotropic_gaussian_is_sigma_squared(sigma: float) -> None:
    values = GaussianBlurKernel("iso", 21, (sigma, sigma), 0.0, 1.0).values().double()
    for axis in (0, 1):
        moment = (values.sum(dim=axis) * STEPS.square()).sum().item()
        assert moment == pytest.approx(sigma**2, rel=0.005)


def test_the_first_axis_lies_at_the_angle_and_a_quarter_turn_swaps_the_axes() -> None:
    horizontal = GaussianBlurKernel("aniso", 21, (2.5, 0.8), 0.0, 1.0).values()
    assert horizontal[MIDDLE, MIDDLE + 3] > 100 * horizontal[MIDDLE + 3, MIDDLE]
    turned = GaussianBlurKernel("aniso", 21, (2.5, 0.8), math.pi / 2, 1.0).values()
    torch.testing.assert_close(turned, horizontal.T)
    for angle in (0.3, 1.2):
        one = GaussianBlurKernel("aniso", 21, (2.5, 0.8), angle + math.pi / 2, 1.0).values()
        other = GaussianBlurKernel("aniso", 21, (0.8, 2.5), angle, 1.0).values()
        torch.testing.assert_close(one, other)


def test_a_larger_beta_gives_a_flatter_top_and_steeper_sides() -> None:
    def ratios(beta: float) -> tuple[float, float]:
        values = GaussianBlurKernel("generalized_iso", 21, (3.0, 3.0), 0.0, beta).values()[MIDDLE]
        return (values[MIDDLE + 1] / values[MIDDLE]).item(), (values[MIDDLE + 8] / values[MIDDLE]).item()

    (near_blunt, far_blunt), (near, far), (near_sharp, far_sharp) = ratios(4.0), ratios(1.0), ratios(0.5)
    assert near_blunt > near > near_sharp
    assert far_blunt < far < far_sharp


@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 3, math.pi / 2])
def test_sinc_passes_frequencies_below_its_cutoff_and_stops_those_above(cutoff: float) -> None:
    frequency, response = spectrum(SincBlurKernel(21, cutoff))
    assert response[0, 0].item() == pytest.approx(1, abs=1e-5)
    # Cut to 21 pixels, the edge is about 2 pi / 21 wide, and the ripple of a sharp edge remains.
    assert response[frequency < cutoff - 0.3].min() > 0.8
    assert response[frequency > cutoff + 0.3].abs().max() < 0.2
    assert response[frequency > cutoff + 0.3].square().mean().sqrt() < 0.05


def test_a_sinc_kernel_causes_ringing() -> None:
    values = SincBlurKernel(21, math.pi / 3).values()
    assert values.min() < 0
    # The first zero of J1 is at 3.83: negative beyond 3.83 / cut-off = 3.66 pixels.
    assert values[MIDDLE, MIDDLE + 3] > 0 > values[MIDDLE, MIDDLE + 4]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_a_gaussian_kernel_without_strength_is_a_single_pixel(shape: str, beta: float) -> None:
    values = GaussianBlurKernel(shape, 21, (3.0, 0.2), 0.7, beta).weakened(0.0).values()
    assert values[MIDDLE, MIDDLE] == 1
    assert values.sum().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("size", [7, 21])
def test_a_sinc_kernel_without_strength_is_a_single_pixel(size: int) -> None:
    values = SincBlurKernel(size, math.pi / 3).weakened(0.0).values()
    assert values[MIDDLE, MIDDLE] == 1
    assert torch.count_nonzero(values) == 1


def test_strength_scales_sigma_and_the_amount_of_sinc() -> None:
    for kernel in drawn(30):
        assert kernel.weakened(1.0) == kernel
    weak = GaussianBlurKernel("iso", 21, (2.4, 2.4), 0.0, 1.0).weakened(0.5)
    assert weak.sigma == (1.2, 1.2)
    frequency, whole = spectrum(SincBlurKernel(21, math.pi / 3))
    _, half = spectrum(SincBlurKernel(21, math.pi / 3).weakened(0.5))
    torch.testing.assert_close(half, (whole + 1) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kernel", [GaussianBlurKernel("plateau_iso", 21, (2.0, 2.0), 0.0, 1.5), SincBlurKernel(15, 1.3)]
)
def test_a_lower_strength_gives_the_centre_a_larger_weight(kernel: BlurKernel) -> None:
    centres = [kernel.weakened(strength / 10).values()[MIDDLE, MIDDLE].item() for strength in range(11)]
    assert centres == sorted(centres, reverse=True)
    assert len(set(centres)) > 7
