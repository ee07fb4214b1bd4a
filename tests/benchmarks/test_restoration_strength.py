"""The fit of the restoration strength: its quadratic error, and what it learns from fields."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import savl
from benchmarks.studies.restoration_strength import Patches, fitted, joined, measured, scores, table
from savl.bicubic import bicubic_downsample
from savl.network import SAVL
from savl.training.data import Batch


@pytest.fixture(scope="module")
def network() -> SAVL:
    torch.manual_seed(0)
    small = replace(savl.CONFIGS["savl-tiny"], depths=(1,), channels=12, heads=1, window=4, cab_compress=3)
    model = SAVL(replace(small, cab_squeeze=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_error_of_a_strength_is_that_of_the_image(network: SAVL) -> None:
    x = torch.rand(2, 3, 32, 32)
    y = bicubic_downsample(x, 4)
    patches = measured(network, Batch(y, x, y, torch.zeros_like(y[:, 0]), 1, torch.zeros(2, 3)))
    for strength in (0.0, 0.4, 1.0):
        with torch.no_grad():
            error = (network(y, strength=strength) - x).square().mean(dim=(1, 2, 3))
        expected = -10 * error.log10()
        torch.testing.assert_close(patches.psnr(torch.tensor(strength)), expected, rtol=1e-4, atol=1e-3)


def synthetic(network: SAVL, best: float, sign: float, count: int = 64) -> Patches:
    """Return patches with the lowest error at a strength, which the sign of mu tells."""
    shape = count, network.config.latent, 4, 4
    mu = sign + 0.3 * torch.randn(shape)
    square = torch.rand(count, 4, 4) + 0.5
    along = best * square
    return Patches(mu.half(), torch.zeros(shape).half(), along, square, along.sum(dim=(1, 2)) + 0.1, 3 * 16 * 16)


def test_the_strength_is_learned_from_the_field(network: SAVL) -> None:
    torch.manual_seed(1)
    pairs, degraded = synthetic(network, 0.4, -1.0), synthetic(network, 0.9, 1.0)
    strength = fitted(network, pairs, degraded, steps=200, seed=0)
    found = {name: scores(strength, patches) for name, patches in (("pairs", pairs), ("degraded", degraded))}
    assert found["pairs"]["strength"] == pytest.approx(0.4, abs=0.05)
    assert found["degraded"]["strength"] == pytest.approx(0.9, abs=0.05)
    both = scores(strength, joined([pairs, degraded]))
    assert both["learned"] > max(both["fixed"].values())
    assert f"| pairs | {found['pairs']['fixed']['0.0']:.3f} |" in table(found)
