"""Uformer of spandrel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import check_network, drawn
from copies import renamed
from gradients import check_gradients
from spandrel_import import architecture
from torch import Tensor, nn

from savl.accelerate import accelerate

DEPTHS = [2, 1, 1, 1, 1, 1, 1, 1, 2]


class OverImages(nn.Module):
    """A block of Uformer, called with images instead of tokens."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        kind: Any = architecture("Uformer", "Uformer").LeWinTransformerBlock
        self.block = kind(**{"dim": 8, "input_resolution": (16, 16), "num_heads": 2, "win_size": 4, **settings})

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.block(x.flatten(2).mT.contiguous())
        return tokens.mT.reshape(x.shape)


def block(**settings: Any) -> Any:
    return drawn(OverImages(**settings))


def test_uformer_computes_the_same() -> None:
    sizes = {"img_size": 64, "embed_dim": 8, "depths": DEPTHS, "num_heads": [1, 2, 2, 2, 2, 2, 2, 2, 2]}
    network = drawn(architecture("Uformer", "Uformer").Uformer(**sizes, win_size=4, modulator=True), 0.05)
    report = check_network(network, sum(DEPTHS), ((1, 64, 64), (2, 64, 64)), gradients=False)
    assert "shift 2" in str(report)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift_size": 2, "modulator": True, "qkv_bias": False},
        {"shift_size": 1, "modulator": True, "token_mlp": "fastleff"},
        {"shift_size": 2, "token_mlp": "mlp"},
    ],
)
def test_a_block_computes_the_same(settings: dict[str, object]) -> None:
    check_network(block(**settings), 1, ((1, 16, 16), (2, 8, 8), (1, 4, 4)), 8, gradients=False)
    check_gradients(block(**settings), 1, (2, 8, 8), 8)


def test_stochastic_depth_in_training_is_that_of_the_original() -> None:
    check_gradients(block(drop_path=0.5, modulator=True).train(), 1, (4, 8, 8), 8)


def test_a_copy_with_other_names_of_classes_is_served() -> None:
    check_network(renamed(block()), 1, ((1, 16, 16),), 8, gradients=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"qk_scale": 0.25}, "its scale is 0.25 instead of 1/sqrt(4)"),
        ({"token_projection": "conv"}, "its projections are no plain linear layers"),
        ({"cross_modulator": True}, "it has attention to a modulator"),
        ({"token_mlp": "mlp", "norm_layer": nn.Identity}, "its norms are of other kinds"),
    ],
)
def test_another_structure_is_left_alone(settings: dict[str, object], reason: str) -> None:
    report = accelerate(block(**settings))
    assert report.served == 0
    assert reason in str(report)


def test_a_call_with_a_mask_falls_back() -> None:
    made = block(shift_size=2).block
    report = accelerate(made)
    tokens, mask = torch.randn(1, 64, 8), (torch.rand(1, 1, 8, 8) > 0.5).float()
    with torch.no_grad():
        mine = made(tokens, mask)
        assert report.calls() == (0, {"it is called with a mask": 1})
        report.undo()
        assert torch.equal(mine, made(tokens, mask))
