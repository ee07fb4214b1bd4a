"""Autograd may recompute the tensors that an op keeps, move them, and read them twice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from savl import ops
from savl.network import SAVL, SAVLConfig
from savl.ops import use_fused_kernels
from savl.ops.equivalence import Case
from savl.ops.scopes import current_settings

pytestmark = pytest.mark.usefixtures("extension", "one_thread")

Function = Callable[..., tuple[Tensor, ...]]
Wrap = Callable[[Function], Function]


def keeping_the_op(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Recompute everything but savl's ops."""
    return CheckpointPolicy.MUST_SAVE if op.namespace == "savl" else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(function: Function, **settings: Any) -> Function:
    return lambda *tensors: checkpoint(function, *tensors, **settings)


WRAPS: dict[str, Wrap] = {
    "reentrant": partial(checkpointed, use_reentrant=True),
    "non-reentrant": partial(checkpointed, use_reentrant=False),
    "without early stop": partial(checkpointed, use_reentrant=False, early_stop=False),
    "nested": lambda f: checkpointed(checkpointed(f, use_reentrant=False), use_reentrant=False),
    "reentrant in non-reentrant": lambda f: checkpointed(checkpointed(f, use_reentrant=True), use_reentrant=False),
    "selective": partial(
        checkpointed,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, keeping_the_op),
    ),
}


def call(case: Case) -> tuple[Function, list[Tensor]]:
    """The op of a case as a function of its tensors, and the tensors; what comes before the op is recomputed too."""
    function, tensors = case.function()
    return lambda *given: function(*(tensor * 1.0 for tensor in given)), tensors


