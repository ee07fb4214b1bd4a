"""Networks of Swin blocks: SwinIR and DRCT of spandrel."""

from __future__ import annotations

import pytest
import torch
from checks import check_network, drawn
from spandrel_import import architecture
from torch import nn

from savl.accelerate import accelerate


def swinir(**settings: object) -> nn.Module:
    sizes = {"img_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 8, "upscale": 2}
    network: nn.Module = architecture("SwinIR", "SwinIR").SwinIR(**{**sizes, "upsampler": "pixelshuffle", **settings})
    return drawn(network)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "window_size": 7,
            "img_size": 21,
            "num_heads": [3],
            "resi_connection": "3conv",
            "upsampler": "nearest+conv",
            "upscale": 4,
        },
        {"img_size": 8, "upsampler": "pixelshuffledirect"},  # windows as large as img_size are never shifted
        {"in_chans": 1, "upsampler": "", "upscale": 1, "qkv_bias": False, "ape": False},
    ],
    ids=["window 8", "window 7", "no shift", "gray"],
)
def test_swinir_computes_the_same(settings: dict[str, object]) -> None:
    check_network(swinir(**settings), 2, channels=int(str(settings.get("in_chans", 3))))


def test_drct_computes_the_same() -> None:
    settings = {"img_size": 16, "embed_dim": 12, "depths": [6], "num_heads": [2], "window_size": 8, "gc": 4}
    network = architecture("DRCT", "drct_arch").DRCT(**settings, upscale=2, mlp_ratio=2, upsampler="pixelshuffle")
    check_network(drawn(network, 0.05), 5, sizes=((1, 16, 16), (2, 16, 24)))


def test_swinir_in_bfloat16_computes_the_same_as_far_as_it_runs() -> None:
    network = swinir().bfloat16()
    check_network(network, 2, sizes=((1, 16, 16),), gradients=False)


def test_a_scale_of_its_own_is_left_alone() -> None:
    report = accelerate(swinir(qk_scale=0.5))
    assert report.served == 0
    assert "its scale is 0.5" in str(report)


def test_another_order_of_the_index_is_left_alone() -> None:
    network = swinir()
    for module in network.modules():
        if hasattr(module, "relative_position_index"):
            module.relative_position_index = module.relative_position_index.T.contiguous()
    report = accelerate(network)
    assert report.served == 0
    assert "its index of relative positions has another order" in str(report)


def test_attention_dropout_in_training_falls_back() -> None:
    network = swinir(attn_drop_rate=0.5).train()
    report = accelerate(network)
    with torch.no_grad():
        network(torch.rand(1, 3, 16, 16))
    served, fallen_back = report.calls()
    assert served == 0
    assert fallen_back["dropout is active"] == 2
