"""Strict loading: a file's tensors are exactly the network's, or the error says which are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

SHOWN = 3
"""How many tensors of a kind an error names."""


def check_fit(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
    """Check that the names and shapes of a state dict are the expected ones, and its values floating.

    Args:
        expected: Name → shape.
        tensors: Name → tensor.

    Raises:
        ValueError: Tensors are missing, unknown, misshapen or not floating; the message names a few of each.
    """
    problems: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in tensors],
        "unknown": [name for name in tensors if name not in expected],
        "misshapen": [],
        "not floating": [],
    }
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            problems["misshapen"].append(f"{name} {tuple(tensor.shape)} instead of {tuple(shape)}")
        if not tensor.is_floating_point():
            problems["not floating"].append(f"{name} {tensor.dtype}")
    found = [f"{len(names)} {kind}: {_enumerate(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"its tensors do not fit the network: {'; '.join(found)}")


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
