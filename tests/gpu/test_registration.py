"""Tests of the registration of the ops on a GPU, and of the backends that serve there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.ops import (
    KernelUnavailable,
    gaussian_posterior,
    kernel_report,
    use_fused_kernels,
)
from savl.ops.gaussian_posterior import SEVERITY_EPS, SEVERITY_MAX
from savl.ops.op import OPS, why_unavailable

BackendOf = Callable[[str], str]

ON_GPU = [name for name, op in OPS.items() if op.backend_for("cuda") is not None]
"""The ops that have a kernel for GPUs."""
TAIL = (SEVERITY_EPS, SEVERITY_MAX)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def windows(window: int, shift: int, key_window: int | None = None, mask: float = float("-inf")) -> tuple[Any, ...]:
    """Return the arguments of window attention after its tensors: two heads, square windows."""
    keys = window if key_window is None else key_window
    return 2, window, window, keys, keys, shift, shift, False, mask


def calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Return arguments of every op, on the CPU."""
    image, table, severity = numbers(2, 8, 12, 42), numbers(49, 2), numbers(2, 8, 12).abs()
    q, kv, far = numbers(2, 8, 12, 14), numbers(2, 8, 12, 28), numbers(81, 2)
    k, v, scale, absent = numbers(2, 4, 6, 14), numbers(2, 4, 6, 14), numbers(2), (None,) * 4
    mu, logvar, eps = (numbers(2, 3, 4, size) for size in (5, 5, 5))
    interleaved = [value.contiguous(memory_format=torch.channels_last) for value in (mu, logvar, eps)]
    a, g, b, r = (numbers(2, 3, 4, 5) for _ in range(4))
    half = [value.bfloat16() for value in (a, g, b)]
    weight, bias = numbers(5), numbers(5)
    return {
        "window": ("window_attention", (image, table, severity, *absent, *windows(4, 1))),
        "window-plain": ("window_attention", (image, table, None, *absent, *windows(4, 0))),
        "window-autocast": ("window_attention", (image.bfloat16(), table, severity, *absent, *windows(4, 1))),
        "window-half": ("window_attention", (image.half(), table, severity, *absent, *windows(4, 1))),
        "window-dense-cosine": (
            "window_attention",
            (q, None, None, k, v, numbers(2, 16, 4), scale, *windows(4, 2, 2, -1.0)),
        ),
        "overlapping": ("overlapping_window_attention", (q, kv, far, severity, 4, 6)),
        "overlapping-plain": ("overlapping_window_attention", (q, kv, far, None, 4, 6)),
        "overlapping-autocast": ("overlapping_window_attention", (q.bfloat16(), kv.bfloat16(), far, severity, 4, 6)),
        "posterior-eps": ("gaussian_posterior", (mu, logvar, eps, None, 0, *TAIL)),
        "posterior-seed": ("gaussian_posterior", (mu, logvar, None, -3, 7, *TAIL)),
        "posterior-none": ("gaussian_posterior", (mu, logvar, None, None, 0, *TAIL)),
        "posterior-channels-last": ("gaussian_posterior", (*interleaved, None, 0, *TAIL)),
        "posterior-half": ("gaussian_posterior", (mu.half(), logvar.half(), None, 5, 0, *TAIL)),
        "modulation": ("channel_modulation", (a, g, b, r)),
        "modulation-plain": ("channel_modulation", (a, g, None, r)),
        "modulation-autocast": ("channel_modulation", (*half, r)),
        "norm": ("layer_norm", (a, weight, bias, 1e-5, False)),
        "norm-half": ("layer_norm", (a.half(), weight.half(), bias.half(), 1e-5, False)),
        "norm-autocast": ("layer_norm", (half[0], weight, bias, 1e-5, True)),
    }


CALLS = calls()


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)  # cuda keeps the strides


