"""Samples of the probe and of the estimators: checked, moved to the CPU, labels as numbers or as one-hot codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Samples: TypeAlias = Tensor | np.ndarray[Any, Any] | Sequence[Any]
"""One row or one label per sample."""


def as_features(values: Samples, argument: str) -> Tensor:
    """Convert samples to rows of finite numbers.

    Args:
        values: ``(n, d)``, or ``(n,)`` for d = 1; integer or floating, on any device. Not modified.
        argument: Name of the argument in error messages.

    Returns:
        ``(n, d)`` float64 on the CPU, without a gradient.

    Raises:
        ValueError: The shape is another one, the array is empty, or its values are not finite numbers.
    """
    array = _array(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{argument} must be numbers, got {_kind(array)}")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{argument} must have the shape (n, d), neither of them 0, got {array.shape}")
    features = torch.from_numpy(array.astype(np.float64))
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"{argument} must be finite, got {features[row][~features[row].isfinite()][0]} in row {row}")
    return features


def as_labels(values: Samples, argument: str) -> tuple[Tensor, list[Any]]:
    """Number the classes of labels.

    Args:
        values: ``(n,)`` integers, booleans, strings, or floating numbers (such as apertures).
        argument: Name of the argument in error messages.

    Returns:
        ``(n,)`` int64 class numbers, and the sorted classes: ``classes[number]`` is the label.

    Raises:
        ValueError: The shape is another one, the array is empty, types are mixed, or a value is NaN.
    """
    array = _array(values)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{argument} must have the shape (n,), n at least 1, got {array.shape}")
    if array.dtype.kind not in "biufUS" or (array.dtype.kind == "f" and bool(np.isnan(array).any())):
        raise ValueError(f"{argument} must be all strings or all numbers, none of them NaN, got {_kind(array)}")
    classes, numbers = np.unique(array, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), classes.tolist()


def as_variable(values: Samples, argument: str) -> Tensor:
    """Convert samples of a random variable: numbers as in `as_features`, labels to one-hot codes.

    Args:
        values: ``(n, d)`` numbers, ``(n,)`` floating numbers, or ``(n,)`` labels: integers, booleans or strings.
        argument: Name of the argument in error messages.

    Returns:
        ``(n, d)`` float64; for labels d is the number of classes.

    Raises:
        ValueError: `as_features` or `as_labels` refuses the values.
    """
    array = _array(values)
    if array.ndim == 1 and array.size and array.dtype.kind in "biuUS":
        numbers, classes = as_labels(array, argument)
        return torch.nn.functional.one_hot(numbers, len(classes)).double()
    return as_features(array, argument)


def check_lengths(first: tuple[str, int], second: tuple[str, int]) -> None:
    """Check that two arguments have the same number of samples; each is given as its name and length.

    Raises:
        ValueError: The lengths differ.
    """
    if first[1] != second[1]:
        raise ValueError(
            f"{first[0]} and {second[0]} must have as many samples as each other, got {first[1]} and {second[1]}"
        )


def standardise(values: Tensor, fit: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation of some rows, column by column.

    A column that is constant on those rows is only centred.

    Args:
        values: ``(n, d)`` float64.
        fit: ``(m,)`` int64, rows whose statistics are used.

    Returns:
        ``(n, d)`` float32.
    """
    known = values[fit]
    varies = known.amax(dim=0) > known.amin(dim=0)  # rounding gives a constant column a deviation above 0
    deviation = torch.where(varies, known.std(dim=0, correction=0), 1.0)
    return ((values - known.mean(dim=0)) / deviation).float()


def _array(values: Samples) -> np.ndarray[Any, Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        return np.asarray(list(values), dtype=object)


def _kind(array: np.ndarray[Any, Any]) -> str:
    if array.dtype.kind == "f":
        return "NaN"
    return f"values of the type {array.dtype}"
