"""Which elements the kernels read and write: every layout, empty batches, far addresses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from unittest import mock

import torch
from case_tools import (
    DTYPES,
    FLOAT16,
    FLOAT32,
    OVERLAPPING,
    TRITON,
    WINDOW,
    argument,
    assert_same_bits,
    case,
    case_for,
    changed,
    empty_is_nan,
)
from torch import Tensor

from savl.ops import overlapping_window_attention, window_attention
from savl.ops.equivalence import Case

# With tails of tiles in queries, keys and the head dimension.
AWKWARD: dict[str, Callable[[torch.dtype], Case]] = {
    "window": lambda dtype: WINDOW(dtype, window=5, shift=2, rows=1, columns=1, heads=2, head_dim=7),
    "overlapping": lambda dtype: OVERLAPPING(dtype, window=5, key_window=9, rows=1, columns=2, heads=1, head_dim=7),
    "plain": lambda dtype: WINDOW(dtype, window=3, rows=2, columns=1, heads=1, head_dim=30, severity=False),
}


@case_for(*(f"{name}, {dtype}" for name in AWKWARD for dtype in DTYPES))
def every_element_is_written_and_every_run_gives_the_same_bits(choice: str) -> None:
    name, dtype = choice.split(", ")
    spec = AWKWARD[name](DTYPES[dtype])
    expected = spec.run("triton")
    missing = {f"d {given}" for given, value in spec.arguments.items() if value is not None} - expected.keys()
    assert not missing, f"there is no {missing}"
    assert_same_bits(spec.run("triton"), expected, "on the second run")
    with empty_is_nan():
        found = spec.run("triton")
    unwritten = [result for result, value in found.items() if value.isnan().any()]
    assert not unwritten, f"{unwritten} have elements that nobody wrote"
    assert_same_bits(found, expected, "when memory is full of NaN")


def inside_larger(value: Tensor) -> Tensor:
    """The same numbers inside a tensor that is larger along every dimension and otherwise NaN."""
    whole = torch.full([size + 2 for size in value.shape], math.nan, dtype=value.dtype)
    part = whole[tuple(slice(1, 1 + size) for size in value.shape)]
    part.copy_(value)
    return part


def with_room_between_pixels(value: Tensor) -> Tensor:
    """The same numbers as a slice of the last dimension, so that pixels stay evenly spaced; NaN beside it."""
    whole = torch.full((*value.shape[:-1], value.shape[-1] + 5), math.nan, dtype=value.dtype)
    part = whole[..., 2 : 2 + value.shape[-1]]
    part.copy_(value)
    return part


def last_dimension_first(value: Tensor) -> Tensor:
    """The same numbers as a permuted (B, C, H, W) has them."""
    return value.movedim(-1, 1).contiguous().movedim(1, -1)


def rows_and_columns_swapped(value: Tensor) -> Tensor:
    """The same numbers stored column by column."""
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() > 2 else value.t().contiguous().t()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inside a larger tensor": inside_larger,
    "with room between pixels": with_room_between_pixels,
    "channels first": last_dimension_first,
    "column by column": rows_and_columns_swapped,
}


@case_for(*LAYOUTS)
def any_layout_gives_the_same_bits(name: str) -> None:
    for spec in (
        WINDOW(FLOAT32, window=4, shift=1, rows=1, columns=1, heads=1, head_dim=7, batch=2),
        OVERLAPPING(FLOAT32, window=3, key_window=5, rows=1, columns=1, heads=1, head_dim=7, batch=2),
    ):
        views = {given: LAYOUTS[name](argument(spec, given)) for given in spec.arguments}
        strange = [given for given, view in views.items() if not view.is_contiguous()]
        assert len(strange) >= len(views) - 1, f"only {strange} are not contiguous"
        assert_same_bits(changed(spec, **views).run("triton"), spec.run("triton"), f"{name}: {spec.op}")


@case
def expanded_tensors_and_gradients_give_what_their_copies_give() -> None:
    table, one = torch.randn(49, 1), torch.rand(1, 1, 1)
    qkv, kv = torch.randn(1, 4, 4, 3 * 14), torch.randn(1, 4, 4, 2 * 14)
    for function, features in (
        (partial(window_attention, window=4, shift=1, kernels=TRITON), (qkv.expand(2, -1, -1, -1),)),
        (
            partial(overlapping_window_attention, window=4, key_window=4, kernels=TRITON),
            (qkv[..., :14].expand(2, -1, -1, -1), kv.expand(2, -1, -1, -1)),
        ),
    ):
        results = []
        for copied in (False, True):
            given = [
                (value.contiguous() if copied else value).detach().requires_grad_()
                for value in (*features, table, one.expand(2, 4, 4))
            ]
            out = function(*given)
            seed = torch.full((1,), 0.5).expand(out.shape)  # strides of 0
            results.append([out.detach(), *torch.autograd.grad(out, given, seed.contiguous() if copied else seed)])
        for index, (found, expected) in enumerate(zip(*results, strict=True)):
            assert torch.equal(found, expected), f"{function.func.__name__}: result {index} differs"


@case_for("window", "overlapping")
def far_addresses_give_the_same_bits(name: str) -> None:
    launch = import_module("savl.kernels.launch")
    near = launch.Attention.constants
    spec = AWKWARD[name](FLOAT32)
    with mock.patch.object(launch.Attention, "constants", lambda call: {**near(call), "FAR": False}):
        expected = spec.run("triton")
    with mock.patch.object(launch.Attention, "constants", lambda call: {**near(call), "FAR": True}):
        assert_same_bits(spec.run("triton"), expected, "when pixels are counted in 64 bits")


@case
def images_of_more_than_two_gigabytes_are_addressed_in_64_bits() -> None:
    launch = import_module("savl.kernels.launch")
    bias = torch.empty(49, 2, device="meta")
    for side, far in ((2**12, False), (2**13, True)):  # of 128 channels: 2**31 elements and 2**33
        q, k, v = torch.empty(1, side, side, 96, device="meta", dtype=FLOAT16).chunk(3, dim=-1)
        call = launch.Attention(q, k, v, bias, None, 4, 4, 0)
        assert call.constants()["FAR"] is far, f"{side} × {side} pixels"


@case_for("f32", "f16")
def an_empty_batch_gives_empty_results_and_gradients_of_zero(dtype: str) -> None:
    for make in (
        partial(WINDOW, window=4, shift=1),
        partial(OVERLAPPING, window=4, key_window=6),
        partial(WINDOW, window=4, severity=False),
    ):
        spec = make(DTYPES[dtype], batch=0)
        with empty_is_nan():
            found, eager = spec.run("triton"), spec.run("eager")
        for name, expected in eager.items():
            assert found[name].shape == expected.shape, f"{spec.op}: {name} has shape {tuple(found[name].shape)}"
            assert found[name].dtype == expected.dtype, f"{spec.op}: {name} is {found[name].dtype}"
        table = found["d bias_table"]
        assert torch.equal(table, torch.zeros_like(table)), "no window has a gradient"
