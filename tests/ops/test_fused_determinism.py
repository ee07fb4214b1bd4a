"""The C++ kernels give the same bits on every run and any number of threads, and the derivatives they promise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.build_info import build_info
from savl.ops import KernelSettings, gaussian_posterior, use_fused_kernels
from savl.ops.case import Case, Draw
from savl.ops.op import OPS, Op

pytestmark = pytest.mark.usefixtures("extension")

# A sanitizer makes everything slow, and the tasks that it watches are the same on every number of threads.
THREADS = (4,) if os.environ.get("SAVL_SANITIZE") else (2, 3, 4, 4)
Call = tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]


def benchmark_case(op: Op, dtype: torch.dtype) -> Case:
    """The benchmark of an op on 32×32 pixels: threads get something to share, as tasks have thousands of elements."""
    assert op.benchmark is not None
    problem = op.benchmark(Draw(dtype), 32)
    return replace(op.case(dtype, **op.small_cases[0]), arguments=problem.arguments, options=problem.options)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_any_number_of_threads_gives_the_same_bits(op: Op, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case = benchmark_case(op, dtype)
    threads(1)
    expected = case.run("cpp")
    for count in THREADS:
        threads(count)
        found = case.run("cpp")
        different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
        assert not different, f"{different} differ on {count} threads"


def test_repeated_runs_give_the_same_bits(small_case: Callable[..., Case]) -> None:
    case = small_case()
    first = case.run("cpp")
    for run in range(2):
        found = case.run("cpp")
        different = [name for name, value in first.items() if not torch.equal(found[name], value)]
        assert not different, f"{different} differ on run {run + 2}"


# Instruction sets for bfloat16


def bfloat16_sets(extension: Any) -> list[str]:
    """Instruction sets with kernels for attention in bfloat16; the test is skipped where there is none."""
    names = [name for name in ("amx", "avx512_bf16") if name in extension.kernel_instruction_sets()]
    if not names:
        pytest.skip("this processor has neither AVX512-BF16 nor AMX")
    return names


@pytest.fixture
def use_set(extension: Any) -> Iterator[Callable[[str], None]]:
    before = build_info()["kernel_instruction_set"]
    yield extension.use_kernel_instruction_set
    extension.use_kernel_instruction_set(before)


@pytest.mark.parametrize("op", ["window_attention", "overlapping_window_attention"])
def test_instruction_sets_for_bfloat16_change_attention_in_bfloat16_only(
    op: str, extension: Any, use_set: Callable[[str], None]
) -> None:
    sets = bfloat16_sets(extension)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        case = benchmark_case(OPS[op], dtype)
        use_set("avx512")
        expected = case.run("cpp")
        for name in sets:
            use_set(name)
            found = case.run("cpp")
            # The roundings differ in all outputs and gradients, which have thousands of elements.
            same = {torch.equal(found[key], value) for key, value in expected.items()}
            assert same == {dtype != torch.bfloat16}, f"{name} in {dtype}"


def test_attention_restores_the_tile_registers_of_other_libraries(
    extension: Any, use_set: Callable[[str], None], threads: Callable[[int], None]
) -> None:
    threads(1)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(96, 96, generator=generator).bfloat16() for _ in range(2))
    expected = a @ b  # by oneDNN, which configures the tiles of AMX for its own products
    case = OPS["window_attention"].case(torch.bfloat16)
    for name in bfloat16_sets(extension):
        use_set(name)
        case.run("cpp")
        assert torch.equal(a @ b, expected), f"after attention with {name}"


# Derivatives


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in tensors]


TINY: dict[str, Case] = {
    f"{name}-{index}": op.case(torch.float64, **settings)
    for name, op in OPS.items()
    for index, settings in enumerate(op.tiny_cases)
}


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> Iterator[Call]:
    """A tiny case with the C++ kernels on, as a function of its tensors that leaves out results that are arguments."""
    function, tensors = TINY[request.param].function()

    def computed(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(out for out in function(*given) if all(out is not each for each in given))

    with use_fused_kernels(**{TINY[request.param].op: "cpp"}):
        yield computed, tensors


@pytest.mark.parametrize("tiny", TINY, indirect=True)
def test_gradients_are_those_of_finite_differences(tiny: Call) -> None:
    function, tensors = tiny
    assert torch.autograd.gradcheck(function, leaves(tensors))


def test_a_posterior_clamped_at_both_ends_has_the_gradients_of_eager() -> None:
    logvar = torch.linspace(-6, 2, 24, dtype=torch.float64).reshape(1, 2, 3, 4)
    found = {}
    for backend in ("cpp", "eager"):
        mu, spread = torch.zeros_like(logvar).requires_grad_(), logvar.clone().requires_grad_()
        posterior = gaussian_posterior(mu, spread, kernels=KernelSettings.of(backend))
        assert float(posterior.severity.min()) == 0.0
        (posterior.severity * torch.linspace(1, 2, 12, dtype=torch.float64).reshape(1, 3, 4)).sum().backward()
        found[backend] = spread.grad
    torch.testing.assert_close(found["cpp"], found["eager"])


@pytest.mark.parametrize("tiny", TINY, indirect=True)
def test_each_gradient_is_the_same_when_it_is_asked_for_alone(tiny: Call) -> None:
    function, tensors = tiny
    together = leaves(tensors)
    outputs = function(*together)
    seeds = [torch.randn_like(value) for value in outputs]
    expected = torch.autograd.grad(outputs, together, seeds, allow_unused=True)
    for index, value in enumerate(expected):
        alone = [leaf.detach().requires_grad_(place == index) for place, leaf in enumerate(together)]
        pairs = [pair for pair in zip(function(*alone), seeds, strict=True) if pair[0].requires_grad]
        (found,) = torch.autograd.grad([o for o, _ in pairs], [alone[index]], [s for _, s in pairs], allow_unused=True)
        assert value is not None
        assert found is not None, f"argument {index} got no gradient"
        torch.testing.assert_close(found, value, msg=lambda m, index=index: f"argument {index}: {m}")


@pytest.mark.parametrize("tiny", TINY, indirect=True)
def test_second_derivatives_are_refused_and_the_way_out_is_reported(tiny: Call) -> None:
    function, tensors = tiny
    given = leaves(tensors)
    total = sum(value.square().sum() for value in function(*given))
    gradient = torch.autograd.grad(total, given, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative.*second derivatives.*use_fused_kernels\(False\)"):
        torch.autograd.grad(sum(value.sum() for value in gradient), given)
