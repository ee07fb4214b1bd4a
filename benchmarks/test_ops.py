"""The ops of savl-base, forward and with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import cases
from benchmarks.suite import Entry
from benchmarks.timing import COPY

PEERS = ("eager", "sdpa", "sdpa, mask kept", "flex", "compile", "fused")
ELEMENTWISE = ("eager", "compile", COPY, "fused")
ENTRIES = [
    Entry("window attention", cases.window, PEERS),
    Entry("overlapping attention", cases.overlapping, PEERS),
    Entry("posterior", cases.posterior, ELEMENTWISE),
    Entry("posterior without noise", partial(cases.posterior, noise=False), ELEMENTWISE, full=True),
    Entry("modulation", cases.modulation, ELEMENTWISE),
    Entry("layer norm", cases.layer_norm, ELEMENTWISE),
    Entry(
        "window attention and gradients",
        partial(cases.window, backward=True),
        ("eager", "sdpa", "fused"),
        ("flex", "compile"),
    ),
    Entry(
        "overlapping attention and gradients",
        partial(cases.overlapping, backward=True),
        ("eager", "sdpa", "fused"),
        ("flex", "compile"),
    ),
    Entry("posterior and gradients", partial(cases.posterior, backward=True), ("eager", "fused"), ("compile", COPY)),
    Entry("modulation and gradients", partial(cases.modulation, backward=True), ("eager", "fused"), ("compile", COPY)),
    Entry("layer norm and gradients", partial(cases.layer_norm, backward=True), ("eager", "fused"), ("compile", COPY)),
]


def test_op(hand_over: Callable[[], None]) -> None:
    hand_over()
