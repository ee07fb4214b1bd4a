"""The ops as torch sees them: schemas, fake kernels, autograd, and compilation with the switch in both positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from savl.ops import KernelSettings, gaussian_posterior, use_fused_kernels, window_attention
from savl.ops.case import Case
from savl.ops.gaussian_posterior import SEVERITY_EPS, SEVERITY_MAX
from savl.ops.library import EXTENSION_UNAVAILABLE
from savl.ops.op import OPS, Op

pytestmark = pytest.mark.usefixtures("extension")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Recorder(TorchDispatchMode):
    """Names and arguments of savl's ops that run, with the arguments detached."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "savl":
            kept = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            self.calls.append((function._schema.name.removeprefix("savl::"), kept))
        return function(*args, **(kwargs or {}))


def recorded_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Arguments of every op and its backward pass in its small cases; in the first also with channels-last images."""
    found = {}
    for op in OPS.values():
        for index, settings in enumerate(op.small_cases):
            case = op.case(torch.float32, **settings)
            for layout in ("contiguous", "channels-last")[: 2 if index == 0 else 1]:
                with Recorder() as recorder:
                    (case if layout == "contiguous" else channels_last(case)).run("cpp")
                for called, args in recorder.calls:
                    found[f"{called}-{index}-{layout}"] = (called, args)
    return found


def channels_last(case: Case) -> Case:
    arguments = {
        name: value.contiguous(memory_format=torch.channels_last) if value is not None and value.dim() == 4 else value
        for name, value in case.arguments.items()
    }
    return replace(case, arguments=arguments)


def mixed_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Arguments with the mixtures of dtypes that autocast makes, and backward passes with few gradients."""
    image, table, severity = numbers(2, 4, 6, 18), numbers(9, 2), numbers(2, 4, 6).abs()
    mu, logvar, map_ = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5), numbers(2, 4, 5)
    a, g, b, r = (numbers(2, 3, 4, 5) for _ in range(4))
    half = [value.bfloat16() for value in (a, g, b)]
    weight, bias, linear = numbers(5), numbers(5), numbers(5, 5)
    kept = (numbers(2, 3, 4), numbers(2, 3, 4).exp())
    interleaved = [value.contiguous(memory_format=torch.channels_last) for value in (mu, logvar, mu - 1)]
    return {
        "posterior-channels-last": (
            "gaussian_posterior",
            (*interleaved, None, 0, SEVERITY_EPS, SEVERITY_MAX),
        ),
        "posterior-backward-channels-last": (
            "gaussian_posterior_backward",
            (mu, None, map_, *interleaved, None, 0, True),
        ),
        "window-autocast": (
            "window_attention",
            (image.bfloat16(), table, severity, *[None] * 4, 2, 2, 2, 2, 2, 1, 1, False, None),
        ),
        "posterior-negative-seed": ("gaussian_posterior", (mu, logvar, None, -3, 7, SEVERITY_EPS, SEVERITY_MAX)),
        "posterior-backward-one-map": (
            "gaussian_posterior_backward",
            (None, None, map_, mu, logvar, None, None, 0, False),
        ),
        "modulation-autocast": ("channel_modulation", (*half, r)),
        "modulation-backward-autocast": ("channel_modulation_backward", (r, *half[:2])),
        "norm-mixed": ("layer_norm", (half[0], weight, bias, 1e-5, False)),
        "norm-wide": ("layer_norm", (half[0], weight, bias.bfloat16(), 1e-5, True)),
        "norm-backward-wide": ("layer_norm_backward", (b, half[0], weight, bias.bfloat16(), *kept)),
        "linear-autocast": ("convolution", (half[0], linear, *[None] * 7, 1, 1, 0.0, 0.0, True, False)),
        "linear-narrow": ("convolution", (r, linear, *[None] * 3, r, *[None] * 3, 1, 0, 0.0, 0.0, False, True)),
        "linear-backward-autocast": (
            "convolution_backward",
            (half[1], half[0], linear, *[None] * 4, half[2], 1, 1, 0.0, 0.0, False, [True, True, True, *[False] * 6]),
        ),
        "convolution-backward-weight": (
            "convolution_backward",
            (
                b,
                a,
                numbers(5, 5, 3, 3),
                weight,
                bias,
                None,
                None,
                g,
                2,
                2,
                0.1,
                1e-5,
                False,
                [False, True, *[False] * 7],
            ),
        ),
    }


CALLS = (recorded_calls() | mixed_calls()) if EXTENSION_UNAVAILABLE is None else {}


