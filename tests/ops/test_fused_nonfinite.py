"""Tests that the C++ kernels return NaN and infinity for exactly the same elements as the reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import KernelSettings, gaussian_posterior
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Case
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

pytestmark = pytest.mark.usefixtures("instruction_set", "one_thread")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])

CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "window": lambda dtype: window_attention_case(dtype, window=4, head_dim=5),
    "window-shifted": lambda dtype: window_attention_case(dtype, window=4, shift=1, head_dim=5),
    "window-shifted-plain": lambda dtype: window_attention_case(dtype, window=4, shift=2, head_dim=8, severity=False),
    "one-window-shifted": lambda dtype: window_attention_case(
        dtype, window=5, shift=3, head_dim=3, rows=1, columns=1, heads=1
    ),
    "overlapping": lambda dtype: overlapping_window_attention_case(dtype, window=4, key_window=6, head_dim=5),
    "posterior-eps": lambda dtype: gaussian_posterior_case(dtype, channels=5, height=5, width=7),
    "posterior-seed": lambda dtype: gaussian_posterior_case(dtype, channels=3, height=3, width=3, noise="seed"),
    "modulation": lambda dtype: channel_modulation_case(dtype, height=3, width=5, channels=9),
    "modulation-plain": lambda dtype: channel_modulation_case(dtype, height=3, width=4, channels=8, beta=False),
}


def with_value_at(case: Case, spots: dict[str, tuple[int, ...]], value: float) -> Case:
    arguments = dict(case.arguments)
    for name, spot in spots.items():
        tensor = arguments[name]
        assert tensor is not None
        arguments[name] = tensor.clone()
        arguments[name][spot] = value  # type: ignore[index]
    return dataclasses.replace(case, arguments=arguments)


def spots_of(tensor: Tensor) -> Iterator[tuple[int, ...]]:
    """Yield indices at the corners and inside. The corners of a shifted image share a window and are masked."""
    sizes = tensor.shape
    if tensor.dim() == 2:  # a table: the pair of far corners, no displacement at all, and in between
        yield from ((0, 0), (sizes[0] // 2, sizes[1] - 1), (sizes[0] // 3, 0))
        return
    last = tuple(size - 1 for size in sizes)
    yield tuple(0 for _ in sizes)
    yield last
    for part in range(3):  # of qkv: queries, keys, values
        yield tuple(
            (size // 2 if axis else 0) if axis < 3 else min(part * size // 3 + 1, size - 1)
            for axis, size in enumerate(sizes)
        )
    yield tuple(0 if axis == 1 else size - 1 for axis, size in enumerate(sizes))


def assert_same_nonfinite_results(case: Case, what: str) -> None:
    fused, eager = case.run("cpp"), case.run("eager")
    problems = []
    for name, expected in eager.items():
        found = fused[name]
        if name == "variance_mean":  # torch's running mean makes NaN of an infinity, a plain sum leaves it infinite
            if not torch.equal(found.isfinite(), expected.isfinite()):
                problems.append(f"{name}: {found.tolist()} where eager has {expected.tolist()}")
        elif not torch.equal(found.isnan(), expected.isnan()):
            problems.append(f"{name}: {int(found.isnan().sum())} NaN where eager has {int(expected.isnan().sum())}")
        elif not name.startswith("d "):
            for sign in (math.inf, -math.inf):
                if not torch.equal(found == sign, expected == sign):
                    problems.append(f"{name}: {sign} in other places than eager")
    assert not problems, f"{case.op} ({case.label}) with {what}: " + "; ".join(problems)


@DTYPES
@VALUES
@pytest.mark.parametrize("name", CASES)
def test_one_nan_or_infinity_affects_the_same_results_as_in_eager(name: str, value: float, dtype: torch.dtype) -> None:
    case = CASES[name](dtype)
    for argument, tensor in case.arguments.items():
        if tensor is None:
            continue
        # The logit of a pixel with itself contains the square of its severity. If its products overflow with both
        # signs, fused multiply-add keeps the first infinity and separate operations give NaN. Neither result is wrong.
        given = math.copysign(1e15, value) if argument == "severity" and math.isfinite(value) else value
        for spot in spots_of(tensor):
            assert_same_nonfinite_results(
                with_value_at(case, {argument: spot}, given), f"{given} in {argument}{list(spot)}"
            )


@DTYPES
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)], ids=["same-sign", "other-sign"])
@pytest.mark.parametrize("where", ["same-side", "masked"])
def test_products_that_overflow_pass_the_mask_as_in_eager(
    where: str, signs: tuple[int, int], dtype: torch.dtype
) -> None:
    case = window_attention_case(dtype, window=4, shift=1, head_dim=5, heads=1)
    # The last window of the shifted image holds row 7 and the wrapped row 0, which are masked from each other.
    row = 0 if where == "masked" else 7
    huge = 1e30 if dtype == torch.float32 else 1e200
    qkv = case.arguments["qkv"]
    assert qkv is not None
    qkv = qkv.clone()
    qkv[0, 7, 7, 0], qkv[0, row, 7, 5] = signs[0] * huge, signs[1] * huge
    arguments: dict[str, Any] = {**case.arguments, "qkv": qkv}
    assert_same_nonfinite_results(dataclasses.replace(case, arguments=arguments), f"q and k of {huge} ({where})")


@DTYPES
@VALUES
def test_a_nonfinite_pixel_that_no_other_window_overlaps_affects_one_window_only(
    dtype: torch.dtype, value: float
) -> None:
    case = overlapping_window_attention_case(dtype, window=4, key_window=6, rows=2, columns=3, head_dim=5)
    for spot in ((0, 1, 1, 0), (0, 0, 0, 3), (0, 3, 4, 2), (0, 7, 11, 9)):
        for argument in ("q", "kv"):
            assert_same_nonfinite_results(
                with_value_at(case, {argument: spot}, value), f"{value} in {argument}{list(spot)}"
            )
        if not math.isfinite(value):
            assert_same_nonfinite_results(
                with_value_at(case, {"severity": spot[:3]}, value), f"{value} in severity{list(spot[:3])}"
            )


@DTYPES
@pytest.mark.parametrize("value", [-1000.0, -104.0, -88.0, 88.0, 89.5, 178.5, 700.0, 1500.0])
def test_log_variances_at_the_ends_of_the_exponential_are_those_of_eager(dtype: torch.dtype, value: float) -> None:
    case = gaussian_posterior_case(dtype, channels=5, height=3, width=3)
    assert_same_nonfinite_results(with_value_at(case, {"logvar": (0, 2, 1, 1)}, value), f"logvar {value}")


@DTYPES
def test_arguments_full_of_nan_give_the_same_results_as_in_eager(dtype: torch.dtype) -> None:
    for make in CASES.values():
        case = make(dtype)
        for name, tensor in case.arguments.items():
            if tensor is not None:
                arguments = {**case.arguments, name: torch.full_like(tensor, math.nan)}
                assert_same_nonfinite_results(
                    dataclasses.replace(case, arguments=arguments), f"nothing but NaN in {name}"
                )


def test_a_variance_that_overflows_affects_the_gradient_of_its_own_pixel_only(extension: Any) -> None:
    gradients = []
    for backend in ("cpp", "eager"):
        logvar = torch.tensor([89.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4).requires_grad_()
        posterior = gaussian_posterior(torch.zeros_like(logvar), logvar, seed=1, kernels=KernelSettings.of(backend))
        (posterior.sample.sum() + posterior.kl.sum()).backward()
        gradients.append(logvar.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert int(torch.isfinite(gradients[0]).sum()) == 3
