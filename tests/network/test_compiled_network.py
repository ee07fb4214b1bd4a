"""torch.compile of networks with fused kernels: one graph without breaks, in inference and in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from savl.build_info import build_info
from savl.network import CONFIGS, SAVL
from savl.ops import use_fused_kernels
from savl.ops.library import EXTENSION_UNAVAILABLE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(EXTENSION_UNAVAILABLE is not None, reason=str(build_info()["reason"] or EXTENSION_UNAVAILABLE)),
]


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["savl-tiny", "savl-base"])
def network(request: pytest.FixtureRequest) -> SAVL:
    """A network with every setting of a named one, but fewer channels and blocks."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    small = replace(
        config, channels=24, heads=2, depths=(1,), window=4, upsample_features=8, latent=6, estimator_dilations=(1,)
    )
    return SAVL(small)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 10, 12)


@pytest.mark.parametrize(("training", "autocast"), [(False, False), (True, True)], ids=["inference", "training"])
def test_a_fused_network_is_one_graph(network: SAVL, image: Tensor, training: bool, autocast: bool) -> None:
    network.train(training)
    fused, context = use_fused_kernels(), torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with fused, context, torch.set_grad_enabled(training):
        explained = torch._dynamo.explain(network)(image, return_field=True)
    assert [str(reason) for reason in explained.break_reasons] == []
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    ops = {str(target) for each in explained.ops_per_graph for target in each}
    assert any("savl" in name for name in ops), "no fused op is in the graph, the test proves nothing"


@pytest.mark.parametrize("network", ["savl-tiny"], indirect=True)
def test_the_fused_kernels_are_switched_without_a_graph_break(network: SAVL, image: Tensor) -> None:
    network.eval()
    compiled = torch.compile(network, backend="eager")
    counters.clear()
    with torch.no_grad():
        for fused in (True, False, True):
            with use_fused_kernels(fused):
                compiled(image)
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 2, "one for each setting"


@pytest.mark.parametrize("network", ["savl-base"], indirect=True)
def test_a_training_step_compiles_forward_and_backward(network: SAVL, image: Tensor) -> None:
    network.train()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with use_fused_kernels(), torch.autocast("cpu", torch.bfloat16):
        sr, field = compiled(image, return_field=True)
        loss = sr.float().mean() + 0.01 * field.kl.mean()
    loss.backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    broken = [
        name for name, each in network.named_parameters() if each.grad is not None and not each.grad.isfinite().all()
    ]
    with use_fused_kernels(), torch.autocast("cpu", torch.bfloat16):
        sr, field = network(image, return_field=True)
        assert field is not None
        assert field.kl is not None
        names = [name for name, _ in network.named_parameters()]
        found = torch.autograd.grad(
            sr.float().mean() + 0.01 * field.kl.mean(), list(network.parameters()), allow_unused=True
        )
    assert missing == [name for name, gradient in zip(names, found, strict=True) if gradient is None]
    assert broken == []
