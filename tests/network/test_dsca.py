"""DSCA: attention reweighted by severity, channels modulated by the mean of the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl import ops
from savl.network import DSCA, SAVLConfig

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]


def inputs(batch: int = 2, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, mean and severity for the small configuration."""
    x = torch.randn(batch, height, width, 12, dtype=torch.float64)
    mu = torch.randn(batch, height, width, 6, dtype=torch.float64)
    severity = 2 * torch.rand(batch, height, width, dtype=torch.float64)
    return x, mu, severity


def attended_features(dsca: DSCA, x: Tensor, severity: Tensor | None) -> Tensor:
    """Compute the spatial path step by step."""
    normed = F.layer_norm(x, (12,), dsca.norm.weight, dsca.norm.bias)
    qkv = F.linear(normed, dsca.qkv.weight, dsca.qkv.bias)
    attended = ops.window_attention(qkv, dsca.bias_table, severity, window=4, shift=dsca.shift)
    return F.linear(attended, dsca.proj.weight, dsca.proj.bias)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("modulation_shift", [False, True], ids=["gamma", "gamma-and-beta"])
def test_dsca_is_the_formula_of_its_two_paths(
    shift: int, modulation_shift: bool, small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    dsca = perturb_parameters(DSCA(small_config(modulation_shift=modulation_shift), shift))
    x, mu, severity = inputs()

    pixels = mu.permute(0, 3, 1, 2)  # the channel path as a 1×1 convolution, as in the paper
    weight = dsca.guidance.project.weight[:, :, None, None]
    vectors = F.conv2d(pixels, weight, dsca.guidance.project.bias).permute(0, 2, 3, 1)
    gamma, beta = (vectors[..., :12], vectors[..., 12:]) if modulation_shift else (vectors, torch.zeros_like(vectors))
    expected = x + (1 + gamma) * attended_features(dsca, x, severity) + beta

    torch.testing.assert_close(dsca(x, mu, severity), expected, rtol=0, atol=1e-12)


def test_an_untrained_dsca_is_attention_and_a_residual(small_config: Small) -> None:
    dsca = DSCA(small_config(modulation_shift=True), 0).double()
    x, mu, severity = inputs()
    torch.testing.assert_close(dsca(x, mu, severity), x + attended_features(dsca, x, severity), rtol=0, atol=1e-12)


def test_an_untrained_dsca_learns_its_guidance_at_the_first_step(small_config: Small) -> None:
    dsca = DSCA(small_config(), 0).double()
    (dsca(*inputs()) * torch.randn(2, 8, 12, 12)).sum().backward()
    assert bool(dsca.guidance.project.weight.grad.ne(0).all())


def test_without_spatial_modulation_severity_has_no_influence(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    x, mu, severity = inputs()
    guided = perturb_parameters(DSCA(small_config(), 0))
    ablated = perturb_parameters(DSCA(small_config(spatial_modulation=False), 0))
    ablated.load_state_dict(guided.state_dict())
    assert not torch.equal(guided(x, mu, severity), guided(x, mu, 2 - severity)), "severity is not read at all"
    assert torch.equal(ablated(x, mu, severity), ablated(x, mu, 2 - severity))
    assert not torch.equal(ablated(x, mu, severity), ablated(x, -mu, severity)), "the channel path is gone too"
    torch.testing.assert_close(ablated(x, mu, severity), guided(x, mu, torch.ones_like(severity)))


def test_without_channel_modulation_mu_has_no_influence(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    x, mu, severity = inputs()
    guided = perturb_parameters(DSCA(small_config(), 0))
    ablated = perturb_parameters(DSCA(small_config(channel_modulation=False), 0))
    assert not torch.equal(guided(x, mu, severity), guided(x, -mu, severity)), "mu is not read at all"
    assert torch.equal(ablated(x, mu, severity), ablated(x, -mu, severity))
    assert not torch.equal(ablated(x, mu, severity), ablated(x, mu, 2 - severity)), "the spatial path is gone too"
    torch.testing.assert_close(ablated(x, mu, severity), x + attended_features(ablated, x, severity))


def test_ablations_take_away_their_own_parameters_only(small_config: Small) -> None:
    def names(**changes: Any) -> set[str]:
        return {name for name, _ in DSCA(small_config(**changes), 0).named_parameters()}

    guidance = {"guidance.project.weight", "guidance.project.bias"}
    assert names(spatial_modulation=False) == names()
    assert names() - names(channel_modulation=False) == guidance
    assert names(modulation_shift=True) == names()


def test_a_deterministic_code_has_no_severity(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    dsca = perturb_parameters(DSCA(small_config(degradation_code="deterministic"), 2))
    x, mu, severity = inputs()
    torch.testing.assert_close(dsca(x, mu, None), dsca(x, mu, torch.ones_like(severity)))


@pytest.mark.parametrize("shift", [0, 2])
def test_a_pixel_reaches_its_own_window_only(
    shift: int, small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    dsca = perturb_parameters(DSCA(small_config(), shift))
    x, mu, severity = inputs(1)
    changed = x.clone()
    changed[0, 4, 4] += torch.randn(12)
    reached = (dsca(x, mu, severity) != dsca(changed, mu, severity)).any(dim=-1)[0].nonzero()
    first = 4 - (4 - shift) % 4
    assert reached.amin(dim=0).tolist() == [first, first]
    assert reached.amax(dim=0).tolist() == [min(first + 3, 7), first + 3]
