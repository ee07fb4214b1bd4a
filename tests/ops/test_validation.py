"""The checks behind the ops: what they let pass, and what their messages say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from savl.ops.validation import (
    FLOAT_DTYPES,
    check_heads,
    check_int,
    check_same_device,
    check_same_dtype,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
    check_window,
)

ONES = torch.ones(2, 3)


# Accepted arguments


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_floating_dtype_passes(dtype: torch.dtype) -> None:
    value = ONES.to(dtype)
    assert check_tensor("op", "x", value, "(H, W)") is value


@pytest.mark.parametrize("shape", ["(B,)", "(B, H)", "((2w − 1)², heads)", "(B, H, W, 3C)"])
def test_the_commas_of_the_layout_give_the_rank(shape: str) -> None:
    ranks = {"(B,)": 2, "(B, H)": 2, "((2w − 1)², heads)": 2, "(B, H, W, 3C)": 4}
    value = torch.ones((1,) * ranks[shape])
    assert check_tensor("op", "x", value, shape) is value


def test_subclasses_of_tensor_pass() -> None:
    parameter = torch.nn.Parameter(ONES)
    assert check_tensor("op", "weight", parameter, "(H, W)") is parameter


def test_absent_tensors_pass_every_comparison() -> None:
    check_same_dtype("op", "x", ONES, y=None)
    check_same_dtype_or_float32("op", "x", ONES, y=None)
    check_same_device("op", "x", ONES, y=None)


def test_float32_passes_beside_any_dtype() -> None:
    for dtype in FLOAT_DTYPES:
        check_same_dtype_or_float32("op", "x", ONES.to(dtype), y=ONES, z=ONES.to(dtype))


def test_check_heads_returns_the_number_of_columns_of_the_table() -> None:
    assert check_heads("op", 12, torch.ones(9, 4), 9, "3 × 3") == 4


def test_windows_that_tile_the_image_pass() -> None:
    for height, width, window in ((8, 12, 4), (4, 4, 4), (3, 5, 1)):
        check_window("op", height, width, window)


# Error messages


@pytest.mark.parametrize("value", [None, 1.0, [1.0], "tensor"])
def test_an_argument_that_is_not_a_tensor_is_reported_with_its_type(value: object) -> None:
    with pytest.raises(
        TypeError, match=rf"^op: x must be a torch.Tensor of shape \(H, W\), got {type(value).__name__}$"
    ):
        check_tensor("op", "x", value, "(H, W)")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_dtype_that_is_not_floating_is_reported_with_the_accepted_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^op: x .*float16, bfloat16, float32, float64, got {dtype}$"):
        check_tensor("op", "x", ONES.to(dtype), "(H, W)")


def test_a_wrong_rank_is_reported_with_the_expected_layout() -> None:
    with pytest.raises(ValueError, match=r"^op: x must have 3 dimensions \(B, H, W\), got 2: \(2, 3\)$"):
        check_tensor("op", "x", ONES, "(B, H, W)")


def test_a_wrong_shape_is_reported_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"^op: x must have shape \(3, 2\) \(that of y\), got \(2, 3\)$"):
        check_shape("op", "x", ONES, (3, 2), "that of y")


def test_a_wrong_dtype_names_both_tensors() -> None:
    with pytest.raises(TypeError, match=r"^op: y is torch.float64 but x is torch.float32; cast one of them$"):
        check_same_dtype("op", "x", ONES, y=ONES.double())


def test_a_dtype_that_does_not_fit_names_both_accepted_ones() -> None:
    with pytest.raises(TypeError, match=r"^op: y must be torch.bfloat16 like x, or torch.float32, got torch.float16$"):
        check_same_dtype_or_float32("op", "x", ONES.bfloat16(), y=ONES.half())


def test_a_wrong_device_names_both_devices() -> None:
    with pytest.raises(ValueError, match=r"^op: y is on meta but x is on cpu; move both to one device$"):
        check_same_device("op", "x", ONES, y=ONES.to("meta"))


@pytest.mark.parametrize("value", [True, 8.0, "8", None, torch.tensor(8)])
def test_an_argument_that_is_not_an_int_is_reported_with_its_type(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^op: window must be an int, got {type(value).__name__} "):
        check_int("op", "window", value)


@pytest.mark.parametrize(
    ("table", "fragment"),
    [
        pytest.param(torch.ones(8, 4), r"bias_table must have 9 rows \(3 × 3\), got 8 with shape \(8, 4\)", id="rows"),
        pytest.param(torch.ones(9, 5), r"the 12 channels must divide evenly among the heads.*got 5", id="uneven"),
        pytest.param(torch.ones(9, 0), r"the 12 channels must divide evenly among the heads.*got 0", id="no-heads"),
    ],
)
def test_a_table_that_does_not_fit_says_why(table: Tensor, fragment: str) -> None:
    with pytest.raises(ValueError, match=f"^op: {fragment}"):
        check_heads("op", 12, table, 9, "3 × 3")


@pytest.mark.parametrize(
    ("height", "width", "window", "fragment"),
    [
        pytest.param(8, 8, 0, "window must be at least 1 pixel, got 0", id="no-window"),
        pytest.param(9, 8, 4, "positive multiples of window=4, got 9x8; pad the image first", id="height"),
        pytest.param(8, 9, 4, "positive multiples of window=4, got 8x9; pad the image first", id="width"),
        pytest.param(0, 8, 4, "positive multiples of window=4, got 0x8", id="no-rows"),
        pytest.param(8, 0, 4, "positive multiples of window=4, got 8x0", id="no-columns"),
    ],
)
def test_an_image_size_that_is_no_multiple_of_the_window_is_reported_with_a_solution(
    height: int, width: int, window: int, fragment: str
) -> None:
    with pytest.raises(ValueError, match=fragment):
        check_window("op", height, width, window)
