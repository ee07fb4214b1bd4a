"""OmniSR of spandrel."""

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

# spandrel's gradient of layer normalisation uses a deprecated name of torch's.
pytestmark = pytest.mark.filterwarnings("ignore:.*saved_variables:DeprecationWarning")

SIZES = ((1, 24, 24), (2, 24, 32), (1, 19, 30))


def omnisr(**settings: object) -> Any:
    sizes = {"num_feat": 16, "block_num": 2, "res_num": 1, "up_scale": 2}
    network: nn.Module = architecture("OmniSR", "OmniSR").OmniSR(**{**sizes, **settings})
    return drawn(network)


def block(**settings: object) -> Any:
    return omnisr(**settings).residual_layer[0].residual_layer[0]


@pytest.mark.parametrize("settings", [{}, {"pe": False, "res_num": 2, "block_num": 1}, {"window_size": 4}])
def test_omnisr_computes_the_same(settings: dict[str, object]) -> None:
    check_network(omnisr(**settings), 2, SIZES, gradients=False)


@pytest.mark.parametrize("settings", [{}, {"pe": False}])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_original(settings: dict[str, object], training: bool) -> None:
    check_gradients(omnisr(**settings).train(training), 2, (2, 24, 32))


def test_gradients_of_a_channel_of_zeros_are_finite() -> None:
    """Attention between channels divides by their norms."""
    made = block()
    with torch.no_grad():
        for i in (5, 11):
            made.layer[i].fn.qkv_dwconv.weight[::3] = 0
    accelerate(made)
    made(torch.randn(1, 16, 16, 16)).sum().backward()
    assert all(each.grad.isfinite().all() for each in made.parameters() if each.grad is not None)


def test_bfloat16_computes_the_same() -> None:
    check_network(block().bfloat16(), 1, ((2, 16, 24),), 16, gradients=False)


def test_a_copy_with_other_names_of_classes_is_served() -> None:
    check_network(renamed(block()), 1, ((1, 16, 24),), 16, gradients=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layers: setattr(layers[2].fn, "scale", 1.0), "its scale is 1 instead of 1/sqrt(4)"),
        (lambda layers: setattr(layers[7], "pattern", layers[1].pattern), "its windows are of another kind"),
        (lambda layers: setattr(layers[1], "axes_lengths", {"w1": 4, "w2": 8}), "its windows are of another kind"),
        (lambda layers: setattr(layers[11].fn, "ps", 4), "its attention between channels is of another kind"),
        (lambda layers: setattr(layers[6], "norm", nn.Identity()), "its feed-forward layers are of another kind"),
        (lambda layers: setattr(layers[0], "fn", nn.Sequential(nn.GELU())), "its bottleneck is of another kind"),
        (lambda layers: layers[8].fn.rel_pos_indices.add_(1), "its index of relative positions has another order"),
    ],
)
def test_a_changed_structure_is_left_alone(change: Any, reason: str) -> None:
    made = block()
    change(made.layer)
    report = accelerate(made)
    assert report.served == 0
    assert reason in str(report)


def test_attention_between_channels_of_other_windows_fails_the_proof() -> None:
    """The two kinds differ in their code alone."""
    made = block()
    made.layer[11].fn.__class__ = type(made.layer[5].fn)
    report = accelerate(made)
    assert report.served == 0
    assert "it does not compute the same" in str(report)


def test_dropped_samples_in_training_fall_back() -> None:
    made = block().train()
    report = accelerate(made)
    made.layer[0].dropsample.prob = 0.5
    with pytest.raises(RuntimeError, match="must match"), torch.no_grad():  # spandrel's own dropsample fails
        made(torch.rand(2, 16, 16, 16))
    assert report.calls() == (0, {"dropout is active": 1})
