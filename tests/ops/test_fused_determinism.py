"""The C++ kernels give the same bits on every run and any number of threads, and the derivatives they promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import (
    KernelSettings,
    channel_modulation,
    gaussian_posterior,
    overlapping_window_attention,
    window_attention,
)
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Case
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

pytestmark = pytest.mark.usefixtures("extension")

CPP = KernelSettings.of("cpp")

# Large enough that threads get something to share: elementwise tasks are thousands of elements each.
SHARED = {
    "window": lambda dtype: window_attention_case(dtype, batch=2, rows=3, columns=5, window=4, shift=1, head_dim=9),
    "overlapping": lambda dtype: overlapping_window_attention_case(
        dtype, batch=2, rows=4, columns=5, window=3, key_window=7, head_dim=9
    ),
    "posterior-seed": lambda dtype: gaussian_posterior_case(dtype, channels=3, height=150, width=160, noise="seed"),
    "posterior-eps": lambda dtype: gaussian_posterior_case(dtype, channels=3, height=150, width=160),
    "modulation": lambda dtype: channel_modulation_case(dtype, height=50, width=40, channels=21),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("name", SHARED)
def test_any_number_of_threads_gives_the_same_bits(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    case = SHARED[name](dtype)
    threads(1)
    expected = case.run("cpp")
    for count in (1, 2, 3, 4, 4):
        threads(count)
        found = case.run("cpp")
        different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
        assert not different, f"{different} differ on {count} threads"


def test_repeated_runs_give_the_same_bits(small_case: Callable[..., Case]) -> None:
    case = small_case()
    first = case.run("cpp")
    for run in range(3):
        found = case.run("cpp")
        different = [name for name, value in first.items() if not torch.equal(found[name], value)]
        assert not different, f"{different} differ on run {run + 2}"


# Derivatives


def leaves(case: Case) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in case.arguments.values() if value is not None]


TINY: dict[str, tuple[Case, Callable[..., Any]]] = {
    **{
        f"window-shift{shift}": (
            window_attention_case(torch.float64, window=2, shift=shift, head_dim=2, rows=2, columns=1),
            lambda *t, shift=shift: window_attention(*t, window=2, shift=shift, kernels=CPP),
        )
        for shift in (0, 1)
    },
    "window-plain": (
        window_attention_case(torch.float64, window=2, shift=1, head_dim=3, rows=1, columns=1, severity=False),
        lambda *t: window_attention(*t, window=2, shift=1, kernels=CPP),
    ),
    "overlapping": (
        overlapping_window_attention_case(torch.float64, window=2, key_window=4, head_dim=2, rows=1, columns=2),
        lambda *t: overlapping_window_attention(*t, window=2, key_window=4, kernels=CPP),
    ),
    "overlapping-far": (
        overlapping_window_attention_case(torch.float64, window=1, key_window=5, head_dim=1, rows=2, columns=3),
        lambda *t: overlapping_window_attention(*t, window=1, key_window=5, kernels=CPP),
    ),
    "modulation": (
        channel_modulation_case(torch.float64, height=2, width=2, channels=3),
        lambda *t: channel_modulation(*t, kernels=CPP),
    ),
    "modulation-plain": (
        channel_modulation_case(torch.float64, height=2, width=2, channels=3, beta=False),
        lambda a, g, r: channel_modulation(a, g, None, r, kernels=CPP),
    ),
    # logvar is small in these: no severity comes near the kinks of the clamp.
    "posterior-eps": (
        gaussian_posterior_case(torch.float64, channels=3, height=2, width=3),
        lambda *t: tuple(gaussian_posterior(*t, kernels=CPP)),
    ),
    "posterior-seed": (
        gaussian_posterior_case(torch.float64, channels=3, height=2, width=3, noise="seed"),
        lambda *t: tuple(gaussian_posterior(*t, seed=3, offset=2, kernels=CPP)),
    ),
    "posterior-none": (
        gaussian_posterior_case(torch.float64, channels=3, height=2, width=3, noise="none"),
        lambda *t: tuple(gaussian_posterior(*t, kernels=CPP))[1:],
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    case, function = TINY[name]
    assert torch.autograd.gradcheck(function, leaves(case))


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


@pytest.mark.parametrize("name", TINY)
def test_each_gradient_is_the_same_when_it_is_asked_for_alone(name: str) -> None:
    case, function = TINY[name]
    together = leaves(case)
    out = function(*together)
    outputs = (out,) if isinstance(out, Tensor) else out
    seeds = [torch.randn_like(value) for value in outputs]
    expected = torch.autograd.grad(outputs, together, seeds, allow_unused=True)
    for index, value in enumerate(expected):
        alone = [leaf.detach().requires_grad_(place == index) for place, leaf in enumerate(together)]
        out = function(*alone)
        pairs = [
            (output, seed)
            for output, seed in zip((out,) if isinstance(out, Tensor) else out, seeds, strict=True)
            if output.requires_grad
        ]
        (found,) = torch.autograd.grad([o for o, _ in pairs], [alone[index]], [s for _, s in pairs], allow_unused=True)
        assert value is not None
        assert found is not None, f"argument {index} got no gradient"
        torch.testing.assert_close(found, value, msg=lambda m, index=index: f"argument {index}: {m}")


@pytest.mark.parametrize("name", TINY)
def test_second_derivatives_are_refused_and_the_way_out_is_named(name: str) -> None:
    case, function = TINY[name]
    given = leaves(case)
    out = function(*given)
    total = out.square().sum() if isinstance(out, Tensor) else sum(value.square().sum() for value in out)
    gradient = torch.autograd.grad(total, given, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative.*second derivatives.*use_fused_kernels\(False\)"):
        torch.autograd.grad(sum(value.sum() for value in gradient), given)
