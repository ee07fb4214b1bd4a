"""Conversion and checks of samples and labels, and standardisation of columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from savl.evaluation.samples import as_features, as_labels, as_variable, check_lengths, standardise


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[1.0], [2.0]], requires_grad=True),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([[1], [2]], dtype=torch.uint8),
        np.array([1.0, 2.0], dtype=np.float32),
        [1, 2],
    ],
)
def test_numbers_of_any_kind_become_float64_rows_without_a_gradient(values: Any) -> None:
    features = as_features(values, "x")
    assert torch.equal(features, torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    assert not features.requires_grad


def test_features_are_a_copy() -> None:
    values = torch.ones(3, 2, dtype=torch.float64)
    as_features(values, "x").zero_()
    assert torch.equal(values, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 3, 4), r"x must have the shape \(n, d\), neither of them 0, got \(2, 3, 4\)"),
        (torch.zeros(0, 3), r"neither of them 0, got \(0, 3\)"),
        (torch.zeros(3, 0), r"neither of them 0, got \(3, 0\)"),
        (torch.tensor([[0.0, 1.0], [2.0, torch.nan]]), "x must be finite, got nan in row 1"),
        (torch.tensor([-torch.inf, 2.0]), "x must be finite, got -inf in row 0"),
        ([["a"], ["b"]], "x must be numbers, got values of the type <U1"),
        ([[1.0], [2.0, 3.0]], "x must be numbers, got values of the type object"),
        (np.array([1j]), "x must be numbers, got values of the type complex128"),
    ],
)
def test_features_that_are_not_finite_rows_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_features(values, "x")


@pytest.mark.parametrize(
    ("values", "numbers", "classes"),
    [
        (["sony", "canon", "sony"], [1, 0, 1], ["canon", "sony"]),
        (torch.tensor([7, 7, -1]), [1, 1, 0], [-1, 7]),
        ([2.8, 1.4, 2.8], [1, 0, 1], [1.4, 2.8]),
        (np.array([True, False]), [1, 0], [False, True]),
    ],
)
def test_labels_are_numbered_in_order(values: Any, numbers: list[int], classes: list[Any]) -> None:
    found, names = as_labels(values, "labels")
    assert (found.tolist(), names) == (numbers, classes)
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1], [2]], r"labels must have the shape \(n,\), n at least 1, got \(2, 1\)"),
        ([], r"n at least 1, got \(0,\)"),
        (["a", None], "labels must be all strings or all numbers, none of them NaN, got values of the type object"),
        ([1.0, np.nan], "none of them NaN, got NaN"),
    ],
)
def test_invalid_labels_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_labels(values, "labels")


def test_a_variable_of_labels_becomes_one_hot_codes_and_one_of_floats_stays() -> None:
    assert as_variable([3, 5, 3], "y").tolist() == [[1, 0], [0, 1], [1, 0]]
    assert as_variable(["b", "a"], "y").tolist() == [[0, 1], [1, 0]]
    assert as_variable([3.0, 5.0], "y").tolist() == [[3], [5]]
    assert as_variable(torch.tensor([[3], [5]]), "y").tolist() == [[3], [5]]
    with pytest.raises(ValueError, match=r"y must have the shape \(n, d\)"):
        as_variable([], "y")


def test_columns_are_standardised_by_the_rows_named_and_no_others() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [100.0, 9.0]], dtype=torch.float64)
    found = standardise(values, torch.tensor([0, 1]))
    assert torch.equal(found, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [98.0, 4.0]]))
    assert found.dtype == torch.float32


def test_a_constant_column_is_not_blown_up_by_rounding() -> None:
    values = torch.full((1000, 1), 0.1, dtype=torch.float64)
    assert standardise(values, torch.arange(1000)).abs().max() < 1e-6


def test_lengths_that_differ_are_reported() -> None:
    check_lengths(("x", 3), ("y", 3))
    with pytest.raises(ValueError, match="x and y must have as many samples as each other, got 3 and 4"):
        check_lengths(("x", 3), ("y", 4))
