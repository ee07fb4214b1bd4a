"""Benchmarks of the ops of savl-base, forward and with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import cases
from benchmarks.peers import sdpa
from benchmarks.suite import Entry
from benchmarks.timing import COPY
from savl.ops.op import OPS, Op


def _entries(op: Op) -> Iterator[Entry]:
    make = partial(cases.op_case, name=op.name)
    attention = hasattr(sdpa, op.name)
    if attention:
        yield Entry(op.title, make, ("eager", "sdpa", "sdpa, mask kept", "flex", "compile", "fused"))
    else:
        yield Entry(op.title, make, ("eager", "compile", COPY, "fused"))
    for options in op.benchmark_options:
        yield Entry(options["title"], partial(make, **options), ("eager", "compile", COPY, "fused"), full=True)
    yield Entry(
        f"{op.title} and gradients",
        partial(make, backward=True),
        ("eager", "sdpa", "fused") if attention else ("eager", "fused"),
        ("flex", "compile") if attention else ("compile", COPY),
    )


# Forward passes first, as in the tables.
ENTRIES = sorted(
    (entry for op in OPS.values() if op.benchmark is not None for entry in _entries(op)),
    key=lambda entry: entry.name.endswith("and gradients"),
)


def test_op(hand_over: Callable[[], None]) -> None:
    hand_over()
