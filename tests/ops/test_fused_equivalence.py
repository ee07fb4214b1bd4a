"""The C++ kernels compute what the reference computes, within twice the rounding error of the eager path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from savl.ops import KernelSettings, overlapping_window_attention, window_attention
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.convolution import convolution_case
from savl.ops.equivalence import Case
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.layer_norm import layer_norm_case
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

pytestmark = pytest.mark.usefixtures("instruction_set", "one_thread")

Check = Callable[[Callable[[int], Case]], None]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])


# Window attention


@DTYPES
@pytest.mark.parametrize(
    "settings",
    [
        {"window": 4, "head_dim": 8},
        {"window": 4, "head_dim": 24, "shift": 2, "batch": 2},
        {"window": 4, "head_dim": 1, "shift": 3, "heads": 3},
        {"window": 5, "head_dim": 30, "shift": 2},
        {"window": 5, "head_dim": 7, "shift": 4, "severity": False},
        {"window": 8, "head_dim": 24, "rows": 1},
        {"window": 8, "head_dim": 24, "shift": 4, "heads": 1},
        {"window": 8, "head_dim": 30, "shift": 1, "rows": 1, "columns": 1},
        {"window": 8, "head_dim": 64, "shift": 7, "severity": False, "columns": 1},
        {"window": 12, "head_dim": 13, "shift": 6, "rows": 1, "columns": 2},
        {"window": 16, "head_dim": 24, "shift": 8, "rows": 1, "columns": 1},
        {"window": 16, "head_dim": 30, "severity": False, "rows": 1, "columns": 1, "heads": 1},
        {"window": 1, "head_dim": 6, "rows": 3, "columns": 4},
        {"window": 2, "head_dim": 3, "shift": 1, "rows": 3, "columns": 5},
    ],
    ids=lambda settings: "-".join(f"{name}{value}" for name, value in settings.items()),
)
def test_window_attention_is_as_accurate_as_eager(
    dtype: torch.dtype, settings: dict[str, Any], assert_within_budget: Check
) -> None:
    assert_within_budget(lambda seed: window_attention_case(dtype, seed=seed, **settings))


# Overlapping window attention


@DTYPES
@pytest.mark.parametrize(
    "settings",
    [
        {"window": 4, "key_window": 6, "head_dim": 8, "batch": 2},
        {"window": 4, "key_window": 4, "head_dim": 24},
        {"window": 4, "key_window": 12, "head_dim": 30, "severity": False},
        {"window": 5, "key_window": 9, "head_dim": 7, "rows": 1, "columns": 3},
        {"window": 8, "key_window": 12, "head_dim": 24},
        {"window": 8, "key_window": 12, "head_dim": 64, "heads": 1, "rows": 1, "severity": False},
        {"window": 12, "key_window": 18, "head_dim": 30, "rows": 1, "columns": 1},
        {"window": 16, "key_window": 24, "head_dim": 24, "heads": 1, "rows": 1, "columns": 1},
        {"window": 2, "key_window": 10, "head_dim": 11, "rows": 3, "columns": 4},
        {"window": 1, "key_window": 3, "head_dim": 5, "rows": 4, "columns": 3},
    ],
    ids=lambda settings: "-".join(f"{name}{value}" for name, value in settings.items()),
)
def test_overlapping_attention_is_as_accurate_as_eager(
    dtype: torch.dtype, settings: dict[str, Any], assert_within_budget: Check
) -> None:
    assert_within_budget(lambda seed: overlapping_window_attention_case(dtype, seed=seed, **settings))


# The field's ops


def channels_last(case: Case) -> Case:
    arguments = {
        name: None if value is None else value.contiguous(memory_format=torch.channels_last)
        for name, value in case.arguments.items()
    }
    return dataclasses.replace(case, arguments=arguments, label=f"{case.label}, channels last")


@DTYPES
@pytest.mark.parametrize("noise", ["eps", "seed", "none"])
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize(
    "shape", [(2, 64, 9, 8), (1, 5, 17, 31), (3, 1, 4, 4), (1, 19, 1, 70), (2, 8, 60, 1), (1, 3, 1, 1)], ids=str
)
def test_the_posterior_is_as_accurate_as_eager(
    dtype: torch.dtype, noise: str, layout: str, shape: tuple[int, ...], assert_within_budget: Check
) -> None:
    batch, channels, height, width = shape

    def make(seed: int) -> Case:
        case = gaussian_posterior_case(
            dtype, batch=batch, channels=channels, height=height, width=width, noise=noise, seed=seed
        )
        return case if layout == "planar" else channels_last(case)

    assert_within_budget(make)


@DTYPES
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no-beta"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 144), (1, 3, 4, 7), (3, 1, 1, 1), (1, 9, 1, 33)], ids=str)
def test_channel_modulation_is_as_accurate_as_eager(
    dtype: torch.dtype, beta: bool, shape: tuple[int, ...], assert_within_budget: Check
) -> None:
    batch, height, width, channels = shape
    assert_within_budget(
        lambda seed: channel_modulation_case(
            dtype, batch=batch, height=height, width=width, channels=channels, beta=beta, seed=seed
        )
    )


@DTYPES
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 144), (1, 9, 7, 48), (1, 3, 4, 7), (3, 2, 2, 1), (1, 40, 33, 19), (1, 1, 2, 600)], ids=str
)
def test_layer_norm_is_as_accurate_as_eager(
    dtype: torch.dtype, shape: tuple[int, ...], assert_within_budget: Check
) -> None:
    batch, height, width, channels = shape
    assert_within_budget(
        lambda seed: layer_norm_case(dtype, batch=batch, height=height, width=width, channels=channels, seed=seed)
    )


@DTYPES
def test_a_large_mean_takes_no_digits_from_the_variance(dtype: torch.dtype, assert_within_budget: Check) -> None:
    def shifted(seed: int) -> Case:
        case = layer_norm_case(dtype, batch=1, height=4, width=5, channels=48, seed=seed)
        x = case.arguments["x"]
        assert x is not None
        return dataclasses.replace(case, arguments={**case.arguments, "x": x + 100})

    assert_within_budget(shifted)


@DTYPES
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 2, "height": 6, "width": 5, "channels": 144, "outputs": 12, "norm": True, "activation": "gelu"},
        {"batch": 1, "height": 9, "width": 33, "channels": 6, "outputs": 49, "gate": (3, 1), "activation": "gelu"},
        {"batch": 3, "height": 3, "width": 4, "channels": 33, "outputs": 15, "norm": True, "modulation": True},
        {"batch": 1, "height": 1, "width": 66, "channels": 19, "outputs": 3, "bias": False, "residual": True},
    ],
    ids=lambda settings: "-".join(f"{name}{value}" for name, value in settings.items()),
)
def test_convolution_is_as_accurate_as_eager(
    dtype: torch.dtype, side: int, settings: dict[str, Any], assert_within_budget: Check
) -> None:
    assert_within_budget(lambda seed: convolution_case(dtype, side=side, seed=seed, **settings))


# Mixed dtypes under autocast


def in_float32(case: Case, *names: str) -> Case:
    """The case with arguments that a bfloat16 one gets in float32: other numbers, not rounded to bfloat16."""
    generator = torch.Generator().manual_seed(int(case.arguments[names[0]].double().sum() * 1000) % 2**31)  # type: ignore[union-attr]
    arguments = dict(case.arguments)
    for name in names:
        value = arguments[name]
        assert value is not None
        jitter = torch.rand(value.shape, generator=generator)
        arguments[name] = value.float() * (1 + 2**-9 * jitter)
    return dataclasses.replace(case, arguments=arguments, label=f"{case.label}, {' and '.join(names)} float32")


@pytest.mark.parametrize("names", [("bias_table", "severity"), ("bias_table",), ("severity",)], ids="+".join)
def test_bfloat16_features_go_with_a_float32_table_and_severity(
    names: tuple[str, ...], assert_within_budget: Check
) -> None:
    assert_within_budget(
        lambda seed: in_float32(window_attention_case(torch.bfloat16, window=4, shift=1, seed=seed), *names)
    )
    assert_within_budget(
        lambda seed: in_float32(
            overlapping_window_attention_case(torch.bfloat16, window=4, key_window=6, seed=seed), *names
        )
    )


@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no-beta"])
def test_bfloat16_features_go_on_a_float32_residual(beta: bool, assert_within_budget: Check) -> None:
    assert_within_budget(
        lambda seed: in_float32(
            channel_modulation_case(torch.bfloat16, height=4, width=5, channels=37, beta=beta, seed=seed), "residual"
        )
    )


@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_features_are_normalised_with_float32_parameters(
    dtype: torch.dtype, names: tuple[str, ...], assert_within_budget: Check
) -> None:
    assert_within_budget(
        lambda seed: in_float32(layer_norm_case(dtype, height=4, width=5, channels=37, seed=seed), *names)
    )


@pytest.mark.parametrize("names", [("weight",), ("bias", "gate"), ("weight", "bias", "gate")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_features_are_convolved_with_float32_parameters(
    dtype: torch.dtype, names: tuple[str, ...], assert_within_budget: Check
) -> None:
    sizes: dict[str, Any] = {"height": 4, "width": 6, "channels": 19, "outputs": 21, "gate": (2, 3)}

    def make(seed: int, side: int) -> Case:
        case = convolution_case(dtype, side=side, norm=True, activation="gelu", seed=seed, **sizes)
        norm = ("norm_weight", "norm_bias") if "weight" in names else ()
        return in_float32(case, *names, *norm)

    assert_within_budget(lambda seed: make(seed, 1))
    assert_within_budget(lambda seed: make(seed, 3))


@pytest.mark.parametrize("names", [("bias_table",), ("severity",), ("bias_table", "severity")], ids="+".join)
def test_float64_features_go_with_a_float32_table_and_severity(
    names: tuple[str, ...], assert_within_budget: Check
) -> None:
    assert_within_budget(
        lambda seed: in_float32(window_attention_case(torch.float64, window=4, shift=1, seed=seed), *names)
    )


# Shapes that nobody thought of. Not the tiniest: of a handful of numbers the eager path may hit all nearly exactly.


@DTYPES
@given(
    window=st.integers(3, 7),
    shift=st.integers(0, 6),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.integers(4, 40),
    severity=st.booleans(),
    batch=st.integers(1, 2),
)
@settings(max_examples=10)
def test_any_window_attention_is_as_right_as_eager(
    dtype: torch.dtype, assert_within_budget: Check, shift: int, window: int, **settings: Any
) -> None:
    assert_within_budget(
        lambda seed: window_attention_case(dtype, window=window, shift=shift % window, seed=seed, **settings)
    )


@DTYPES
@given(
    window=st.integers(3, 5),
    margin=st.integers(0, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    heads=st.integers(1, 2),
    head_dim=st.integers(4, 40),
    severity=st.booleans(),
)
@settings(max_examples=10)
def test_any_overlapping_attention_is_as_right_as_eager(
    dtype: torch.dtype, assert_within_budget: Check, window: int, margin: int, **settings: Any
) -> None:
    assert_within_budget(
        lambda seed: overlapping_window_attention_case(
            dtype, window=window, key_window=window + 2 * margin, seed=seed, **settings
        )
    )


@DTYPES
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    noise=st.sampled_from(["eps", "seed", "none"]),
)
@settings(max_examples=10)
def test_any_posterior_is_as_right_as_eager(dtype: torch.dtype, assert_within_budget: Check, **settings: Any) -> None:
    assert_within_budget(lambda seed: gaussian_posterior_case(dtype, seed=seed, **settings))


@DTYPES
@given(
    batch=st.integers(1, 2),
    height=st.integers(3, 12),
    width=st.integers(3, 40),
    channels=st.integers(3, 70),
    outputs=st.integers(3, 70),
    side=st.sampled_from([1, 3]),
    dilation=st.integers(1, 4),
    activation=st.sampled_from(["none", "gelu", "leaky_relu"]),
    norm=st.booleans(),
    bias=st.booleans(),
    modulation=st.booleans(),
)
@settings(max_examples=10)
def test_any_convolution_is_as_right_as_eager(dtype: torch.dtype, assert_within_budget: Check, **settings: Any) -> None:
    assert_within_budget(lambda seed: convolution_case(dtype, seed=seed, **settings))


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_under_autocast_the_output_keeps_the_dtype_of_its_input(extension: Any, backend: str) -> None:
    kernels = KernelSettings.of(backend)
    qkv, table = torch.randn(1, 4, 4, 24), torch.zeros(49, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert window_attention(qkv, table, window=4, kernels=kernels).dtype == torch.float32
        q, kv = qkv.split((8, 16), dim=-1)
        overlapping = overlapping_window_attention(q, kv, table, window=4, key_window=4, kernels=kernels)
        assert overlapping.dtype == torch.float32
