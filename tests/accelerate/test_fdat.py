"""FDAT of spandrel: its spatial and its channel blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import check_network, drawn
from copies import renamed
from gradients import check_gradients
from spandrel_import import architecture
from torch import nn

from savl.accelerate import accelerate

SPATIAL = {"group_block_pattern": ["spatial"], "depth_per_group": 2}


def fdat(**settings: object) -> Any:
    sizes = {"embed_dim": 16, "num_groups": 1, "depth_per_group": 1, "num_heads": 2, "aim_reduction_ratio": 4}
    more = {"scale": 2, "drop_path_rate": 0.0, "upsampler_type": "pixelshuffledirect"}
    network: nn.Module = architecture("FDAT", "fdat").FDAT(**{**sizes, **more, **settings})
    return drawn(network)


def block(kind: str = "spatial") -> Any:
    return next(each for each in fdat().modules() if getattr(each, "btype", None) == kind)


@pytest.mark.parametrize("settings", [{}, {"window_size": 4, **SPATIAL}])
def test_fdat_computes_the_same(settings: dict[str, object]) -> None:
    check_network(fdat(**settings), 2, gradients=False)


@pytest.mark.parametrize("size", [(2, 16, 8), (2, 13, 10)])
def test_gradients_are_those_of_the_original(size: tuple[int, int, int]) -> None:
    check_gradients(fdat(), 2, size)


def test_stochastic_depth_in_training_is_that_of_the_original() -> None:
    check_gradients(fdat(drop_path_rate=0.5).train(), 2, (4, 8, 9))


def test_bfloat16_computes_the_same() -> None:
    check_network(fdat().bfloat16(), 2, ((2, 16, 24),), gradients=False)


def test_a_copy_with_other_names_of_classes_is_served() -> None:
    check_network(renamed(fdat()), 2, ((1, 13, 16),), gradients=False)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("spatial", lambda made: setattr(made.attn, "scale", 1.0), "its scale is 1 instead of 1/sqrt(8)"),
        ("spatial", lambda made: setattr(made.ffn, "act", nn.SiLU()), "its feed-forward layers are of other kinds"),
        ("spatial", lambda made: delattr(made.inter, "sg"), "its convolutions are of another kind"),
        ("spatial", lambda made: setattr(made.attn, "ws", 4), "its bias has another shape"),
        ("channel", lambda made: setattr(made.attn, "nh", 4), "its attention is of another kind"),
        ("channel", lambda made: setattr(made, "n1", nn.GroupNorm(1, 16)), "its norms or its feed-forward layers are"),
    ],
)
def test_a_changed_structure_is_left_alone(kind: str, change: Any, reason: str) -> None:
    made = block(kind)
    change(made)
    report = accelerate(made)
    assert report.served == 0
    assert reason in str(report)


def test_dropout_in_training_falls_back() -> None:
    made = block().train()
    report = accelerate(made)
    made.ffn.drop.p = 0.5
    with torch.no_grad():
        made(torch.rand(2, 64, 16), 8, 8)
    assert report.calls() == (0, {"dropout is active": 1})
