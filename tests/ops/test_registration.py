"""The ops as torch sees them: schemas, fake kernels, autograd, and compilation with the switch in both positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.ops import (
    KernelSettings,
    channel_modulation,
    gaussian_posterior,
    layer_norm,
    overlapping_window_attention,
    use_fused_kernels,
    window_attention,
)
from savl.ops.gaussian_posterior import SEVERITY_EPS, SEVERITY_MAX
from savl.ops.op import OPS

pytestmark = pytest.mark.usefixtures("extension")

TAIL = (SEVERITY_EPS, SEVERITY_MAX)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Arguments of every op, backward ones included, with what is optional given and left out."""
    image, table = numbers(2, 4, 6, 18), numbers(9, 2)
    severity, out = numbers(2, 4, 6).abs(), numbers(2, 4, 6, 6)
    q, kv, far = numbers(2, 4, 6, 6), numbers(2, 4, 6, 12), numbers(25, 2)
    mu, logvar, eps = (numbers(2, 3, 4, size) for size in (5, 5, 5))
    interleaved = [value.contiguous(memory_format=torch.channels_last) for value in (mu, logvar, eps)]
    maps = numbers(2, 4, 5), numbers(2, 4, 5)
    a, g, b, r = (numbers(2, 3, 4, 5) for _ in range(4))
    half = [value.bfloat16() for value in (a, g, b)]
    weight, bias, kept = numbers(5), numbers(5), (numbers(2, 3, 4), numbers(2, 3, 4).exp())
    return {
        "window": ("window_attention", (image, table, severity, 2, 1)),
        "window-plain": ("window_attention", (image, table, None, 2, 0)),
        "window-autocast": ("window_attention", (image.bfloat16(), table, severity, 2, 1)),
        "window-backward": ("window_attention_backward", (out, image, table, severity, None, None, 2, 1)),
        "window-backward-plain": ("window_attention_backward", (out, image, table, None, None, None, 2, 0)),
        "overlapping": ("overlapping_window_attention", (q, kv, far, severity, 2, 4)),
        "overlapping-plain": ("overlapping_window_attention", (q, kv, far, None, 2, 4)),
        "overlapping-backward": (
            "overlapping_window_attention_backward",
            (out, q, kv, far, severity, None, None, 2, 4),
        ),
        "overlapping-backward-plain": (
            "overlapping_window_attention_backward",
            (out, q, kv, far, None, None, None, 2, 4),
        ),
        "posterior-eps": ("gaussian_posterior", (mu, logvar, eps, None, 0, *TAIL)),
        "posterior-seed": ("gaussian_posterior", (mu, logvar, None, -3, 7, *TAIL)),
        "posterior-none": ("gaussian_posterior", (mu, logvar, None, None, 0, *TAIL)),
        "posterior-channels-last": ("gaussian_posterior", (*interleaved, None, 0, *TAIL)),
        "posterior-channels-last-seed": ("gaussian_posterior", (*interleaved[:2], None, 5, 0, *TAIL)),
        "posterior-backward-eps": ("gaussian_posterior_backward", (mu, *maps, mu, logvar, eps, None, 0, True)),
        "posterior-backward-seed": ("gaussian_posterior_backward", (mu, *maps, mu, logvar, None, 5, 2, False)),
        "posterior-backward-none": (
            "gaussian_posterior_backward",
            (None, None, maps[0], mu, logvar, None, None, 0, False),
        ),
        "posterior-backward-channels-last": (
            "gaussian_posterior_backward",
            (mu, None, maps[1], *interleaved, None, 0, True),
        ),
        "modulation": ("channel_modulation", (a, g, b, r)),
        "modulation-plain": ("channel_modulation", (a, g, None, r)),
        "modulation-autocast": ("channel_modulation", (*half, r)),
        "modulation-backward": ("channel_modulation_backward", (a, g, b)),
        "modulation-backward-autocast": ("channel_modulation_backward", (r, *half[:2])),
        "norm": ("layer_norm", (a, weight, bias, 1e-5, False)),
        "norm-mixed": ("layer_norm", (half[0], weight, bias, 1e-5, False)),
        "norm-wide": ("layer_norm", (half[0], weight, bias.bfloat16(), 1e-5, True)),
        "norm-backward": ("layer_norm_backward", (b, a, weight, bias, *kept)),
        "norm-backward-wide": ("layer_norm_backward", (b, half[0], weight, bias.bfloat16(), *kept)),
    }


