"""DA-RHAG and its blocks: HAB with CAB, OCAB, and their order within the group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl import ops
from savl.network import CAB, DARHAG, DSCA, HAB, OCAB, SAVLConfig
from savl.network.layers import DropPath, LayerNorm

Small = Callable[..., SAVLConfig]
PerturbParameters = Callable[[Any], Any]


def features(batch: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(batch, height, width, 12, dtype=torch.float64)


def channel_attention(cab: CAB, x: Tensor) -> Tensor:
    """Compute CAB in the published layout, (B, C, H, W), with every linear layer as a 1×1 convolution."""
    image = x.permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(image, cab.compress.weight, cab.compress.bias, padding=1))
    out = F.conv2d(hidden, cab.expand.weight, cab.expand.bias, padding=1)
    pooled = F.adaptive_avg_pool2d(out, 1)
    squeezed = F.relu(F.conv2d(pooled, cab.squeeze.weight[:, :, None, None], cab.squeeze.bias))
    gate = torch.sigmoid(F.conv2d(squeezed, cab.excite.weight[:, :, None, None], cab.excite.bias))
    return (out * gate).permute(0, 2, 3, 1)


def hybrid_attention(hab: HAB, x: Tensor, attention_weight: float = 1.0, mlp_weight: float = 1.0) -> Tensor:
    """Compute HAB step by step, with the weights that stochastic depth gives to its two branches."""
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
    """Return what the block adds to the residual, without its scale."""
    hidden, gate = cab(x, None)
    return cab.expand(hidden, residual=torch.zeros_like(x), gate=gate) / cab.scale


def test_cab_is_its_formula(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    cab = perturb_parameters(CAB(small_config()))
    x = features()
    torch.testing.assert_close(branch(cab, x), channel_attention(cab, x), rtol=0, atol=1e-12)


def test_cab_normalises_its_input_first(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    cab, norm = perturb_parameters(CAB(small_config())), perturb_parameters(LayerNorm(12))
    x = features()
    torch.testing.assert_close(cab(x, norm), cab(norm(x), None), rtol=0, atol=1e-12)


def test_cab_pools_every_image_by_itself(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    cab = perturb_parameters(CAB(small_config()))
    x = features(3)
    x[0] *= 10
    torch.testing.assert_close(branch(cab, x)[1:], branch(cab, x[1:]), rtol=0, atol=1e-12)


def test_cab_pools_over_the_whole_image(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    cab = perturb_parameters(CAB(small_config()))
    x = features(1)
    changed = x.clone()
    changed[0, 0, 0] += 1.0
    assert bool((branch(cab, x) != branch(cab, changed)).any(dim=-1).all()), (
        "a pixel must reach every other through the pooled gate"
    )


# Channel attention of a neighbourhood


def local_channel_attention(cab: CAB, x: Tensor, window: int, side: int) -> Tensor:
    """Compute CAB one window at a time, with a gate from all windows at most ``side // 2`` away."""
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
def test_cab_of_a_neighbourhood_is_its_formula(
    side: int, small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    cab = perturb_parameters(CAB(small_config(cab_neighbourhood=side)))
    x = features(height=16, width=28)
    torch.testing.assert_close(branch(cab, x), local_channel_attention(cab, x, 4, side), rtol=0, atol=1e-12)


def test_a_neighbourhood_of_the_whole_image_is_the_whole_image(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    near, whole = (CAB(small_config(cab_neighbourhood=side)) for side in (5, 0))
    perturb_parameters(near)
    whole.double().load_state_dict(near.state_dict())
    x = features()  # two rows and three columns of windows: none is more than two away
    torch.testing.assert_close(branch(near, x), branch(whole, x), rtol=0, atol=1e-12)


def test_with_a_neighbourhood_a_tile_equals_its_part_of_the_image(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    cab = perturb_parameters(CAB(small_config(cab_neighbourhood=3)))
    x = features(height=32, width=32)
    tile = branch(cab, x[:, 8:28, 4:28])
    # Two windows of context: one for the average, and one that holds the pixels the convolutions read beyond it.
    torch.testing.assert_close(tile[:, 8:-8, 8:-8], branch(cab, x)[:, 16:20, 12:20], rtol=0, atol=1e-12)


def test_the_widths_of_cab_follow_its_settings(small_config: Small) -> None:
    cab = CAB(small_config(cab_compress=2, cab_squeeze=6))
    assert (cab.compress.out_channels, cab.expand.in_channels) == (6, 6)
    assert (cab.squeeze.out_features, cab.excite.in_features) == (2, 2)


# The block


@pytest.mark.parametrize("shift", [0, 2])
def test_hab_is_its_formula(shift: int, small_config: Small, perturb_parameters: PerturbParameters) -> None:
    hab = perturb_parameters(HAB(small_config(), shift, drop_path=0.0))
    x = features()
    torch.testing.assert_close(hab(x), hybrid_attention(hab, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mlp_ratio", "hidden"), [(2.0, 24), (1.5, 18), (4, 48)])
def test_the_width_of_the_mlp_follows_its_ratio(mlp_ratio: float, hidden: int, small_config: Small) -> None:
    mlp = HAB(small_config(mlp_ratio=mlp_ratio), 0, 0.0).mlp
    assert (mlp.expand.out_features, mlp.contract.in_features) == (hidden, hidden)


def test_cab_scale_is_the_weight_of_the_channel_branch(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    x = features()
    light, heavy = (perturb_parameters(HAB(small_config(cab_scale=scale), 0, 0.0)) for scale in (0.01, 1.0))
    for hab in (light, heavy):
        hab.load_state_dict(heavy.state_dict())
        with torch.no_grad():  # leaves only the channel branch in the output
            for silenced in (hab.proj, hab.mlp.contract):
                silenced.weight.zero_()
                silenced.bias.zero_()
    torch.testing.assert_close(heavy(x) - x, 100 * (light(x) - x), rtol=0, atol=1e-10)
    assert not torch.allclose(heavy(x), x), "the channel branch does nothing"


def test_images_of_a_batch_do_not_affect_each_other_in_hab(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    hab = perturb_parameters(HAB(small_config(), 2, 0.0))
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


def test_hab_in_training_drops_its_branches_independently(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    hab = perturb_parameters(HAB(small_config(), 0, drop_path=0.5)).train()
    x = features(1).expand(64, -1, -1, -1)
    outcomes = [hybrid_attention(hab, x[:1], *weights)[0] for weights in itertools.product((0.0, 2.0), repeat=2)]
    seen = [
        [index for index, outcome in enumerate(outcomes) if torch.allclose(sample, outcome, rtol=0, atol=1e-10)]
        for sample in hab(x)
    ]
    assert all(len(indices) == 1 for indices in seen), "a sample matches none of the four ways to drop branches"
    assert {indices[0] for indices in seen} == {0, 1, 2, 3}


def test_hab_in_evaluation_drops_nothing(small_config: Small, perturb_parameters: PerturbParameters) -> None:
    hab = perturb_parameters(HAB(small_config(), 0, drop_path=0.5))
    x = features()
    torch.testing.assert_close(hab(x), hybrid_attention(hab, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("overlap", "key_window"), [(0.5, 6), (0.0, 4), (1.0, 8)])
def test_ocab_is_its_formula(
    overlap: float, key_window: int, small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    ocab = perturb_parameters(OCAB(small_config(overlap=overlap)))
    x = features()

    normed = F.layer_norm(x, (12,), ocab.norm_attention.weight, ocab.norm_attention.bias)
    q, k, v = F.linear(normed, ocab.qkv.weight, ocab.qkv.bias).chunk(3, dim=-1)
    attended = ops.overlapping_window_attention(
        q, torch.cat((k, v), dim=-1), ocab.bias_table, window=4, key_window=key_window
    )
    middle = x + F.linear(attended, ocab.proj.weight, ocab.proj.bias)
    normed = F.layer_norm(middle, (12,), ocab.norm_mlp.weight, ocab.norm_mlp.bias)
    hidden = F.gelu(F.linear(normed, ocab.mlp.expand.weight, ocab.mlp.expand.bias))
    expected = middle + F.linear(hidden, ocab.mlp.contract.weight, ocab.mlp.contract.bias)

    torch.testing.assert_close(ocab(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("overlap", "rows"), [(0.5, 81), (0.0, 49), (1.0, 121)])
def test_the_bias_table_has_a_row_for_every_offset(overlap: float, rows: int, small_config: Small) -> None:
    assert OCAB(small_config(overlap=overlap)).bias_table.shape == (rows, 2)


def test_keys_outside_the_image_are_zero_whatever_the_bias_of_qkv(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    ocab = perturb_parameters(OCAB(small_config()))
    with torch.no_grad():
        ocab.qkv.weight.zero_()
        ocab.qkv.bias.zero_()
        ocab.qkv.bias[24:] = 1.0  # v = 1 inside the image, whatever the features
        ocab.bias_table.zero_()
        ocab.proj.weight.copy_(torch.eye(12))
        ocab.proj.bias.zero_()
        ocab.mlp.contract.weight.zero_()
        ocab.mlp.contract.bias.zero_()
    x = features(1, 4, 4)
    share = torch.full_like(x, 16 / 36)  # of 36 keys 16 lie inside; padding before the projection would make it 1
    torch.testing.assert_close(ocab(x) - x, share)


def test_a_pixel_reaches_the_windows_whose_keys_hold_it(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    ocab = perturb_parameters(OCAB(small_config()))
    x = features(1)
    changed = x.clone()
    changed[0, 3, 5] += torch.randn(12)  # last row of the first windows, one margin away from the second row
    reached = (ocab(x) != ocab(changed)).any(dim=-1)[0]
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[:, 4:8] = True
    assert torch.equal(reached, expected), f"it reaches\n{reached.int()}"


def test_images_of_a_batch_do_not_affect_each_other_in_ocab(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    ocab = perturb_parameters(OCAB(small_config()))
    x = features(3)
    torch.testing.assert_close(ocab(x)[1:2], ocab(x[1:2]), rtol=0, atol=1e-12)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    mu = torch.randn(2, 8, 12, 6, dtype=torch.float64)
    severity = 2 * torch.rand(2, 8, 12, dtype=torch.float64)
    return x, mu, severity


def stages_run_by(group: DARHAG, *arguments: Tensor | None) -> list[nn.Module]:
    """Return the blocks in the order in which a forward pass calls them."""
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in group.modules()
        if isinstance(module, DSCA | HAB | OCAB) or module is group.conv
    ]
    group(*arguments)
    for hook in hooks:
        hook.remove()
    return called


def test_a_dsca_comes_before_every_hab_and_before_the_ocab(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0] * 3).double()
    kinds = [type(module).__name__ for module in stages_run_by(group, *inputs())]
    assert kinds == ["DSCA", "HAB"] * 3 + ["DSCA", "OCAB", "ChannelsLastConv2d"]


def test_without_a_degradation_code_the_group_is_that_of_hat(small_config: Small) -> None:
    group = DARHAG(small_config(degradation_code="none"), [0.0] * 3).double()
    x, _, _ = inputs()
    kinds = [type(module).__name__ for module in stages_run_by(group, x, None, None)]
    assert kinds == ["HAB"] * 3 + ["OCAB", "ChannelsLastConv2d"]
    assert not any("dsca" in name for name, _ in group.named_parameters())


def test_the_group_applies_its_stages_in_order_and_adds_the_residual(
    small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    group = perturb_parameters(DARHAG(small_config(), [0.0, 0.0]))
    x, mu, severity = inputs()
    features = x
    for dsca, block in zip(group.dscas, [*group.habs, group.ocab], strict=True):
        features = block(dsca(features, mu, severity))
    expected = x + group.conv(features)
    torch.testing.assert_close(group(x, mu, severity), expected, rtol=0, atol=1e-12)


def test_windows_shift_in_every_second_block_and_dsca_takes_the_other_partition(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0] * 4)
    assert [hab.shift for hab in group.habs] == [0, 2, 0, 2]
    assert [dsca.shift for dsca in group.dscas] == [2, 0, 2, 0, 2], "the last one stands before the unshifted OCAB"


def test_every_dsca_has_its_own_parameters(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0] * 2)
    owned = [parameter for dsca in group.dscas for parameter in dsca.parameters()]
    assert len({id(parameter) for parameter in owned}) == len(owned)
    assert len(list(group.parameters())) == len({id(parameter) for parameter in group.parameters()})


def test_drop_paths_go_to_the_habs_in_order(small_config: Small) -> None:
    group = DARHAG(small_config(), [0.0, 0.1, 0.3])
    assert [hab.drop_path.probability for hab in group.habs] == [0.0, 0.1, 0.3]


@pytest.mark.parametrize("code", ["variational", "none"])
def test_a_group_whose_convolution_is_zero_is_the_identity(
    code: str, small_config: Small, perturb_parameters: PerturbParameters
) -> None:
    group = perturb_parameters(DARHAG(small_config(degradation_code=code), [0.0]))
    with torch.no_grad():
        group.conv.weight.zero_()
        group.conv.bias.zero_()
    x, mu, severity = inputs()
    out = group(x, mu, severity) if code == "variational" else group(x, None, None)
    assert torch.equal(out, x)
