"""What the cases for Triton's interpreter are made with, and where they are entered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from savl.ops import KernelSettings
from savl.ops.equivalence import Case, Outputs, judge, overlapping_window_attention_case, window_attention_case

Make = Callable[[int], Case]
Tile = tuple[int, int]

WINDOW, OVERLAPPING = window_attention_case, overlapping_window_attention_case
FLOAT32, FLOAT16 = torch.float32, torch.float16
DTYPES = {"f32": FLOAT32, "f16": FLOAT16}
TRITON = KernelSettings(window_attention="triton", overlapping_window_attention="triton", layer_norm="triton")

CASES: dict[str, Callable[[], None]] = {}


def enter(name: str, function: Callable[[], None]) -> None:
    """Under a name that no case has yet."""
    assert name not in CASES, f"there are two cases called {name}"
    CASES[name] = function


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a function under its name, in words."""
    enter(function.__name__.replace("_", " "), function)
    return function


def case_for(*choices: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enter a function once for each of its arguments, or of names in a dictionary of them."""

    def enter_each(function: Callable[[Any], None]) -> Callable[[Any], None]:
        for choice in choices:
            enter(f"{function.__name__.replace('_', ' ')}: {choice}", partial(function, choice))
        return function

    return enter_each


@contextmanager
def tiles(tile: Tile | None) -> Iterator[None]:
    """Launch every kernel with tiles of so many queries and keys; None for those of the configuration."""
    if tile is None:
        yield
        return
    launch, configs = import_module("savl.kernels.launch"), import_module("savl.kernels.configs")
    config = configs.KernelConfig(*tile, warps=4, stages=1)
    asked: list[str] = []

    def choose(call: Any, stage: str) -> Any:
        asked.append(stage)
        return config

    with mock.patch.object(launch.Attention, "config", choose):
        yield
    assert set(asked) == set(configs.STAGES), f"only {sorted(set(asked))} asked for block sizes"


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Whatever torch hands out uninitialised is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all(), "this relies on torch filling what is uninitialised"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def hold(make: Make, draws: int = 2, tile: Tile | None = None) -> None:
    """Hold the kernels against the rule of `savl.ops.equivalence`."""
    with tiles(tile):
        broken = [str(budget) for budget in judge(make, "triton", draws=draws) if not budget.kept]
    assert not broken, f"{make(0).op} ({make(0).label}), tiles {tile}: " + "; ".join(broken)


def assert_same_bits(found: Outputs, expected: Outputs, when: str) -> None:
    """Also an assertion that nothing is NaN, which equals nothing."""
    assert found.keys() == expected.keys(), f"{sorted(found)} in place of {sorted(expected)} {when}"
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{different} differ {when}"


def changed(case: Case, **arguments: Tensor | None) -> Case:
    """The case with other arguments."""
    return dataclasses.replace(case, arguments={**case.arguments, **arguments})


def argument(case: Case, name: str) -> Tensor:
    """An argument that is given."""
    value = case.arguments[name]
    assert value is not None
    return value