CALLS = calls()


def test_every_op_and_its_backward_are_called_here() -> None:
    assert {op for op, _ in CALLS.values()} == {*OPS, *(f"{op}_backward" for op in OPS)}


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_nothing_wrong_with_the_registration(name: str) -> None:
    op, args = CALLS[name]
    if not op.endswith("_backward"):
        args = tuple(
            arg.detach().clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args
        )  # clone keeps the strides
    torch.library.opcheck(getattr(torch.ops.savl, op).default, args)


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_kernel_gives_what_the_real_one_gives(name: str) -> None:
    op, args = CALLS[name]
    real = getattr(torch.ops.savl, op)(*args)
    with FakeTensorMode() as mode:
        fake = getattr(torch.ops.savl, op)(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
    for index, (found, promised) in enumerate(pairs):
        assert promised.shape == found.shape, f"output {index}"
        assert promised.dtype == found.dtype, f"output {index}"
        assert promised.stride() == found.stride(), f"output {index}"


@pytest.mark.parametrize("op", OPS)
def test_a_schema_names_the_arguments_as_the_public_function_does(op: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.savl, op).default._schema.arguments]
    expected = {
        "window_attention": ["qkv", "bias_table", "severity", "window", "shift"],
        "overlapping_window_attention": ["q", "kv", "bias_table", "severity", "window", "key_window"],
        "gaussian_posterior": ["mu", "logvar", "eps", "seed", "offset", "severity_eps", "severity_max"],
        "channel_modulation": ["attended", "gamma", "beta", "residual"],
        "layer_norm": ["x", "weight", "bias", "eps", "wide"],
    }
    assert names == expected[op]
    assert not getattr(torch.ops.savl, op).default._schema.is_mutable


# Compilation

Call = tuple[Callable[..., Any], list[Tensor]]


def public_calls() -> dict[str, Call]:
    image, table, severity = numbers(2, 4, 6, 18), numbers(9, 2), numbers(2, 4, 6).abs()
    q, kv, far = numbers(2, 4, 6, 6), numbers(2, 4, 6, 12), numbers(25, 2)
    mu, logvar, eps = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5), numbers(2, 3, 4, 5)
    a, g, b, r = (numbers(2, 3, 4, 5) for _ in range(4))
    return {
        "window_attention": (lambda *t: window_attention(*t, window=2, shift=1), [image, table, severity]),
        "overlapping_window_attention": (
            lambda *t: overlapping_window_attention(*t, window=2, key_window=4),
            [q, kv, far, severity],
        ),
        "gaussian_posterior": (lambda *t: tuple(gaussian_posterior(*t)), [mu, logvar, eps]),
        "gaussian_posterior-seed": (lambda *t: tuple(gaussian_posterior(*t, seed=2**64 - 1)), [mu, logvar]),
        "gaussian_posterior-none": (lambda *t: tuple(gaussian_posterior(*t))[1:], [mu, logvar]),
        "channel_modulation": (channel_modulation, [a, g, b, r]),
        "channel_modulation-plain": (lambda x, y, z: channel_modulation(x, y, None, z), [a, g, r]),
        "layer_norm": (layer_norm, [a, numbers(5), numbers(5)]),
    }


PUBLIC = public_calls()


def run(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    given = [value.detach().clone().requires_grad_() for value in tensors]
    out = function(*given)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    gradients = torch.autograd.grad(sum(value.square().sum() for value in outputs), given)
    return [value.detach() for value in outputs] + list(gradients)


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_compiled_op_gives_what_the_op_gives(name: str) -> None:
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
    _, tensors = PUBLIC["window_attention"]
    compiled = torch.compile(
        lambda kernels: window_attention(*tensors, window=2, shift=1, kernels=kernels),
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
