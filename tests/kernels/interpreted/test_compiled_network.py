"""torch.compile of a network on the Triton kernels: one graph that computes the same, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from savl.network import SAVL
from savl.ops import use_fused_kernels
from savl.ops.library import TRITON
from savl.ops.op import OPS


@pytest.mark.slow
def test_a_network_on_triton_kernels_is_one_graph_with_the_same_result_and_gradients(
    small_config: Callable[..., Any],
) -> None:
    torch.compiler.reset()
    model = SAVL(small_config(depths=(1,), estimator_dilations=(1,)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    lr = torch.rand(1, 3, 4, 8)
    served = ("window_attention", "overlapping_window_attention", "layer_norm")
    settings = {name: TRITON if name in served else False for name in OPS}
    parameters = list(model.parameters())
    found = []
    with use_fused_kernels(**settings):
        for network in (model, torch.compile(model, fullgraph=True, backend="eager")):
            sr = network(lr)
            gradients = torch.autograd.grad(sr.square().mean(), parameters, allow_unused=True)
            found.append((sr.detach(), [each for each in gradients if each is not None]))
    (expected, of_expected), (result, of_result) = found
    torch.testing.assert_close(result, expected)
    assert len(of_expected) > 20
    torch.testing.assert_close(of_result, of_expected)
