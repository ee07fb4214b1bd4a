"""DAT, RGT and CRAFT of spandrel: rectangular windows on halves of the channels, and the other blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check_network, drawn
from spandrel_import import architecture
from torch import Tensor, nn

from savl.accelerate import accelerate
from savl.accelerate.parts import swin_mask

SIZES = ((1, 16, 16), (2, 24, 16), (1, 17, 21))
"""Batch, height and width; RGT reduces images to a sixteenth."""


def dat(**settings: Any) -> nn.Module:
    sizes = {"img_size": 16, "embed_dim": 64, "depth": [3], "num_heads": [4], "split_size": [4, 8]}
    rates = {"expansion_factor": 2.0, "drop_path_rate": 0.0}
    return _drawn(architecture("DAT", "DAT").DAT(**{**sizes, **rates, **settings}))


def rgt(**settings: Any) -> nn.Module:
    sizes = {"img_size": 16, "embed_dim": 64, "depth": [3], "num_heads": [4], "split_size": [4, 8]}
    rates = {"mlp_ratio": 2.0, "drop_path_rate": 0.0}
    return _drawn(architecture("RGT", "rgt").RGT(**{**sizes, **rates, **settings}))


def craft(**settings: Any) -> nn.Module:
    sizes = {"embed_dim": 32, "depths": [1], "num_heads": [2], "split_size_0": 4, "split_size_1": 8, "upscale": 2}
    return _drawn(architecture("CRAFT", "CRAFT").CRAFT(**{**sizes, **settings}))


NETWORKS = pytest.mark.parametrize(("make", "blocks"), [(dat, 3), (rgt, 3), (craft, 4)], ids=["dat", "rgt", "craft"])


def _drawn(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
    return drawn(network)


def check_float64(network: nn.Module, blocks: int, size: tuple[int, int, int] = (2, 17, 21)) -> None:
    """Compare output, gradients and buffers of an accelerated network with the original's, in its mode, in float64.

    The bound is relative to the largest gradient, because that of a bias before a batch norm is 0 but for rounding. For
    the same reason the proof cannot compare gradients in float64.
    """
    original = copy.deepcopy(network.double())
    report = accelerate(network, verify=False)
    assert report.served == blocks, report
    ours, theirs = (_results(each, size) for each in (network, original))
    assert report.calls() == (blocks, {}), report
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-11 * largest, name
    for (name, ours_buffer), theirs_buffer in zip(network.named_buffers(), original.buffers(), strict=True):
        assert torch.allclose(ours_buffer.double(), theirs_buffer.double(), rtol=1e-10), name


def _results(network: nn.Module, size: tuple[int, int, int]) -> dict[str, Tensor]:
    image = torch.rand(size[0], 3, *size[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    image.requires_grad_()
    torch.manual_seed(1)
    out = network(image)
    wanted = {"image": image} | dict(network.named_parameters())
    gradients = torch.autograd.grad(out.square().mean(), list(wanted.values()), allow_unused=True)
    found = {name: each for name, each in zip(wanted, gradients, strict=True) if each is not None}
    return {"output": out.detach()} | found


@NETWORKS
def test_it_computes_the_same(make: Callable[..., nn.Module], blocks: int) -> None:
    report = check_network(make(), blocks, SIZES, gradients=False)
    assert "shift 2x4" in str(report)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dat(split_size=[2, 8], qkv_bias=False, resi_connection="3conv", depth=[1] * 3, num_heads=[4] * 3),
        lambda: dat(split_size=[4, 4], upsampler="pixelshuffledirect", depth=[3]),
        lambda: rgt(c_ratio=0.25, qkv_bias=False, depth=[2, 1], num_heads=[4, 4]),
    ],
    ids=["dat 2x8", "dat 4x4", "rgt c_ratio"],
)
def test_other_settings_compute_the_same(make: Callable[[], nn.Module]) -> None:
    check_network(make(), 3, SIZES[1:], gradients=False)


@NETWORKS
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradients_are_the_same(make: Callable[..., nn.Module], blocks: int, training: bool) -> None:
    check_float64(make().train(training), blocks)


@pytest.mark.parametrize("make", [dat, rgt])
def test_stochastic_depth_in_training_is_that_of_the_original(make: Callable[..., nn.Module]) -> None:
    check_float64(make(drop_path_rate=0.5).train(), 3, (4, 16, 16))


@NETWORKS
def test_bfloat16_computes_the_same(make: Callable[[], nn.Module], blocks: int) -> None:
    if make is rgt:  # its masks are float32, so it does not run itself where windows are shifted
        make, blocks = (lambda: rgt(depth=[2])), 2
    check_network(make().bfloat16(), blocks, ((1, 16, 16),), gradients=False)


@NETWORKS
def test_autocast_computes_the_same(make: Callable[..., nn.Module], blocks: int) -> None:
    network = make()
    original, image = copy.deepcopy(network), torch.rand(1, 3, 16, 24)
    report = accelerate(network)
    with torch.no_grad():
        exact = original(image)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = network(image), original(image)
        assert torch.allclose(network(image), exact, atol=1e-4)  # nothing that was kept is of autocast
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert report.calls() == (2 * blocks, {})


@NETWORKS
def test_a_copy_with_other_names_of_classes_is_served(make: Callable[..., nn.Module], blocks: int) -> None:
    network = make()
    for name, module in network.named_modules():
        if name and type(module).__module__.startswith("spandrel") and "DropPath" not in type(module).__name__:
            module.__class__ = type("Renamed", (type(module),), {})
    check_network(network, blocks, SIZES[:1], gradients=False)


@NETWORKS
def test_what_was_kept_follows_parameters_and_statistics(make: Callable[..., nn.Module], blocks: int) -> None:
    network, image = make(), torch.rand(1, 3, 16, 16)
    accelerate(network)
    with torch.no_grad():
        network(image)
        for each in (*network.parameters(), *(b for name, b in network.named_buffers() if "running" in name)):
            each.mul_(1.1)
        ours = network(image)
        original = make()
        original.load_state_dict(network.state_dict())
        assert torch.allclose(ours, original(image), rtol=1e-4, atol=1e-4)


@NETWORKS
def test_copies_and_pickles_compute_the_same(make: Callable[..., nn.Module], blocks: int) -> None:
    network, image = make(), torch.rand(1, 3, 16, 16)
    keys = list(network.state_dict())
    accelerate(network)
    with torch.no_grad():
        expected = network(image)
        assert torch.equal(copy.deepcopy(network)(image), expected)
        assert torch.equal(pickle.loads(pickle.dumps(network))(image), expected)
    assert list(network.state_dict()) == keys


@pytest.mark.parametrize("make", [dat, rgt])
def test_dropout_in_training_falls_back(make: Callable[..., nn.Module]) -> None:
    network = make(attn_drop_rate=0.5).train()
    report = accelerate(network, verify=False)
    network(torch.rand(2, 3, 16, 16))
    assert report.calls() == (0, {"dropout is active": 3})


def _first(network: nn.Module, name: str) -> Any:
    """The first module of a network that has an attribute of this name."""
    return next(module for module in network.modules() if hasattr(module, name))


def _turn_index(network: nn.Module) -> None:
    index = _first(network, "relative_position_index")
    index.relative_position_index = index.relative_position_index.T.contiguous()


def _turn_indices(network: Any) -> None:
    network.relative_position_index_h = network.relative_position_index_h.T.contiguous()


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (dat, lambda made: None, None),
        (dat, _turn_index, "its index of relative positions has another order"),
        (dat, lambda made: setattr(_first(made, "rpe_biases"), "scale", 1.0), "its scale is 1 instead of 1/sqrt(16)"),
        (dat, lambda made: _first(made, "attn_mask_0").dwconv.append(nn.Identity()), "its convolution is of another"),
        (dat, lambda made: setattr(_first(made, "sg").sg, "norm", nn.Identity()), "its norms or its MLP are of other"),
        (dat, lambda made: setattr(_first(made, "sg"), "act", nn.Tanhshrink()), "its layer ffn.act is of another kind"),
        (rgt, lambda made: setattr(_first(made, "get_v"), "get_v", nn.Conv2d(64, 64, 1)), "its convolution is of"),
        (rgt, lambda made: setattr(_first(made, "reduction1"), "k", nn.Identity()), "its projections are no plain"),
        (craft, _turn_indices, "its index of relative positions has another order"),
        (craft, lambda made: setattr(_first(made, "H_sp"), "flash_attn", True), "its attention has no bias"),
        (craft, lambda made: setattr(_first(made, "last_fc"), "act", nn.Tanh()), "its layers are of other kinds"),
        (craft, lambda made: setattr(_first(made, "kv"), "q", nn.Conv2d(32, 32, 3, padding=1)), "its projections are"),
    ],
)
def test_a_changed_structure_is_left_alone(
    make: Callable[..., nn.Module], change: Callable[[nn.Module], None], reason: str | None
) -> None:
    network = make()
    change(network)
    report = accelerate(network)
    left = [block.reason for block in report.blocks if block.served is None]
    assert all(str(each).startswith(str(reason)) for each in left), report
    assert bool(left) == (reason is not None), report


def test_the_mask_of_another_network_is_left_alone() -> None:
    network = dat()
    shifted: Any = next(each for each in network.modules() if getattr(each, "attn_mask_0", None) is not None)
    shifted.attn_mask_0 = shifted.attn_mask_0 * 2
    assert "its mask is unknown" in str(accelerate(network))


def test_masks_of_craft_are_recognised() -> None:
    network: Any = craft()
    block = network.layers[0].residual_group.srwa_blocks[1]
    original, report = copy.deepcopy(block), accelerate(network)
    position = {
        "rpi_sa_h": network.relative_position_index_h,
        "rpi_sa_v": network.relative_position_index_v,
        "biases_h": network.biases_h,
        "biases_v": network.biases_v,
    }
    masks = [swin_mask(16, 16, window, shift).float() for window, shift in (((4, 8), (2, 4)), ((8, 4), (4, 2)))]
    tokens = torch.randn(2, 256, 32)
    turned = {**position, "rpi_sa_h": position["rpi_sa_h"].T.contiguous()}
    with torch.no_grad():
        for arguments in (
            ((16, 16), position, masks),
            ((16, 16), position, (None, None)),
            ((16, 16), position, (masks[0], masks[1] / 2)),
            ((16, 16), turned, masks),
        ):
            assert torch.allclose(block(tokens, *arguments), original(tokens, *arguments), rtol=1e-4, atol=1e-4)
    reasons = {"its mask is unknown": 1, "its relative positions are unknown": 1}
    assert report.calls() == (2, reasons)
