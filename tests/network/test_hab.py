"""HAB: window attention beside channel attention, then an MLP; stochastic depth while training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl import ops
from savl.network import CAB, HAB, SAVLConfig
from savl.network.layers import DropPath

Small = Callable[..., SAVLConfig]
Awaken = Callable[[Any], Any]


def features(batch: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(batch, height, width, 12, dtype=torch.float64)


def channel_attention(cab: CAB, x: Tensor) -> Tensor:
    """CAB in the layout of its publication, (B, C, H, W), every linear layer as a 1×1 convolution."""
    image = x.permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(image, cab.compress.weight, cab.compress.bias, padding=1))
    out = F.conv2d(hidden, cab.expand.weight, cab.expand.bias, padding=1)
    pooled = F.adaptive_avg_pool2d(out, 1)
    squeezed = F.relu(F.conv2d(pooled, cab.squeeze.weight[:, :, None, None], cab.squeeze.bias))
    gate = torch.sigmoid(F.conv2d(squeezed, cab.excite.weight[:, :, None, None], cab.excite.bias))
    return (out * gate).permute(0, 2, 3, 1)


def hybrid_attention(hab: HAB, x: Tensor, attention_weight: float = 1.0, mlp_weight: float = 1.0) -> Tensor:
    """HAB step by step, with the weights that stochastic depth would give its two branches."""
    normed = F.layer_norm(x, (12,), hab.norm_attention.weight, hab.norm_attention.bias)
    qkv = F.linear(normed, hab.qkv.weight, hab.qkv.bias)
    attended = ops.window_attention(qkv, hab.bias_table, window=4, shift=hab.shift)
    attended = F.linear(attended, hab.proj.weight, hab.proj.bias)
    x = x + attention_weight * attended + hab.cab.scale * channel_attention(hab.cab, normed)
    normed = F.layer_norm(x, (12,), hab.norm_mlp.weight, hab.norm_mlp.bias)
    hidden = F.gelu(F.linear(normed, hab.mlp.expand.weight, hab.mlp.expand.bias))
    return x + mlp_weight * F.linear(hidden, hab.mlp.contract.weight, hab.mlp.contract.bias)


# Channel attention


def branch(cab: CAB, x: Tensor) -> Tensor:
    """What the block adds, without its scale."""
    return cab(x, torch.zeros_like(x)) / cab.scale


def test_cab_adds_its_branch_to_the_residual(small_config: Small, awaken: Awaken) -> None:
    cab = awaken(CAB(small_config()))
    x = features()
    torch.testing.assert_close(cab(x, 2 * x), 2 * x + cab.scale * channel_attention(cab, x), rtol=0, atol=1e-12)


def test_cab_is_its_formula(small_config: Small, awaken: Awaken) -> None:
    cab = awaken(CAB(small_config()))
    x = features()
    torch.testing.assert_close(branch(cab, x), channel_attention(cab, x), rtol=0, atol=1e-12)


def test_cab_pools_every_image_by_itself(small_config: Small, awaken: Awaken) -> None:
    cab = awaken(CAB(small_config()))
    x = features(3)
    x[0] *= 10
    torch.testing.assert_close(branch(cab, x)[1:], branch(cab, x[1:]), rtol=0, atol=1e-12)


def test_cab_pools_over_the_whole_image(small_config: Small, awaken: Awaken) -> None:
    cab = awaken(CAB(small_config()))
    x = features(1)
    changed = x.clone()
    changed[0, 0, 0] += 1.0
    assert bool((branch(cab, x) != branch(cab, changed)).any(dim=-1).all()), (
        "a pixel must reach every other through the pooled gate"
    )


# Channel attention of a neighbourhood


def local_channel_attention(cab: CAB, x: Tensor, window: int, side: int) -> Tensor:
    """A window at a time: its features times the gate of all windows at most ``side // 2`` away."""
    image = x.permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(image, cab.compress.weight, cab.compress.bias, padding=1))
    out = F.conv2d(hidden, cab.expand.weight, cab.expand.bias, padding=1).permute(0, 2, 3, 1)
    result = torch.empty_like(out)
    for row, column in itertools.product(range(0, x.shape[1], window), range(0, x.shape[2], window)):
        reach = side // 2 * window
        top, left = max(row - reach, 0), max(column - reach, 0)
        around = out[:, top : row + window + reach, left : column + window + reach].mean(dim=(1, 2))
        squeezed = F.relu(F.linear(around, cab.squeeze.weight, cab.squeeze.bias))
        gate = torch.sigmoid(F.linear(squeezed, cab.excite.weight, cab.excite.bias))[:, None, None]
        here = (slice(None), slice(row, row + window), slice(column, column + window))
        result[here] = out[here] * gate
    return result


@pytest.mark.parametrize("side", [1, 3, 5])
def test_cab_of_a_neighbourhood_is_its_formula(side: int, small_config: Small, awaken: Awaken) -> None:
    cab = awaken(CAB(small_config(cab_neighbourhood=side)))
    x = features(height=16, width=28)
    torch.testing.assert_close(branch(cab, x), local_channel_attention(cab, x, 4, side), rtol=0, atol=1e-12)


