"""HAT of spandrel: its blocks HAB and OCAB."""

from __future__ import annotations

import pytest
import torch
from checks import check_network, drawn
from spandrel_import import architecture
from torch import nn

from savl.accelerate import accelerate


def hat(**settings: object) -> nn.Module:
    sizes = {"img_size": 16, "embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 8, "squeeze_factor": 4}
    more = {"compress_ratio": 3, "overlap_ratio": 0.5, "upscale": 2, "mlp_ratio": 2, "upsampler": "pixelshuffle"}
    network: nn.Module = architecture("HAT", "HAT").HAT(**{**sizes, **more, **settings})
    return drawn(network)


@pytest.mark.parametrize("settings", [{}, {"window_size": 4, "overlap_ratio": 1.0, "num_heads": (3,), "upscale": 4}])
def test_hat_computes_the_same(settings: dict[str, object]) -> None:
    check_network(hat(**settings), 3)


def test_a_mask_that_is_no_shift_mask_falls_back() -> None:
    network = hat()
    report = accelerate(network)
    block = next(each for each in network.modules() if hasattr(each, "conv_block") and each.shift_size > 0)
    index = network.relative_position_index_SA
    mask = -torch.rand(4, 64, 64)
    tokens = torch.randn(1, 256, 12)
    with torch.no_grad():
        mine = block(tokens, (16, 16), index, mask)
        report.undo()
        theirs = block(tokens, (16, 16), index, mask)
    assert report.calls()[1]["its mask is unknown"] == 1
    assert torch.equal(mine, theirs)


def test_a_changed_table_shows_at_once() -> None:
    """OCAB keeps its reordered table; changes in place, as by an optimizer or load_state_dict, must show."""
    network = hat()
    accelerate(network)
    image = torch.rand(1, 3, 16, 16)
    block = next(each for each in network.modules() if hasattr(each, "overlap_win_size"))
    with torch.no_grad():
        before = network(image)
        state = {name: each.clone() for name, each in network.state_dict().items()}
        block.relative_position_bias_table += torch.randn(block.relative_position_bias_table.shape)
        changed = network(image)
        network.load_state_dict(state)
        after = network(image)
        block.relative_position_bias_table.data.mul_(2.0)  # as in a moving average; no counter sees it
        doubled = network(image)
    assert not torch.allclose(before, changed)
    assert torch.equal(before, after)
    assert not torch.allclose(before, doubled)


def test_hat_in_training_mode_is_served_with_its_masks() -> None:
    assert accelerate(hat().train()).served == 3
