"""Swin2SR of spandrel: Swin blocks with cosine attention."""

from __future__ import annotations

import pytest
import torch
from checks import SIZES, check_network, drawn
from copies import renamed
from gradients import check_gradients
from spandrel_import import architecture
from torch import nn

from savl.accelerate import accelerate


def swin2sr(**settings: object) -> nn.Module:
    sizes = {"img_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 8, "upscale": 2}
    more = {"upsampler": "pixelshuffle", "drop_path_rate": 0.0}
    return drawn(architecture("Swin2SR", "Swin2SR").Swin2SR(**{**sizes, **more, **settings}))


def scales(network: nn.Module) -> list[nn.Parameter]:
    return [each for name, each in network.named_parameters() if name.endswith("logit_scale")]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": 14, "window_size": 7, "num_heads": [3], "upsampler": "pixelshuffle_aux"},
        {"img_size": 8, "upsampler": "pixelshuffledirect"},  # windows as large as img_size are never shifted
        {"qkv_bias": False, "upsampler": "pixelshuffledirect"},
    ],
    ids=["window 8", "window 7", "no shift", "no bias"],
)
def test_swin2sr_computes_the_same(settings: dict[str, object]) -> None:
    check_network(swin2sr(**settings), 2, gradients=not settings)
    for size in SIZES[1:]:
        check_gradients(swin2sr(**settings), 2, size)


def test_scales_above_the_largest_are_clamped() -> None:
    network = swin2sr()
    with torch.no_grad():
        for scale in scales(network):
            scale[0] = 6.0
    check_gradients(network, 2, (1, 16, 16))


def test_swin2sr_in_training_mode_passes_the_proof_with_gradients() -> None:
    check_network(swin2sr().train(), 2, sizes=((1, 16, 16),), gradients=False)


def test_drop_path_in_training_drops_the_normalised_branches() -> None:
    network = swin2sr(drop_path_rate=0.5).train()
    report = accelerate(network, verify=False)
    image = torch.rand(4, 3, 16, 16)
    torch.manual_seed(1)
    mine = network(image)
    assert report.calls() == (2, {})
    report.undo()
    torch.manual_seed(1)
    torch.testing.assert_close(mine, network(image), rtol=1e-4, atol=1e-4)


def test_a_changed_table_shows_at_once() -> None:
    """The bias table is kept between calls, also between those in and outside of autocast."""
    network = swin2sr()
    report = accelerate(network)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            network(image)
        before = network(image)
        for name, parameter in network.named_parameters():
            if "cpb_mlp" in name:
                parameter *= 2
        after = network(image)
        report.undo()
        expected = network(image)
    assert not torch.allclose(before, after, rtol=1e-3)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_networks_made_or_called_in_inference_mode_are_served() -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            network, image = swin2sr(), torch.rand(1, 3, 16, 16)
        with torch.inference_mode():
            expected = network(image)
            report = accelerate(network)
            for _ in range(2):
                torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-4)
        assert report.calls() == (4, {})


def test_copies_with_other_names_of_classes_are_served() -> None:
    check_network(renamed(swin2sr()), 2, sizes=((1, 16, 16),), gradients=False)


def test_an_unknown_mask_is_left_alone() -> None:
    network = swin2sr()
    for name, mask in network.named_buffers():
        if name.endswith("attn_mask"):
            mask *= 0.1
    report = accelerate(network)
    assert report.served == 1
    assert "its mask is unknown" in str(report)


def test_the_same_modules_with_another_forward_do_not_pass_the_proof() -> None:
    network = swin2sr()
    for module in network.modules():
        if hasattr(module, "shift_size"):
            original = type(module)
            forward = lambda block, x, size, original=original: original.forward(block, 2 * x, size)  # noqa: E731
            module.__class__ = type("Doubled", (original,), {"forward": forward})
    report = accelerate(network)
    assert report.served == 0
    assert "it does not compute the same" in str(report)