def test_every_op_and_its_backward_are_called_here() -> None:
    assert {op for op, _ in CALLS.values()} == {*OPS, *(f"{op}_backward" for op in OPS)}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts_the_registration(name: str) -> None:
    op, args = CALLS[name]
    if not op.endswith("_backward"):
        args = tuple(
            arg.detach().clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args
        )  # clone keeps the strides
    torch.library.opcheck(getattr(torch.ops.savl, op).default, args)


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_kernel_returns_the_same_metadata_as_the_real_one(name: str) -> None:
    op, args = CALLS[name]
    real = getattr(torch.ops.savl, op)(*args)
    with FakeTensorMode() as mode:
        fake = getattr(torch.ops.savl, op)(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
    for index, (found, promised) in enumerate(pairs):
        assert promised.shape == found.shape, f"output {index}"
        assert promised.dtype == found.dtype, f"output {index}"
        assert promised.stride() == found.stride(), f"output {index}"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_schema_names_the_tensors_as_the_public_function_does(op: Op) -> None:
    schema = getattr(torch.ops.savl, op.name).default._schema
    names = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(op.function).parameters
    assert names == [name for name, parameter in parameters.items() if parameter.kind is positional]
    assert not schema.is_mutable


# Compilation

Call = tuple[Callable[..., Any], list[Tensor]]


def public_calls() -> dict[str, Call]:
    """Small cases of every op as functions of tensors: one for each set of arguments that are given.

    The first of an op is named as the op.
    """
    found: dict[str, Call] = {}
    traits = set()
    for name, op in OPS.items():
        for index, settings in enumerate(op.small_cases):
            case = op.case(torch.float32, **settings)
            given = name, *case.options, *(value is None for value in case.arguments.values())
            if given not in traits:
                traits.add(given)
                found[f"{name}-{index}" if index else name] = case.function()
    mu, logvar = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5)
    found["gaussian_posterior-largest-seed"] = (
        lambda *tensors: tuple(gaussian_posterior(*tensors, seed=2**64 - 1)),
        [mu, logvar],
    )
    return found


PUBLIC = public_calls()


def run(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    given = [value.detach().clone().requires_grad_() for value in tensors]
    out = function(*given)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    total = sum(value.square().sum() for value in outputs)
    gradients = torch.autograd.grad(total, given, allow_unused=True)
    return [value.detach() for value in outputs] + [value for value in gradients if value is not None]


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_compiled_op_equals_the_op(name: str) -> None:
    function, tensors = PUBLIC[name]
    with use_fused_kernels():
        expected = run(function, tensors)
        found = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(value, wanted, msg=lambda m, index=index: f"result {index}: {m}")


def ops_run_by(function: Callable[..., Any], *args: Any) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return {event.key for event in profile.key_averages() if event.key.startswith("savl::")}


@pytest.mark.parametrize("name", ["window_attention", "channel_modulation"])
def test_the_switch_is_heeded_after_compilation(name: str) -> None:
    function, tensors = PUBLIC[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    op = f"savl::{name}"
    assert op not in ops_run_by(compiled, *tensors), "the tests begin with eager"
    with use_fused_kernels():
        assert op in ops_run_by(compiled, *tensors), "compiled while off, the fused kernel is not used when on"
        with use_fused_kernels(False):
            assert op not in ops_run_by(compiled, *tensors), "compiled while on, it is still used when off"
        with use_fused_kernels(**{name: False}):
            assert op not in ops_run_by(compiled, *tensors), "switched off by name, it is still used"
    assert op not in ops_run_by(compiled, *tensors), "it is still used after the block"


def test_settings_that_are_passed_are_heeded_by_a_compiled_function() -> None:
    image, table = numbers(2, 4, 6, 18), numbers(9, 2)
    compiled = torch.compile(
        lambda kernels: window_attention(image, table, window=2, shift=1, kernels=kernels),
        fullgraph=True,
        backend="aot_eager",
    )
    assert "savl::window_attention" in ops_run_by(compiled, KernelSettings.of("cpp"))
    assert "savl::window_attention" not in ops_run_by(compiled, KernelSettings.of("eager"))


def test_seeds_do_not_make_a_compiled_graph_each(extension: Any) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def sample(mu: torch.Tensor, seed: int) -> torch.Tensor:
        return gaussian_posterior(mu, mu, seed=seed, kernels=KernelSettings.of("cpp")).sample

    compiled = torch.compile(sample, fullgraph=True, backend=count)
    mu = torch.randn(1, 3, 4, 5)
    for seed in range(12):
        assert torch.equal(compiled(mu, seed), sample(mu, seed)), seed
    assert graphs <= 3, f"{graphs} graphs for 12 seeds"
