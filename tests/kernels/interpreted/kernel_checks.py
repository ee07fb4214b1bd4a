"""Settings and checks of the tests that run the kernels under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from savl.kernels import configs
from savl.ops import KernelSettings
from savl.ops.equivalence import Case, Outputs, judge

Make = Callable[[int], Case]
Tile = tuple[int, int]

FLOAT32, FLOAT16 = torch.float32, torch.float16
DTYPES = [FLOAT32, FLOAT16]
"""Triton's interpreter multiplies matrices of bfloat16 wrongly."""
TRITON = KernelSettings(
    window_attention="triton",
    overlapping_window_attention="triton",
    layer_norm="triton",
    convolution="triton",
    channel_gate="triton",
    guided_projection="triton",
    projection_mlp="triton",
)


@contextmanager
def block_sizes(tile: Tile | None) -> Iterator[None]:
    """Launch every attention kernel with tiles of so many queries and keys; None keeps the configured block sizes."""
    if tile is None:
        yield
        return
    config = configs.KernelConfig(*tile, warps=4, stages=1)
    kernels: set[str] = set()
    wanted: set[str] = set()

    def choose(call: Any, stage: str) -> configs.KernelConfig:
        kernels.add(stage)
        wanted.update(call.stages())
        return config

    with mock.patch("savl.kernels.launch.Attention.config", choose):
        yield
    assert wanted, "no kernel asked for block sizes"
    assert kernels == wanted, f"only {sorted(kernels)} asked for block sizes"


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill whatever torch hands out uninitialised with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all(), "this relies on torch filling what is uninitialised"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_accurate(make: Make, draws: int = 2, tile: Tile | None = None) -> None:
    """Assert that outputs and gradients of the Triton kernels keep the rule of `savl.ops.equivalence`.

    Args:
        make: Gives the case of a seed.
        draws: How many seeds to judge together.
        tile: Block sizes, as for `block_sizes`.
    """
    with block_sizes(tile):
        broken = [str(budget) for budget in judge(make, "triton", draws=draws) if not budget.kept]
    assert not broken, f"{make(0).op} ({make(0).label}), tiles {tile}: " + "; ".join(broken)


def assert_same_bits(found: Outputs, expected: Outputs, when: str) -> None:
    """Assert that all results are the same numbers, and that none is NaN, which equals nothing."""
    assert found.keys() == expected.keys(), f"{sorted(found)} in place of {sorted(expected)} {when}"
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{different} differ {when}"


def changed(case: Case, **arguments: Tensor | None) -> Case:
    """Return the case with other arguments."""
    return dataclasses.replace(case, arguments={**case.arguments, **arguments})


def argument(case: Case, name: str) -> Tensor:
    """Return an argument that is not None."""
    value = case.arguments[name]
    assert value is not None
    return value


# Layouts


def inside_larger(value: Tensor) -> Tensor:
    """Return the same numbers inside a tensor that is larger along every dimension and otherwise NaN."""
    whole = torch.full([size + 2 for size in value.shape], math.nan, dtype=value.dtype)
    part = whole[tuple(slice(1, 1 + size) for size in value.shape)]
    part.copy_(value)
    return part


def with_room_between_pixels(value: Tensor) -> Tensor:
    """Return the same numbers as a slice of the last dimension, so that pixels stay evenly spaced; NaN beside it."""
    whole = torch.full((*value.shape[:-1], value.shape[-1] + 5), math.nan, dtype=value.dtype)
    part = whole[..., 2 : 2 + value.shape[-1]]
    part.copy_(value)
    return part


def last_dimension_first(value: Tensor) -> Tensor:
    """Return the same numbers stored as (B, C, H, W)."""
    return value.movedim(-1, 1).contiguous().movedim(1, -1)


def rows_and_columns_swapped(value: Tensor) -> Tensor:
    """Return the same numbers stored column by column."""
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() > 2 else value.t().contiguous().t()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inside a larger tensor": inside_larger,
    "with room between pixels": with_room_between_pixels,
    "channels first": last_dimension_first,
    "column by column": rows_and_columns_swapped,
}
