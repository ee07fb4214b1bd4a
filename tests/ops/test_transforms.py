"""The public functions under the transforms of torch.func and in forward mode, with the fused kernels on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

from savl.network import SAVL, SAVLConfig
from savl.ops import KernelUnavailable, use_fused_kernels
from savl.ops.equivalence import Case

pytestmark = [
    pytest.mark.usefixtures("extension", "one_thread"),
    pytest.mark.filterwarnings("ignore:.*(batching rule|get_attr Node|jit.script)"),  # of torch, about itself
]

Function = Callable[..., tuple[Tensor, ...]]


def total(function: Function) -> Callable[..., Tensor]:
    """A scalar that weighs every number of every output differently."""

    def weigh(*tensors: Tensor) -> Tensor:
        result = tensors[0].new_zeros(())
        for out in function(*tensors):
            result = result + (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum()
        return result

    return weigh


def directions(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors)


def stacked(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack((tensor, 0.5 * tensor)) for tensor in tensors]


def in_forward_mode(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions(tensors), strict=True)]
        tangents = [forward_ad.unpack_dual(out).tangent for out in function(*duals)]
    assert all(tangent is not None for tangent in tangents), "a tangent is lost"
    return [tangent for tangent in tangents if tangent is not None]


def every(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


TRANSFORMS: dict[str, Callable[[Function, list[Tensor]], Any]] = {
    "grad": lambda f, t: func.grad(total(f), every(t))(*t),
    "grad and value": lambda f, t: func.grad_and_value(total(f))(*t),
    "vjp": lambda f, t: func.vjp(total(f), *t)[1](torch.ones((), dtype=t[0].dtype)),
    "jvp": lambda f, t: func.jvp(f, tuple(t), directions(t)),
    "linearize": lambda f, t: func.linearize(f, *t)[1](*directions(t)),
    "vmap": lambda f, t: func.vmap(f)(*stacked(t)),
    "vmap over one argument": lambda f, t: func.vmap(f, in_dims=(0, *[None] * (len(t) - 1)))(stacked(t)[0], *t[1:]),
    "gradients per sample": lambda f, t: func.vmap(func.grad(total(f), every(t)))(*stacked(t)),
    "grad over grad": lambda f, t: func.grad(lambda *a: func.grad(total(f))(*a).square().sum(), every(t))(*t),
    "forward over reverse": lambda f, t: func.jvp(func.grad(total(f)), tuple(t), directions(t)),
    "forward mode": in_forward_mode,
}


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_the_same_result_with_the_kernels_off(
    transform: str, small_case: Callable[..., Case]
) -> None:
    function, tensors = small_case().function()
    with use_fused_kernels(False):
        expected = flat(TRANSFORMS[transform](function, tensors))
    with use_fused_kernels():
        found = flat(TRANSFORMS[transform](function, tensors))
    assert len(found) == len(expected) > 0
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(value, wanted), f"result {index}"
        assert bool(value.any()) or not bool(wanted.any())


def test_gradients_of_torch_func_are_those_of_the_fused_backward_pass(small_case: Callable[..., Case]) -> None:
    function, tensors = small_case(torch.float64).function()
    with use_fused_kernels():
        found = func.grad(total(function), every(tensors))(*tensors)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(total(function)(*leaves), leaves)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_tangents_are_those_of_finite_differences(small_case: Callable[..., Case]) -> None:
    function, tensors = small_case(torch.float64).function()
    step = 1e-6
    with use_fused_kernels():
        _, tangents = func.jvp(function, tuple(tensors), directions(tensors))
        ahead, behind = (
            function(*(t + sign * step * d for t, d in zip(tensors, directions(tensors), strict=True)))
            for sign in (1, -1)
        )
    for tangent, after, before in zip(tangents, ahead, behind, strict=True):
        difference = (after - before) / (2 * step)
        assert float((tangent - difference).norm()) <= 1e-5 * float(difference.norm())


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "forward mode"])
def test_a_backend_asked_for_by_name_refuses_and_names_the_way_out(
    transform: str, small_case: Callable[..., Case]
) -> None:
    case = small_case()
    function, tensors = case.function()
    with (
        use_fused_kernels(**{case.op: "cpp"}),
        pytest.raises(KernelUnavailable, match=rf"{case.op}: .*savl\.use_fused_kernels\(False\)"),
    ):
        TRANSFORMS[transform](function, tensors)


def test_after_a_transform_the_fused_kernels_serve_again(small_case: Callable[..., Case]) -> None:
    case = small_case()
    function, tensors = case.function()
    with use_fused_kernels(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        func.grad(total(function))(*tensors)
        before = {event.key for event in profile.events() or ()}
        function(*tensors)
    assert f"savl::{case.op}" in {event.key for event in profile.key_averages()}
    assert f"savl::{case.op}" not in before


def test_gradients_of_a_batch_of_directions_are_those_one_by_one(small_case: Callable[..., Case]) -> None:
    function, tensors = small_case(torch.float64).function()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with use_fused_kernels():
        (out, *_) = function(*leaves)
        batch = torch.stack([torch.ones_like(out), torch.linspace(0, 1, out.numel()).view(out.shape).to(out)])
        together = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True, allow_unused=True)
        for index, direction in enumerate(batch):
            alone = torch.autograd.grad(out, leaves, direction, retain_graph=True, allow_unused=True)
            for value, wanted in zip(together, alone, strict=True):
                assert (value is None) == (wanted is None)
                if value is not None:
                    torch.testing.assert_close(value[index], wanted)


def test_a_compiled_transform_equals_the_transform(case_of_op: Case) -> None:
    function, tensors = case_of_op.function()
    torch.compiler.reset()
    gradient = func.grad(total(function), every(tensors))
    with use_fused_kernels():
        found = torch.compile(gradient, backend="aot_eager", fullgraph=True)(*tensors)
        for value, wanted in zip(found, gradient(*tensors), strict=True):
            torch.testing.assert_close(value, wanted)


class Program(torch.nn.Module):
    """A function as a module, which `torch.export` asks for."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(*tensors)


def test_an_exported_program_with_fused_ops_is_transformed_as_the_function_is(case_of_op: Case) -> None:
    function, tensors = case_of_op.function()
    with use_fused_kernels():
        exported = torch.export.export(Program(function), tuple(tensors))
    assert any("savl" in str(node.target) for node in exported.graph.nodes)
    program = exported.module()
    for transform in ("grad", "vjp", "jvp", "vmap", "gradients per sample", "grad over grad"):
        found = flat(TRANSFORMS[transform](program, tensors))
        expected = flat(TRANSFORMS[transform](function, tensors))
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, msg=lambda m, transform=transform: f"{transform}: {m}")


# The network


@pytest.fixture(scope="module")
def network(small_config: Callable[..., SAVLConfig], perturb_parameters: Callable[[Any], Any]) -> SAVL:
    torch.manual_seed(0)
    model: SAVL = perturb_parameters(SAVL(small_config()))
    return model


@pytest.mark.parametrize("own", [False, True], ids=["process", "model"])
def test_a_functional_call_has_the_gradients_of_backward(own: bool, network: SAVL) -> None:
    lr = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = copy.deepcopy(network)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    if own:
        use_fused_kernels(model=model)
    with use_fused_kernels(not own):
        found = func.grad(lambda given: func.functional_call(model, given, (lr,)).square().sum())(parameters)
        model(lr).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_a_network_is_mapped_over_images(network: SAVL) -> None:
    images = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with use_fused_kernels(), torch.no_grad():
        found = func.vmap(network)(images)
        for value, image in zip(found, images, strict=True):
            torch.testing.assert_close(value, network(image))