def test_a_neighbourhood_of_the_whole_image_is_the_whole_image(small_config: Small, awaken: Awaken) -> None:
    near, whole = (CAB(small_config(cab_neighbourhood=side)) for side in (5, 0))
    awaken(near)
    whole.double().load_state_dict(near.state_dict())
    x = features()  # two rows and three columns of windows: none is more than two away
    torch.testing.assert_close(branch(near, x), branch(whole, x), rtol=0, atol=1e-12)


def test_a_neighbourhood_makes_a_tile_what_it_is_in_its_image(small_config: Small, awaken: Awaken) -> None:
    cab = awaken(CAB(small_config(cab_neighbourhood=3)))
    x = features(height=32, width=32)
    tile = branch(cab, x[:, 8:28, 4:28])
    # Two windows of context: one for the average, and one that holds the pixels the convolutions read beyond it.
    torch.testing.assert_close(tile[:, 8:-8, 8:-8], branch(cab, x)[:, 16:20, 12:20], rtol=0, atol=1e-12)


def test_cab_compresses_and_squeezes_as_its_settings_say(small_config: Small) -> None:
    cab = CAB(small_config(cab_compress=2, cab_squeeze=6))
    assert (cab.compress.out_channels, cab.expand.in_channels) == (6, 6)
    assert (cab.squeeze.out_features, cab.excite.in_features) == (2, 2)


# The block


@pytest.mark.parametrize("shift", [0, 2])
def test_hab_is_its_formula(shift: int, small_config: Small, awaken: Awaken) -> None:
    hab = awaken(HAB(small_config(), shift, drop_path=0.0))
    x = features()
    torch.testing.assert_close(hab(x), hybrid_attention(hab, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mlp_ratio", "hidden"), [(2.0, 24), (1.5, 18), (4, 48)])
def test_the_mlp_is_as_wide_as_its_ratio_says(mlp_ratio: float, hidden: int, small_config: Small) -> None:
    mlp = HAB(small_config(mlp_ratio=mlp_ratio), 0, 0.0).mlp
    assert (mlp.expand.out_features, mlp.contract.in_features) == (hidden, hidden)


def test_the_channel_branch_weighs_what_cab_scale_says(small_config: Small, awaken: Awaken) -> None:
    x = features()
    light, heavy = (awaken(HAB(small_config(cab_scale=scale), 0, 0.0)) for scale in (0.01, 1.0))
    for hab in (light, heavy):
        hab.load_state_dict(heavy.state_dict())
        with torch.no_grad():  # leaves the channel branch alone in the output
            for silenced in (hab.proj, hab.mlp.contract):
                silenced.weight.zero_()
                silenced.bias.zero_()
    torch.testing.assert_close(heavy(x) - x, 100 * (light(x) - x), rtol=0, atol=1e-10)
    assert not torch.allclose(heavy(x), x), "the channel branch does nothing"


def test_images_of_a_batch_do_not_see_each_other(small_config: Small, awaken: Awaken) -> None:
    hab = awaken(HAB(small_config(), 2, 0.0))
    x = features(3)
    torch.testing.assert_close(hab(x)[1:2], hab(x[1:2]), rtol=0, atol=1e-12)


# Stochastic depth


def test_drop_path_drops_whole_samples_and_rescales_the_others() -> None:
    drop_path = DropPath(0.25).train()
    out = drop_path(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert bool((per_sample == per_sample[:, :1]).all()), "a sample was dropped in part"
    assert set(per_sample[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    kept = float((per_sample[:, 0] > 0).double().mean())
    assert kept == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / 4000))
    assert float(out.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(0.25 / 0.75 / 4000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert DropPath(0.5).train()(torch.ones(4, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("probability", "training"), [(0.5, False), (0.0, True)])
def test_drop_path_is_the_identity_in_evaluation_and_without_probability(probability: float, training: bool) -> None:
    x = torch.randn(4, 2)
    assert DropPath(probability).train(training)(x) is x


def test_hab_in_training_drops_its_branches_independently(small_config: Small, awaken: Awaken) -> None:
    hab = awaken(HAB(small_config(), 0, drop_path=0.5)).train()
    x = features(1).expand(64, -1, -1, -1)
    outcomes = [hybrid_attention(hab, x[:1], *weights)[0] for weights in itertools.product((0.0, 2.0), repeat=2)]
    seen = [
        [index for index, outcome in enumerate(outcomes) if torch.allclose(sample, outcome, rtol=0, atol=1e-10)]
        for sample in hab(x)
    ]
    assert all(len(indices) == 1 for indices in seen), "a sample matches none of the four ways to drop branches"
    assert {indices[0] for indices in seen} == {0, 1, 2, 3}


def test_hab_in_evaluation_drops_nothing(small_config: Small, awaken: Awaken) -> None:
    hab = awaken(HAB(small_config(), 0, drop_path=0.5))
    x = features()
    torch.testing.assert_close(hab(x), hybrid_attention(hab, x), rtol=0, atol=1e-12)