def gradients(function: Function, tensors: list[Tensor], used: set[int] | None = None) -> list[Tensor | None]:
    """Gradients of all tensors by ``backward``, which reentrant checkpointing asks for; of some outputs, or all."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    total = sum(
        (output.float() * torch.linspace(0.5, 1.5, output.numel()).view(output.shape)).sum()
        for index, output in enumerate(outputs)
        if used is None or index in used
    )
    assert isinstance(total, Tensor)
    total.backward()
    return [leaf.grad for leaf in leaves]


def assert_the_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        if wanted is None:
            assert value is None, f"argument {index} got a gradient"
        else:
            assert value is not None, f"argument {index} got no gradient"
            assert torch.equal(value, wanted), f"the gradient of argument {index} differs"


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("way", WRAPS)
def test_gradients_of_a_checkpointed_op_are_those_without(
    way: str, autocast: bool, small_case: Callable[..., Case]
) -> None:
    function, tensors = call(small_case())
    with use_fused_kernels(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(function, tensors)
        assert_the_same(gradients(WRAPS[way](function), tensors), expected)


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_a_checkpointed_op_in_bfloat16_has_the_gradients_without(way: str, small_case: Callable[..., Case]) -> None:
    function, tensors = call(small_case(torch.bfloat16))
    with use_fused_kernels():
        assert_the_same(gradients(WRAPS[way](function), tensors), gradients(function, tensors))


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_a_checkpointed_op_whose_outputs_are_used_one_by_one_has_the_gradients_without(
    way: str, small_case: Callable[..., Case]
) -> None:
    function, tensors = call(small_case())
    with use_fused_kernels():
        for index in range(len(function(*tensors))):
            expected = gradients(function, tensors, {index})
            if way == "reentrant":  # its backward pass gives zeros for what nothing depends on
                expected = [torch.zeros_like(t) if g is None else g for g, t in zip(expected, tensors, strict=True)]
            found = gradients(WRAPS[way](function), tensors, {index})
            if way == "reentrant":
                found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
            assert_the_same(found, expected)


def test_a_checkpointed_op_serves_arguments_that_want_no_gradient(small_case: Callable[..., Case]) -> None:
    function, tensors = call(small_case())
    with use_fused_kernels():
        for place in range(len(tensors)):
            found = []
            for run in (function, WRAPS["non-reentrant"](function)):
                given = [t.detach().clone().requires_grad_(index == place) for index, t in enumerate(tensors)]
                sum((out.square().sum() for out in run(*given)), torch.zeros(())).backward()
                assert all(value.grad is None for index, value in enumerate(given) if index != place)
                found.append([given[place].grad])
            assert_the_same(found[1], found[0])


def test_kept_tensors_may_be_moved_packed_and_read_again(small_case: Callable[..., Case]) -> None:
    function, tensors = call(small_case())
    unpacked: list[int] = []

    def once() -> Any:
        """Hooks that let each kept tensor be read once per backward pass, as non-reentrant checkpointing does."""
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> int:
            kept.append(tensor.detach().clone())
            return len(kept) - 1

        def unpack(index: int) -> Tensor:
            assert index not in unpacked, "a kept tensor is read twice in one backward pass"
            unpacked.append(index)
            return kept[index]

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    with use_fused_kernels():
        expected = gradients(function, tensors)
        with torch.autograd.graph.save_on_cpu():
            assert_the_same(gradients(function, tensors), expected)
        with once():
            assert_the_same(gradients(function, tensors), expected)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        total = sum((out.square().sum() for out in WRAPS["non-reentrant"](function)(*leaves)), torch.zeros(()))
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        second = torch.autograd.grad(total, leaves)
        assert_the_same(list(second), list(first))


def test_second_derivatives_of_a_checkpointed_op_are_refused_by_name(small_case: Callable[..., Case]) -> None:
    function, tensors = call(small_case())
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with use_fused_kernels():
        total = sum((out.square().sum() for out in WRAPS["non-reentrant"](function)(*leaves)), torch.zeros(()))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"savl::\w+ has no derivative.*use_fused_kernels\(False\)"):
            sum((gradient.square().sum() for gradient in first), torch.zeros(())).backward()


def test_a_checkpointed_op_can_be_compiled(case_of_op: Case) -> None:
    function, tensors = call(case_of_op)
    torch.compiler.reset()
    compiled = torch.compile(checkpointed(function, use_reentrant=False), backend="aot_eager", fullgraph=True)
    with use_fused_kernels():
        for found, wanted in zip(gradients(compiled, tensors), gradients(function, tensors), strict=True):
            torch.testing.assert_close(found, wanted)


def test_threads_of_the_backward_pass_compute_again_by_the_setting_it_was_started_in() -> None:
    # Torch moves reentrant passes that nest deeper than 60 to other threads; on a GPU it always has threads of its own.
    seen: list[tuple[int, bool]] = []

    def body(x: Tensor) -> Tensor:
        with use_fused_kernels(layer_norm=False):
            pass  # a block inside takes nothing away from what follows it
        seen.append((threading.get_ident(), current_settings().layer_norm is True))
        return ops.layer_norm(x, torch.ones(4), torch.zeros(4))

    def deep(x: Tensor) -> Tensor:
        function = body
        for _ in range(70):
            function = partial(checkpoint, function, use_reentrant=True)
        return function(x)

    x = torch.randn(1, 2, 2, 4, requires_grad=True)
    for fused in (True, False):
        with use_fused_kernels(not fused):
            with use_fused_kernels(fused):
                deep(x).sum().backward()
            assert current_settings().layer_norm is not fused
        assert len({thread for thread, _ in seen}) > 1, "all of it ran in one thread"
        assert {setting for _, setting in seen} == {fused}
        seen.clear()


# The network


@pytest.fixture(scope="module")
def network(small_config: Callable[..., SAVLConfig], perturb_parameters: Callable[[Any], Any]) -> SAVL:
    torch.manual_seed(0)
    model: SAVL = perturb_parameters(SAVL(small_config())).float()
    return model.train()


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant", "nested", "selective"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_network_whose_blocks_are_checkpointed_has_the_gradients_without(
    way: str, autocast: bool, network: SAVL
) -> None:
    lr = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    found = []
    for wrapped in (False, True):
        model = copy.deepcopy(network)
        if wrapped:
            for block in (block for group in model.groups for block in (*group.habs, *group.dscas, group.ocab)):
                block.forward = WRAPS[way](block.forward)  # type: ignore[assignment, method-assign]
        with use_fused_kernels(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(lr).float().square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    if way != "reentrant":
        assert_the_same(found[1], found[0])
        return
    for value, wanted in zip(*found, strict=True):  # what several blocks give a tensor is added up in another order
        assert value is not None
        assert wanted is not None
        assert float((value - wanted).norm()) <= (2e-2 if autocast else 1e-5) * float(wanted.norm())
