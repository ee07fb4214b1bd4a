"""Benchmarks of other authors' architectures on one tile: as they are, and after `savl.accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import architectures
from benchmarks.peers import runtimes
from benchmarks.suite import Entry

VARIANTS = ("eager", "sdpa", architectures.ACCELERATED, architectures.EAGER_BFLOAT16, architectures.BFLOAT16)
ENTRIES = [
    Entry(
        f"{name}, tile",
        partial(architectures.tile, name=name),
        (*VARIANTS, *runtimes.VARIANTS[1:]),
        (runtimes.ONNX_RUNTIME, "compile"),
        rounds=3,
    )
    for name in architectures.ARCHITECTURES
]


def test_architecture(hand_over: Callable[[], None]) -> None:
    hand_over()
