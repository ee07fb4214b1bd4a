"""Whether the kernels are as right as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from case_tools import DTYPES, FLOAT16, OVERLAPPING, WINDOW, Tile, argument, case_for, changed, hold

from savl.ops.equivalence import Case

# Windows of 16 come first: they take longest.

RIGHT: dict[str, tuple[Callable[..., Case], dict[str, Any], int, Tile | None]] = {
    "window 16 in 24, tile 128x128": (
        OVERLAPPING,
        {"window": 16, "key_window": 24, "heads": 1, "rows": 1, "columns": 1},
        1,
        (128, 128),
    ),
    "window 16, shift 8, tile 128x32": (
        WINDOW,
        {"window": 16, "shift": 8, "heads": 1, "rows": 1, "columns": 1, "head_dim": 24},
        1,
        (128, 32),
    ),
    "window 16, head dim 30, plain, tile 64x64": (
        WINDOW,
        {"window": 16, "heads": 1, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
        1,
        (64, 64),
    ),
    "window 8 in 12, two in a row": (
        OVERLAPPING,
        {"window": 8, "key_window": 12, "heads": 1, "rows": 1, "columns": 2},
        1,
        None,
    ),
    "window 8 in 12, head dim 64, tile 32x16": (
        OVERLAPPING,
        {"window": 8, "key_window": 12, "heads": 1, "rows": 1, "columns": 1, "head_dim": 64},
        1,
        (32, 16),
    ),
    "window 8 in 12, head dim 30, plain, tile 64x64": (
        OVERLAPPING,
        {"window": 8, "key_window": 12, "heads": 1, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
        2,
        (64, 64),
    ),
    "window 4 in 6, batch of 2": (
        OVERLAPPING,
        {"window": 4, "key_window": 6, "batch": 2, "rows": 1, "columns": 2},
        1,
        None,
    ),
    "window 4 in 6, head dim 32, tile 16x16": (
        OVERLAPPING,
        {"window": 4, "key_window": 6, "heads": 1, "rows": 2, "columns": 1, "head_dim": 32},
        2,
        (16, 16),
    ),
    "window 2 in 10": (
        OVERLAPPING,
        {"window": 2, "key_window": 10, "heads": 1, "rows": 1, "columns": 3, "head_dim": 32},
        3,
        (16, 128),
    ),
    "window 5 in 9, head dim 7": (
        OVERLAPPING,
        {"window": 5, "key_window": 9, "heads": 1, "rows": 1, "columns": 3, "head_dim": 7},
        2,
        None,
    ),
    "window 4 in 4, head dim 1": (
        OVERLAPPING,
        {"window": 4, "key_window": 4, "heads": 2, "rows": 1, "columns": 1, "head_dim": 1},
        3,
        None,
    ),
    "window 8, shift 4": (WINDOW, {"window": 8, "shift": 4, "heads": 1, "rows": 1, "columns": 2}, 1, None),
    "window 8, shift 3, tile 16x16": (
        WINDOW,
        {"window": 8, "shift": 3, "heads": 1, "rows": 1, "columns": 1, "head_dim": 32},
        1,
        (16, 16),
    ),
    "window 8, shift 7, head dim 64, plain, tile 64x64": (
        WINDOW,
        {"window": 8, "shift": 7, "heads": 1, "rows": 2, "columns": 1, "head_dim": 64, "severity": False},
        2,
        (64, 64),
    ),
    "window 8, shift 4, tile 128x32": (
        WINDOW,
        {"window": 8, "shift": 4, "heads": 1, "rows": 1, "columns": 2, "head_dim": 30},
        2,
        (128, 32),
    ),
    "window 4, shift 2, batch of 2": (WINDOW, {"window": 4, "shift": 2, "batch": 2, "rows": 1, "columns": 2}, 1, None),
    "window 4, plain": (WINDOW, {"window": 4, "heads": 3, "rows": 1, "columns": 1, "severity": False}, 2, None),
    "window 5, shift 2, head dim 30": (
        WINDOW,
        {"window": 5, "shift": 2, "heads": 1, "rows": 1, "columns": 2, "head_dim": 30},
        2,
        None,
    ),
    "window 5, shift 1, head dim 7, tile 16x16": (
        WINDOW,
        {"window": 5, "shift": 1, "heads": 1, "rows": 1, "columns": 1, "head_dim": 7},
        3,
        (16, 16),
    ),
    "window 5, shift 4, head dim 1, tile 32x16": (
        WINDOW,
        {"window": 5, "shift": 4, "heads": 2, "rows": 1, "columns": 1, "head_dim": 1},
        3,
        (32, 16),
    ),
}


@case_for(*(f"{name}, {dtype}" for name in RIGHT for dtype in DTYPES))
def as_right_as_eager(choice: str) -> None:
    name, _, dtype = choice.rpartition(", ")
    make, settings, draws, tile = RIGHT[name]
    hold(lambda seed: make(DTYPES[dtype], seed=seed, **settings), draws, tile)


def in_float32(case: Case, *names: str) -> Case:
    """The case with arguments in float32 that are not rounded to float16."""
    generator = torch.Generator().manual_seed(3)
    wide = {name: argument(case, name).float() for name in names}
    wide = {name: value * (1 + 2**-12 * torch.rand(value.shape, generator=generator)) for name, value in wide.items()}
    return changed(case, **wide)


@case_for("severity", "bias_table", "severity bias_table")
def float16_goes_with_float32(names: str) -> None:
    hold(
        lambda seed: in_float32(
            WINDOW(FLOAT16, window=4, shift=1, rows=1, columns=2, heads=1, seed=seed), *names.split()
        ),
        draws=3,
    )
    hold(
        lambda seed: in_float32(
            OVERLAPPING(FLOAT16, window=4, key_window=6, rows=1, columns=2, heads=1, seed=seed), *names.split()
        ),
        draws=3,
    )
