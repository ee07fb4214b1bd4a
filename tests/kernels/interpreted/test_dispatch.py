"""The Triton ops under torch: registration, fake kernels, torch.compile, the switch, and a network that uses them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_checks import DTYPES, FLOAT16, FLOAT32, TRITON
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.kernels.configs import Problem
from savl.network import SAVL, SAVLConfig
from savl.ops import KernelSettings, KernelUnavailable, equivalence, kernel_report, use_fused_kernels, window_attention
from savl.ops.equivalence import verify
from savl.ops.op import OPS


def windows(shift: int, side: int = 2) -> tuple[Any, ...]:
    """Return the arguments of window attention after its tensors, for one head."""
    return 1, side, side, side, side, shift, shift, False, -math.inf


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    qkv, q, kv, severity = numbers(1, 2, 4, 15), numbers(1, 2, 4, 5), numbers(1, 2, 4, 10), numbers(1, 2, 4).abs()
    near, far, half, absent = numbers(9, 1), numbers(25, 1), FLOAT16, (None,) * 4
    k, v, dense, scale = numbers(1, 1, 4, 5), numbers(1, 1, 4, 5), numbers(1, 4, 2), numbers(1)
    return {
        "window_attention": ("window_attention", (qkv, near, severity, *absent, *windows(1))),
        "window_attention, plain": ("window_attention", (qkv, near, None, *absent, *windows(0))),
        "window_attention, float16": ("window_attention", (qkv.to(half), near, severity, *absent, *windows(1))),
        "window_attention, every other tensor": (
            "window_attention",
            (q, None, None, k, v, dense, scale, 1, 2, 2, 1, 2, 0, 1, False, -1.0),
        ),
        "window_attention, dilated": (
            "window_attention",
            (qkv, None, severity, *absent, 1, 2, 2, 2, 2, 0, 0, True, -math.inf),
        ),
        "overlapping_window_attention": ("overlapping_window_attention", (q, kv, far, severity, 2, 4)),
        "overlapping_window_attention, float16": (
            "overlapping_window_attention",
            (q.to(half), kv.to(half), far, None, 2, 4),
        ),
    }


OP_CALLS = op_calls()


def backward_arguments(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    out, lse = getattr(torch.ops.savl, op)(*args)
    tensors = 7 if op == "window_attention" else 4
    return (torch.ones_like(out), *args[:tensors], out, lse, *args[tensors:])


@pytest.mark.parametrize(
    "name",
    [
        "window_attention",
        "window_attention, float16",
        "window_attention, every other tensor",
        "overlapping_window_attention",
    ],
)
def test_opcheck_accepts_the_registration(name: str) -> None:
    op, args = OP_CALLS[name]
    given = tuple(arg.clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args)
    torch.library.opcheck(getattr(torch.ops.savl, op).default, given)
    torch.library.opcheck(getattr(torch.ops.savl, f"{op}_backward").default, backward_arguments(op, args))


@pytest.mark.parametrize("name", OP_CALLS)
def test_the_fake_kernel_returns_the_same_metadata_as_the_real_one(name: str) -> None:
    op, args = OP_CALLS[name]
    for called, given in ((op, args), (f"{op}_backward", backward_arguments(op, args))):
        real = getattr(torch.ops.savl, called)(*given)
        with FakeTensorMode() as mode:
            fake = getattr(torch.ops.savl, called)(
                *(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in given)
            )
        for index, (found, promised) in enumerate(zip(real, fake, strict=True)):
            for what in ("shape", "dtype", "device"):
                wanted, got = getattr(promised, what), getattr(found, what)
                assert wanted == got, f"{called}: output {index} has {what} {got}, promised was {wanted}"
            assert found.stride() == promised.stride(), f"{called}: output {index} has strides {found.stride()}"


def test_the_log_sum_exp_is_that_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    qkv, table = torch.randn(1, 4, 4, 3 * 6, generator=generator), torch.randn(49, 2, generator=generator)
    _, lse = torch.ops.savl.window_attention(qkv, table, *(None,) * 5, 2, *windows(0, 4)[1:])
    q, k, _ = qkv.double().view(16, 3, 2, 3).permute(1, 2, 0, 3)
    y, x = torch.arange(16) // 4, torch.arange(16) % 4
    index = (y[:, None] - y[None, :] + 3) * 7 + x[:, None] - x[None, :] + 3
    logits = q @ k.transpose(1, 2) / math.sqrt(3) + table.double()[index].permute(2, 0, 1)
    torch.testing.assert_close(lse.reshape(2, 16), logits.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-6)


def test_a_compiled_op_equals_the_op() -> None:
    def attend(qkv: Tensor, table: Tensor, severity: Tensor) -> Tensor:
        return window_attention(qkv, table, severity, window=2, shift=1, kernels=TRITON)

    _, (qkv, table, severity, *_) = OP_CALLS["window_attention"]
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        given = [value.clone().requires_grad_() for value in (qkv, table, severity)]
        out = function(*given)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_it_serves_only_when_asked_for_by_name() -> None:
    from savl.kernels import launch

    qkv, table = torch.randn(1, 4, 4, 24), torch.zeros(49, 2)
    attend = partial(window_attention, qkv, table, window=4)
    launched: list[str] = []
    run = launch.forward

    def spy(call: Any) -> Any:
        launched.append("forward")
        return run(call)

    with mock.patch.object(launch, "forward", spy):
        with use_fused_kernels():
            attend()
            assert kernel_report().serving("window_attention") == "eager"
        assert not launched, "the interpreter served without being asked for"
        with use_fused_kernels(window_attention="triton"):
            attend()
            assert kernel_report().serving("window_attention") == "triton"
        assert launched == ["forward"]


@pytest.mark.parametrize(("backend", "reason"), [("cpp", "interpreter"), ("triton", "float64")])
def test_a_backend_that_cannot_serve_gives_the_reason(backend: str, reason: str) -> None:
    qkv, table = torch.randn(1, 4, 4, 24, dtype=torch.float64), torch.zeros(49, 2, dtype=torch.float64)
    with pytest.raises(KernelUnavailable, match=reason):
        window_attention(qkv, table, window=4, kernels=KernelSettings(window_attention=backend))


def test_resources_of_interpreted_kernels_are_refused() -> None:
    from savl.kernels.compile_ahead_of_time import resources

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        resources("forward", Problem("bfloat16", 24, 16, 16), None, (9, 0), severity=True, shifted=True)


SMALL = {
    "window_attention": {"window": 4, "shift": 1, "rows": 1, "columns": 1, "heads": 2},
    "overlapping_window_attention": {"window": 3, "key_window": 5, "rows": 1, "columns": 1, "heads": 2},
    "layer_norm": {"batch": 1, "height": 3, "width": 5, "channels": 19},
    "convolution": {"batch": 1, "height": 3, "width": 5, "channels": 19, "outputs": 21, "norm": True},
    "channel_gate": {"batch": 1, "height": 4, "width": 6, "channels": 3, "outputs": 5, "squeezed": 2},
    "guided_projection": {"height": 3, "width": 5, "inner": 19, "channels": 21, "latent": 7},
    "projection_mlp": {"height": 3, "width": 4, "inner": 9, "channels": 11, "convolved": 2, "expanded": 13},
}


@pytest.mark.parametrize("op", SMALL)
def test_verify_tries_both_dtypes_that_the_interpreter_gets_right(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name, record in OPS.items() if record.interpreter_cases} == set(SMALL)
    monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], interpreter_cases=(SMALL[op],)))
    monkeypatch.setattr(equivalence, "QUICK_DRAWS", 3)
    verdicts = list(verify(op, "triton", quick=True))
    assert [verdict.dtype for verdict in verdicts] == DTYPES
    broken = [f"{verdict.worst} in {verdict.dtype}" for verdict in verdicts if not verdict.worst.kept]
    assert not broken


@pytest.mark.slow
def test_a_network_has_the_output_and_the_gradients_of_eager(small_config: Callable[..., SAVLConfig]) -> None:
    torch.manual_seed(0)
    model = SAVL(small_config(depths=(2,))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    lr = torch.rand(1, 3, 3, 4)  # padded to one window
    results = []
    for settings in (TRITON, KernelSettings.of("eager")):
        model.zero_grad()
        with use_fused_kernels(**vars(settings)):
            sr = model(lr)
            sr.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"sr": sr.detach(), **gradients})
    fused, eager = results
    assert fused.keys() == eager.keys()
    tables = [name for name in eager if "bias_table" in name and bool(eager[name].any())]
    assert len(tables) >= 3, f"only {tables} have a gradient"
    for name, expected in eager.items():
        # Both are float32: a mistake is far larger than rounding is after twenty layers.
        bound = 1e-3 * float(expected.abs().max()) + 1e-9
        error = float((fused[name] - expected).abs().max())
        assert error <= bound, f"{name} is off by {error:.3g}, more than {bound:.3g}"
