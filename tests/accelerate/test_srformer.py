"""SRFormer of spandrel_extra_arches: permuted self-attention."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from checks import SIZES, check_network, drawn
from copies import renamed
from gradients import check_gradients
from spandrel_import import spandrel
from torch import nn

from savl.accelerate import accelerate


def srformer(**settings: object) -> nn.Module:
    spandrel()
    pytest.importorskip("spandrel_extra_arches", reason="spandrel_extra_arches is not installed")
    module = import_module("spandrel_extra_arches.architectures.SRFormer.__arch.SRFormer")
    sizes = {"img_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 8, "upscale": 2}
    more = {"upsampler": "pixelshuffle", "drop_path_rate": 0.0, "mlp_ratio": 2}
    return drawn(module.SRFormer(**{**sizes, **more, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_size": 4, "num_heads": [3], "upsampler": "pixelshuffledirect"},
        {"img_size": 8, "upsampler": "pixelshuffledirect"},  # windows as large as img_size are never shifted
        {"qkv_bias": False, "resi_connection": "3conv"},
    ],
    ids=["window 8", "window 4", "no shift", "no bias"],
)
def test_srformer_computes_the_same(settings: dict[str, object]) -> None:
    check_network(srformer(**settings), 2, gradients=not settings)
    for size in SIZES[1:]:
        check_gradients(srformer(**settings), 2, size)


def test_windows_of_24_with_12_keys() -> None:
    """The sizes of the published networks."""
    network = srformer(img_size=48, window_size=24)
    report = check_network(network, 2, sizes=((1, 48, 48), (1, 20, 30)), gradients=False)
    assert "window 24, shift 12, 2 heads of 6, key window 12" in str(report)


def test_srformer_in_training_mode_passes_the_proof_with_gradients() -> None:
    check_network(srformer().train(), 2, sizes=((1, 16, 16),), gradients=False)


def test_drop_path_in_training_drops_the_same_branches() -> None:
    network = srformer(drop_path_rate=0.5).train()
    report = accelerate(network, verify=False)
    image = torch.rand(4, 3, 16, 16)
    torch.manual_seed(1)
    mine = network(image)
    assert report.calls() == (2, {})
    report.undo()
    torch.manual_seed(1)
    torch.testing.assert_close(mine, network(image), rtol=1e-4, atol=1e-4)


def test_copies_with_other_names_of_classes_are_served() -> None:
    check_network(renamed(srformer()), 2, sizes=((1, 16, 16),), gradients=False)


def test_a_shift_of_half_a_key_is_left_alone() -> None:
    """The published windows of 22 pixels are shifted by 11, and their masks divide no key."""
    report = accelerate(srformer(img_size=20, window_size=10))
    assert report.served == 1
    assert "its window and its shift are no whole numbers of keys" in str(report)


def test_an_unknown_mask_is_left_alone() -> None:
    network = srformer()
    for name, mask in network.named_buffers():
        if name.endswith("attn_mask"):
            mask *= 0.1
    report = accelerate(network)
    assert report.served == 1
    assert "its mask is unknown" in str(report)