def backward_call(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the op's backward pass, computed by its forward pass."""
    results = getattr(torch.ops.savl, op)(*args)
    if op.endswith("attention"):
        out, lse = results
        tensors = 7 if op == "window_attention" else 4
        return (torch.ones_like(out), *args[:tensors], out, lse, *args[tensors:])
    if op == "gaussian_posterior":
        mu, logvar, eps, seed, offset, *_ = args
        _, kl, *_ = results
        sampled = eps is not None or seed is not None
        grad_sample = torch.ones_like(mu) if sampled else None
        return (grad_sample, torch.ones_like(kl), torch.ones_like(kl), mu, logvar, eps, seed, offset, eps is not None)
    if op == "layer_norm":
        out, *kept = results
        return (torch.ones_like(out), *args[:3], *kept)
    attended, gamma, *_ = args
    return (torch.ones_like(results), attended, gamma)


def test_every_op_is_covered_by_this_file() -> None:
    assert {op for op, _ in CALLS.values()} == set(ON_GPU)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts_the_registration(name: str, backend_of: BackendOf) -> None:
    op, args = CALLS[name]
    backend_of(op)
    given = on_gpu(args)
    wanting = tuple(arg.clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in given)
    torch.library.opcheck(getattr(torch.ops.savl, op).default, wanting)
    torch.library.opcheck(getattr(torch.ops.savl, f"{op}_backward").default, backward_call(op, given))


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_kernel_returns_the_same_metadata_as_the_real_one(name: str, backend_of: BackendOf) -> None:
    op, args = CALLS[name]
    backend_of(op)
    args = on_gpu(args)
    for called, given in ((op, args), (f"{op}_backward", backward_call(op, args))):
        real = getattr(torch.ops.savl, called)(*given)
        with FakeTensorMode() as mode:
            fake = getattr(torch.ops.savl, called)(
                *(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in given)
            )
        pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
        for index, (found, promised) in enumerate(pairs):
            assert promised.shape == found.shape, f"{called}: output {index}"
            assert promised.dtype == found.dtype, f"{called}: output {index}"
            assert promised.device == found.device, f"{called}: output {index}"
            assert promised.stride() == found.stride(), f"{called}: output {index}"


# Compilation and export

Call = tuple[Callable[..., Any], list[Tensor]]


def public_calls() -> dict[str, Call]:
    """Return small cases of every op as functions of tensors; the first case of an op has the name of the op."""
    found = {
        f"{name}-{index}" if index else name: op.case(torch.float32, **settings).function()
        for name, op in OPS.items()
        if name in ON_GPU
        for index, settings in enumerate(op.small_cases)
    }
    found["gaussian_posterior-largest-seed"] = (
        lambda *tensors: tuple(gaussian_posterior(*tensors, seed=2**64 - 1)),
        [numbers(2, 3, 4, 5), numbers(2, 3, 4, 5)],
    )
    return found


PUBLIC = public_calls()


def run(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients."""
    given = [value.detach().cuda().requires_grad_() for value in tensors]
    out = function(*given)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    total = sum(value.square().sum() for value in outputs)
    gradients = torch.autograd.grad(total, given, allow_unused=True)
    return [value.detach() for value in outputs] + [value for value in gradients if value is not None]


def ops_run_by(function: Callable[..., Any], tensors: list[Tensor]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(function, tensors)
    return {event.key for event in profile.key_averages() if event.key.startswith("savl::")}


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_an_op_compiled_by_inductor_returns_the_same_as_the_op(name: str, backend_of: BackendOf) -> None:
    function, tensors = PUBLIC[name]
    op = name.partition("-")[0]
    backend_of(op)
    with use_fused_kernels():
        expected = run(function, tensors)
        compiled = torch.compile(function, fullgraph=True)
        found = run(compiled, tensors)
        assert {f"savl::{op}", f"savl::{op}_backward"} <= ops_run_by(compiled, tensors)
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(value, wanted, msg=lambda m, index=index: f"result {index}: {m}")


class Attend(torch.nn.Module):
    """A module that calls an op, for export."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_exported_op_returns_the_same_as_the_op(name: str, backend_of: BackendOf) -> None:
    function, tensors = PUBLIC[name]
    op = name.partition("-")[0]
    backend_of(op)
    given = tuple(value.cuda() for value in tensors)
    with use_fused_kernels(), torch.no_grad():
        program = torch.export.export(Attend(function), given)
        expected = function(*given)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(target.startswith(f"savl.{op}.") for target in targets), targets
    torch.testing.assert_close(program.module()(*given), expected)


# The backend in use


@pytest.mark.parametrize("op", ON_GPU)
def test_the_report_names_the_backend_for_the_gpu(op: str, backend_of: BackendOf) -> None:
    backend = backend_of(op)
    with use_fused_kernels():
        report = kernel_report()
    assert report.serving(op, "cuda") == backend
    assert torch.cuda.get_device_name(0) in report.gpus
    assert torch.cuda.get_device_name(0) in str(report)
    with use_fused_kernels(False):
        report = kernel_report()
    assert report.serving(op, "cuda") == "eager"
    (status,) = [status for status in report.statuses if (status.op, status.backend) == (op, backend)]
    assert "switched off" in status.reason


@pytest.mark.parametrize("op", ON_GPU)
def test_the_fused_kernel_serves_the_gpu_when_it_is_switched_on(op: str, backend_of: BackendOf) -> None:
    backend_of(op)
    function, tensors = PUBLIC[op]
    assert not ops_run_by(function, tensors), "the tests begin with eager"
    with use_fused_kernels():
        assert ops_run_by(function, tensors) == {f"savl::{op}", f"savl::{op}_backward"}


@pytest.mark.parametrize("op", ON_GPU)
def test_float64_is_refused_if_the_backend_is_requested_and_uses_eager_otherwise(
    op: str, backend_of: BackendOf
) -> None:
    backend = backend_of(op)
    function, tensors = PUBLIC[op]
    wide = [value.double() for value in tensors]
    with use_fused_kernels(**{op: backend}), pytest.raises(KernelUnavailable, match=f"{op}.*{backend}.*float64"):
        run(function, wide)
    with use_fused_kernels(False):
        expected = run(function, wide)
    with use_fused_kernels():
        assert not ops_run_by(function, wide)
        found = run(function, wide)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("op", ON_GPU)
def test_a_backend_of_the_cpu_refuses_tensors_of_the_gpu(op: str) -> None:
    function, tensors = PUBLIC[op]
    choice: dict[str, Any] = {op: "cpp"}
    if why_unavailable(op, "cpp") is not None:
        pytest.skip(str(why_unavailable(op, "cpp")))
    with use_fused_kernels(**choice), pytest.raises(KernelUnavailable, match=f"{op}.*cpp.*on cuda"):
        function(*(value.cuda() for value in tensors))
