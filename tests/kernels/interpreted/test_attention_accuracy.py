"""The attention kernels are as accurate as the eager path, for every shape, block size and option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, FLOAT16, TRITON, Tile, argument, assert_accurate, changed

from savl.ops import KernelSettings, overlapping_window_attention
from savl.ops.equivalence import Budget, Case, measure
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case


@dataclass(frozen=True)
class Attention:
    """An attention case, and the tile size of the kernel that computes it."""

    make: Callable[..., Case]
    shape: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``make``. By default there are one window and one head."""
    tile: Tile | None = None
    """Queries and keys of a tile; None for the configured ones."""
    draws: int = 1
    """Number of draws whose largest error counts. A single draw of the eager path may be accurate by chance."""

    def case(self, dtype: torch.dtype, seed: int, **changes: Any) -> Case:
        """Return the case for a seed."""
        return self.make(dtype, seed=seed, **({"rows": 1, "columns": 1, "heads": 1} | self.shape | changes))

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.shape.items()]
        return ", ".join(
            [self.make.__name__.removesuffix("_case"), *words, *([f"tile {self.tile}"] if self.tile else [])]
        )


def window(tile: Tile | None = None, draws: int = 1, **shape: Any) -> Attention:
    return Attention(window_attention_case, shape, tile, draws)


def overlapping(tile: Tile | None = None, draws: int = 1, **shape: Any) -> Attention:
    return Attention(overlapping_window_attention_case, shape, tile, draws)


# The interpreter's time grows with the number of tiles: images are of as few windows as show what is meant.
ATTENTIONS = [
    overlapping((128, 128), window=16, key_window=24),
    overlapping((64, 64), window=8, key_window=12, columns=2),
    overlapping((32, 16), window=6, key_window=8, head_dim=64),
    overlapping((64, 64), window=8, key_window=12, head_dim=30, severity=False),
    overlapping(window=4, key_window=6, batch=2, heads=2),
    overlapping((16, 16), window=4, key_window=6, rows=2, head_dim=32),
    overlapping((16, 128), window=2, key_window=10, columns=3, head_dim=32),
    overlapping(draws=2, window=5, key_window=9, columns=2, head_dim=7),
    # Margins are larger than a window, in an image that is not square. With severity, a weight of the first draw is
    # 0.99985: its gradient is a difference of nearly equal numbers, and chance decides which path rounds it better.
    overlapping((16, 64), draws=2, window=2, key_window=8, rows=3, columns=5, head_dim=3, severity=False),
    overlapping(window=4, key_window=4, heads=2, head_dim=1),
    window((128, 64), window=16, shift=8),
    window((64, 128), window=12, head_dim=30, severity=False),
    window(window=8, shift=4, columns=2),
    window((32, 16), window=8, shift=3, head_dim=32),
    window((64, 64), window=8, shift=7, rows=2, head_dim=64, severity=False),
    window((128, 32), draws=2, window=8, shift=4, columns=2, head_dim=30),
    window(window=4, shift=2, batch=2, heads=2),
    window(window=4, heads=3, severity=False),
    window(draws=2, window=5, shift=2, columns=2, head_dim=30),
    window((16, 16), draws=4, window=5, shift=1, head_dim=7),
    window((32, 16), window=5, shift=4, heads=2, head_dim=1),
    # The other traits. Tiles of keys fit into windows, or lie across several of them.
    window(window=(2, 8), shift=(1, 4), head_dim=15, severity=False, views=True),
    window(window=(8, 2), shift=(4, 0), bias="dense", mask=-2.0, head_dim=7),
    window(window=(3, 5), bias="dense", dilated=True, rows=2, columns=2, head_dim=7),
    window(window=4, dilated=True, columns=3, head_dim=8, severity=False),
    window(window=(3, 4), draws=3, cosine=True, bias="none", views=True, heads=2, head_dim=5),
    window(window=4, shift=2, draws=2, cosine=True, mask=-1.0, head_dim=10),
    window(window=4, shift=2, columns=2, key_window=2, bias="dense", severity=False, head_dim=9),
    window(window=(2, 4), shift=(0, 2), key_window=(4, 2), bias="none", severity=False, mask=-1.0, head_dim=9),
    window(window=2, key_window=(1, 2), cosine=True, dilated=True, columns=2, bias="dense", severity=False, head_dim=3),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_outputs_and_gradients_are_as_accurate_as_eager(attention: Attention, dtype: torch.dtype) -> None:
    assert_accurate(lambda seed: attention.case(dtype, seed), attention.draws, attention.tile)


@pytest.mark.parametrize(
    "attention",
    [
        overlapping((64, 64), window=8, key_window=12, columns=2, head_dim=24),
        overlapping((64, 64), draws=3, window=8, key_window=16, heads=2, head_dim=24),
        window((128, 64), window=16, shift=8, head_dim=24),
        window((64, 64), draws=3, window=8, shift=4, columns=2, head_dim=30),
        window(draws=3, window=4, shift=1, columns=2, head_dim=32),
    ],
    ids=str,
)
def test_outputs_and_gradients_in_bfloat16_are_as_accurate_as_eager(attention: Attention) -> None:
    """With less than 32 channels the product sums rounded weights, and the backward pass uses that sum."""
    assert_accurate(lambda seed: attention.case(torch.bfloat16, seed), attention.draws, attention.tile)


def test_keys_outside_the_image_are_found_several_windows_away_from_the_border() -> None:
    """Only the window in the middle has all of its keys inside, and is computed without bounds."""
    budgets = []
    for seed in range(3):
        case = overlapping_window_attention_case(
            torch.float32, window=2, key_window=8, rows=5, columns=5, heads=1, head_dim=3, seed=seed
        )
        given = {name: value for name, value in case.arguments.items() if value is not None}
        exact = {name: value.double() for name, value in given.items()}
        out = overlapping_window_attention(**given, **case.options, kernels=TRITON)
        eager, reference = (
            overlapping_window_attention(**values, **case.options, kernels=KernelSettings.of("eager"))
            for values in (given, exact)
        )
        budgets.append(measure("out", out, eager, reference, case.terms))
    assert Budget.pooled(budgets).kept


@pytest.mark.parametrize("dilated", [False, True])
def test_a_single_key_has_the_gradients_of_its_queries(dilated: bool) -> None:
    shape = {"window": (2, 3), "key_window": 1, "rows": 2, "columns": 2, "head_dim": 3, "severity": False}
    assert_accurate(lambda seed: window_attention_case(FLOAT16, **shape, dilated=dilated, bias="dense", seed=seed))


def in_float32(case: Case, *names: str) -> Case:
    """The case with arguments in float32 that are not rounded to float16."""
    generator = torch.Generator().manual_seed(3)
    wide = {name: argument(case, name).float() for name in names}
    wide = {name: value * (1 + 2**-12 * torch.rand(value.shape, generator=generator)) for name, value in wide.items()}
    return changed(case, **wide)


@pytest.mark.parametrize("names", [("severity",), ("bias_table",), ("severity", "bias_table")], ids=" and ".join)
@pytest.mark.parametrize(
    "attention", [window(window=4, shift=1, columns=2), overlapping(window=4, key_window=6, columns=2)], ids=str
)
def test_float16_features_go_with_float32_severity_and_bias(attention: Attention, names: tuple[str, ...]) -> None:
    assert_accurate(lambda seed: in_float32(attention.case(FLOAT16, seed), *names), draws=3)
