"""Benchmarks of whole networks: a tile, a batch of tiles, a whole image in tiles, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import cases
from benchmarks.peers import runtimes
from benchmarks.suite import Entry

TILE = ("eager", "sdpa", *runtimes.VARIANTS, "fused", cases.FUSED_BFLOAT16)
TRAINING = ("eager", "fused", cases.FUSED_BFLOAT16)
LATE = (cases.FUSED_COMPILED, "compile, max-autotune", cases.FUSED_GRAPH)
ENTRIES = [
    Entry(
        "savl-tiny, tile",
        partial(cases.network, name="savl-tiny"),
        (*TILE, "compile", cases.FUSED_GRAPH),
        (cases.FUSED_COMPILED, "compile, max-autotune"),
        rounds=9,
    ),
    Entry(
        "savl-base, tile",
        partial(cases.network, name="savl-base"),
        TILE,
        ("compile", *LATE),
        rounds=3,
    ),
    Entry("hat-s, tile", partial(cases.network, name="hat-s"), TILE, ("compile", *LATE), rounds=3),
    Entry("savl-tiny, batch", partial(cases.network, name="savl-tiny", batch=8), ("eager", "sdpa", "fused"), rounds=3),
    Entry(
        "savl-base, batch",
        partial(cases.network, name="savl-base", batch=4),
        ("eager", "sdpa", "fused"),
        rounds=3,
        full=True,
    ),
    Entry("savl-tiny, 1 megapixel", partial(cases.image, name="savl-tiny"), ("eager", "fused"), rounds=0),
    Entry("savl-base, 1 megapixel", partial(cases.image, name="savl-base"), ("eager", "fused"), rounds=0, full=True),
    Entry("savl-tiny, training step", partial(cases.training_step, name="savl-tiny"), TRAINING, rounds=5),
    Entry(
        "savl-base, training step",
        partial(cases.training_step, name="savl-base"),
        TRAINING,
        rounds=3,
        full=True,
    ),
]


def test_network(hand_over: Callable[[], None]) -> None:
    hand_over()
