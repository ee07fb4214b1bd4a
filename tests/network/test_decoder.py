"""The likelihood decoder: clean content plus the effect of the degradation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from savl.network import SAVL, LikelihoodDecoder, SAVLConfig

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]


@pytest.fixture(scope="module")
def decoder(small_config: Small, perturb_parameters: PerturbParameters) -> LikelihoodDecoder:
    return perturb_parameters(LikelihoodDecoder(small_config()))


def inputs(batch: int = 2, height: int = 9, width: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.rand(batch, 3, height, width, dtype=torch.float64)
    r = torch.randn(batch, 6, height, width, dtype=torch.float64)
    return z, r


@pytest.mark.parametrize(("height", "width"), [(9, 11), (1, 1)])
def test_the_decoder_returns_an_image_of_the_size_of_the_content(
    decoder: LikelihoodDecoder, height: int, width: int
) -> None:
    assert decoder(*inputs(2, height, width))[0].shape == (2, 3, height, width)


def test_the_decoder_predicts_the_difference_from_the_content(decoder: LikelihoodDecoder) -> None:
    z, r = inputs()
    torch.testing.assert_close(decoder(z, r)[0] - z, decoder.body(torch.cat((z, r), dim=1)))


def test_the_decoder_reads_both_the_content_and_the_sample(decoder: LikelihoodDecoder) -> None:
    z, r = inputs()
    residual = decoder(z, r)[0] - z
    other_z, other_r = inputs()
    assert not torch.allclose(decoder(z, other_r)[0] - z, residual), "the sample of the field is not read"
    assert not torch.allclose(decoder(other_z, r)[0] - other_z, residual), "the content is only passed through"


def test_an_untrained_decoder_returns_the_content_and_trains_its_last_layer_first(small_config: Small) -> None:
    decoder = LikelihoodDecoder(small_config())
    z, r = (value.float() for value in inputs())
    assert torch.equal(decoder(z, r)[0], z)
    (decoder(z, r)[0] * torch.randn(2, 3, 9, 11)).sum().backward()
    last = decoder.body[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.weight.grad is not None
    assert last.weight.grad.any(), "a fresh decoder has nothing to learn from"


def test_gradients_reach_the_sample_and_every_parameter(decoder: LikelihoodDecoder) -> None:
    z, r = inputs()
    r.requires_grad_()
    (decoder(z, r)[0] * torch.randn(2, 3, 9, 11, dtype=torch.float64)).sum().backward()
    silent = [
        name for name, parameter in decoder.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent, f"no gradient reaches {silent}"
    assert bool(r.grad.ne(0).all()), "part of the sample has no gradient"


def test_the_decoder_is_local(decoder: LikelihoodDecoder) -> None:
    z, r = inputs(1, 15, 15)
    changed = r.clone()
    changed[0, :, 7, 7] += 1.0
    differs = (decoder(z, r)[0] != decoder(z, changed)[0]).any(dim=1)[0].nonzero()
    assert differs.amin(dim=0).tolist() == [4, 4]  # three 3×3 convolutions reach three pixels
    assert differs.amax(dim=0).tolist() == [10, 10]


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_depth_and_width_are_settings(depth: int, small_config: Small) -> None:
    convolutions = [
        module
        for module in LikelihoodDecoder(small_config(decoder_depth=depth, decoder_width=10)).modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert len(convolutions) == depth
    assert {c.out_channels for c in convolutions[:-1]} == {10}
    assert (convolutions[0].in_channels, convolutions[-1].out_channels) == (3 + 6, 3)


def test_the_network_itself_has_no_decoder(small_config: Small) -> None:
    assert not any(isinstance(module, LikelihoodDecoder) for module in SAVL(small_config()).modules())


def test_a_learned_scale_has_bounds_and_starts_in_between(small_config: Small) -> None:
    decoder = LikelihoodDecoder(small_config(), learned_scale=True)
    z, r = (value.float() for value in inputs())
    location, log_scale = decoder(z, r)
    assert torch.equal(location, z)
    assert log_scale is not None
    torch.testing.assert_close(log_scale.exp() * 255, torch.full_like(z, 8.0))
    last = decoder.body[-1]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        last.weight.normal_(std=1e3)
    _, log_scale = decoder(z, r)
    assert log_scale is not None
    assert math.log(0.25 / 255) - 1e-6 <= log_scale.min() < log_scale.max() <= 0.0
