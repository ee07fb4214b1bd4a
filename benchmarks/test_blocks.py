"""Benchmarks of the blocks of savl-base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import cases
from benchmarks.suite import Entry

ENTRIES = [
    Entry(
        name,
        partial(cases.block, name=name),
        ("eager", "sdpa", "fused"),
        (cases.FUSED_COMPILED, "compile", cases.FUSED_GRAPH),
        rounds=7,
    )
    for name in ("DSCA", "HAB", "OCAB")
]


def test_block(hand_over: Callable[[], None]) -> None:
    hand_over()
