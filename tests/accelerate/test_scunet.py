"""SCUNet of spandrel: its blocks, and the Swin blocks in them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import check_network, drawn
from copies import renamed
from gradients import check_gradients
from spandrel_import import architecture
from torch import Tensor, nn

from savl.accelerate import accelerate

DEPTHS = [2, 1, 1, 1, 1, 1, 2]


def block(kind: str = "SW", *, resolution: int = 32, drop_path: float = 0.0) -> Any:
    """A small block; the sizes of a whole network are fixed."""
    made: Any = architecture("SCUNet", "SCUNet").ConvTransBlock(6, 8, 4, 4, drop_path, kind, resolution)
    return drawn(made)


def test_scunet_computes_the_same() -> None:
    network = drawn(architecture("SCUNet", "SCUNet").SCUNet(config=DEPTHS, dim=64), 0.04)
    report = check_network(network, sum(DEPTHS), sizes=((1, 64, 64), (2, 33, 70)), gradients=False)
    assert "shift 4" in str(report)


@pytest.mark.parametrize(
    ("kind", "resolution", "shifted"), [("W", 32, False), ("SW", 32, True), ("SW", 4, False)], ids=["W", "SW", "small"]
)
def test_a_block_computes_the_same(kind: str, resolution: int, shifted: bool) -> None:
    sizes = ((1, 8, 8), (2, 12, 8), (1, 4, 16), (1, 4, 4))
    report = check_network(block(kind, resolution=resolution), 1, sizes, 14, gradients=False)
    assert ("shift 2" in str(report)) == shifted
    check_gradients(block(kind, resolution=resolution), 1, (2, 12, 8), 14)


def test_stochastic_depth_in_training_is_that_of_the_original() -> None:
    check_gradients(block(drop_path=0.5).train(), 1, (4, 8, 8), 14)


def test_bfloat16_computes_the_same() -> None:
    check_network(block().bfloat16(), 1, ((2, 8, 12),), 14, gradients=False)


def test_a_copy_with_other_names_of_classes_is_served() -> None:
    check_network(renamed(block()), 1, ((1, 8, 12),), 14, gradients=False)


def test_the_swin_block_alone_is_served_where_the_convolutions_are_others() -> None:
    made = block()
    made.conv_block[1] = nn.SiLU()
    report = check_network(made, 1, ((1, 8, 12),), 14, gradients=False)
    assert [each.name for each in report.blocks] == ["trans_block"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: setattr(made.trans_block.msa, "scale", 1.0), "its scale is 1 instead of 1/sqrt(4)"),
        (lambda made: setattr(made, "conv1_1", nn.Conv2d(14, 14, 1, groups=2)), "its convolutions are of another kind"),
        (lambda made: made.trans_block.mlp.append(nn.Identity()), "its norms or its MLP are of other kinds"),
        (lambda made: setattr(made.trans_block.msa, "type", "other"), "its attention is of another kind"),
    ],
)
def test_a_changed_structure_is_left_alone(change: Any, reason: str) -> None:
    made = block()
    change(made)
    report = accelerate(made)
    assert report.served == 0
    assert reason in str(report)


def test_an_image_that_windows_do_not_cover_falls_back() -> None:
    made = block()
    report = accelerate(made)
    with pytest.raises(Exception, match="Shape mismatch"):  # by einops: the block itself does not pad
        made(torch.rand(1, 14, 6, 8))
    assert report.calls() == (0, {"windows do not cover the image": 1})


def test_features_in_either_layout_are_taken() -> None:
    made = block()
    original = copy.deepcopy(made)
    accelerate(made)
    x: Tensor = torch.randn(2, 14, 8, 12)
    with torch.no_grad():
        expected = original(x)
        for each in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
            assert torch.allclose(made(each), expected, rtol=1e-4, atol=1e-4)
