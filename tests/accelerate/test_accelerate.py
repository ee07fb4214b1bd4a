"""`savl.accelerate` itself: undo, copies, the switch, hooks, the proof, the report, and torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from checks import drawn
from spandrel_import import architecture, spandrel
from torch import Tensor, nn

import savl
from savl.accelerate import accelerate
from savl.accelerate.adapter import ADAPTERS


def swinir() -> nn.Module:
    network: nn.Module = architecture("SwinIR", "SwinIR").SwinIR(
        img_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=8, upscale=2, upsampler="pixelshuffle"
    )
    return drawn(network)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 16, 24)


def run(network: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(image)
    return out


def test_undo_restores_classes_outputs_and_attributes(image: Tensor) -> None:
    network = swinir()
    before, types = run(network, image), [type(each) for each in network.modules()]
    attributes = [set(vars(each)) for each in network.modules()]
    report = accelerate(network)
    assert [type(each) for each in network.modules()] != types
    report.undo()
    report.undo()  # a second time does nothing
    assert [type(each) for each in network.modules()] == types
    assert [set(vars(each)) for each in network.modules()] == attributes
    assert torch.equal(run(network, image), before)


def test_copies_and_pickles_are_accelerated_and_have_the_names_of_the_original(image: Tensor) -> None:
    network = swinir()
    names = list(network.state_dict())
    accelerate(network)
    expected = run(network, image)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    copies = [
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(file, weights_only=False),
        copy.deepcopy(copy.deepcopy(network)),
    ]
    for each in copies:
        assert list(each.state_dict()) == names
        assert torch.equal(run(each, image), expected)
        assert any(type(module).__mro__[1].__name__ == "Accelerated" for module in each.modules())


def test_the_switch_chooses_the_original_blocks(image: Tensor) -> None:
    network = swinir()
    original = run(network, image)
    report = accelerate(network)
    with savl.use_fused_kernels(False):
        assert torch.equal(run(network, image), original)
    assert report.calls()[0] == 0
    savl.use_fused_kernels(False, model=network)
    assert torch.equal(run(network, image), original)
    savl.use_fused_kernels(None, model=network)
    run(network, image)
    assert report.calls()[0] == 2


def test_hooks_inside_a_block_run_and_hooks_of_a_block_too(image: Tensor) -> None:
    network = swinir()
    report = accelerate(network)
    block: Any = next(each for each in network.modules() if hasattr(each, "shift_size"))
    seen: list[str] = []
    outside = block.register_forward_hook(lambda *_: seen.append("block"))
    inside = block.attn.register_forward_hook(lambda *_: seen.append("attention"))
    run(network, image)
    assert seen == ["attention", "block"]
    inside.remove()
    run(network, image)
    outside.remove()
    assert seen == ["attention", "block", "block"]
    assert report.calls() == (3, {"a module inside has hooks": 1})


def test_a_replaced_layer_falls_back(image: Tensor) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = swinir()
    other = copy.deepcopy(network)
    report = accelerate(network)
    for each in (network, other):
        block: Any = next(module for module in each.modules() if hasattr(module, "shift_size"))
        block.attn.proj.__class__ = Doubled
    assert torch.allclose(run(network, image), run(other, image), atol=1e-4)
    assert report.calls()[1] == {"a module inside was replaced": 1}


def test_a_block_that_computes_something_else_fails_the_proof(image: Tensor) -> None:
    """The structure is that of a Swin block, but its forward multiplies the result."""
    network = swinir()
    for block in network.modules():
        if hasattr(block, "shift_size"):
            kind: Any = type(block)
            block.__class__ = type(
                "Other", (kind,), {"forward": lambda self, *args, kind=kind: 1.01 * kind.forward(self, *args)}
            )
    before = run(network, image)
    report = accelerate(network)
    assert report.served == 0
    assert "it does not compute the same" in str(report)
    assert torch.equal(run(network, image), before)
    assert accelerate(network, verify=False).served == 2


def test_dtype_converts_the_network_and_undo_restores_every_bit(image: Tensor) -> None:
    network = swinir()
    before = {name: each.clone() for name, each in network.state_dict().items()}
    report = accelerate(network, dtype=torch.bfloat16)
    assert report.served == 2
    assert {each.dtype for each in network.parameters()} == {torch.bfloat16}
    assert run(network, image[..., :16].bfloat16()).dtype == torch.bfloat16
    report.undo()
    for name, each in network.state_dict().items():
        assert torch.equal(each, before[name])


def test_what_no_adapter_knows_is_named() -> None:
    network = nn.Sequential(nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 8))
    report = accelerate(network)
    assert report.served == 0
    assert {block.kind for block in report.blocks} == {"MultiheadAttention"}
    assert "no adapter knows its structure" in str(report)
    assert "no block" in str(accelerate(nn.Linear(3, 3)))


def test_a_second_call_leaves_accelerated_blocks(image: Tensor) -> None:
    network = swinir()
    first = accelerate(network)
    second = accelerate(network)
    assert (first.served, len(second.blocks)) == (2, 0)
    second.undo()
    run(network, image)
    assert first.calls()[0] == 2


def test_a_network_on_the_meta_device_is_left_alone() -> None:
    report = accelerate(swinir().to("meta"))
    assert report.served == 0
    assert "its tensors are on the meta device" in str(report)


def test_an_interrupt_restores_the_network(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = swinir()
    before, types = run(network, image), [type(each) for each in network.modules()]
    calls = []

    def interrupted(*arguments: Any) -> tuple[float, None]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5, None

    monkeypatch.setattr("savl.accelerate.apply.verify_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(network, dtype=torch.bfloat16)
    assert [type(each) for each in network.modules()] == types
    assert torch.equal(run(network, image), before)


def test_savls_own_networks_are_left_alone() -> None:
    assert accelerate(savl.load("savl-tiny")).blocks == []


def test_a_descriptor_of_spandrel_is_accepted() -> None:
    descriptor = spandrel().ModelLoader().load_from_state_dict(dict(swinir().state_dict()))
    report = savl.accelerate(descriptor)
    assert report.served == 2
    assert descriptor.model is not None


@pytest.mark.parametrize(
    ("arguments", "message"), [({"model": 3}, "model must be"), ({"dtype": torch.int8}, "dtype must be")]
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        accelerate(**{"model": nn.Linear(2, 2), **arguments})


def test_a_compiled_network_has_one_graph(image: Tensor) -> None:
    network = swinir()
    accelerate(network)
    expected = run(network, image)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(compiled, image), expected, atol=1e-5)  # type: ignore[arg-type]


def test_an_exported_network_computes_the_same(image: Tensor) -> None:
    network = swinir()
    accelerate(network)
    with torch.no_grad():
        program = torch.export.export(network, (image,))
    assert any("savl" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(run(program.module(), image), run(network, image), atol=1e-5)


def test_autocast_keeps_the_dtype_of_the_original_network(image: Tensor) -> None:
    network = swinir()
    other = copy.deepcopy(network)
    accelerate(network)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = run(network, image), run(other, image)
    exact = run(other.double(), image.double())
    assert mine.dtype == theirs.dtype
    assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_a_traced_network_has_the_operations_of_the_original(image: Tensor) -> None:
    network = swinir()
    expected = run(network, image)
    accelerate(network)
    traced = torch.jit.trace(network, image)
    assert torch.equal(run(traced, image), expected)


def test_adapters_have_names_of_their_own() -> None:
    assert all(name == adapter.name and adapter.title for name, adapter in ADAPTERS.items())
