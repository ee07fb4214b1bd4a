"""The gate: fused kernels that have become slow against eager fail here, on a machine that others use too.

Both are timed in turn in one process, and a ratio of medians is held against about half of what an idle machine shows
(docs/benchmarks.md), so that noise does not pass for a regression and a kernel that fell back on eager, or lost
its vectors or threads, does not pass for noise. No absolute time counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks import cases, timing
from savl.ops.op import why_unavailable

WITHOUT_EXTENSION = why_unavailable("window_attention", "cpp")
ATTEMPTS = 3
GATES: dict[str, tuple[Callable[[cases.Run], cases.BenchmarkCase], float]] = {
    "window attention": (partial(cases.op_case, name="window_attention"), 1.8),
    "window attention and gradients": (lambda run: cases.op_case(run, "window_attention", backward=True), 1.3),
    "overlapping attention": (partial(cases.op_case, name="overlapping_window_attention"), 1.4),
    "overlapping attention and gradients": (
        lambda run: cases.op_case(run, "overlapping_window_attention", backward=True),
        1.5,
    ),
    "posterior": (partial(cases.op_case, name="gaussian_posterior"), 1.5),
    "modulation": (partial(cases.op_case, name="channel_modulation"), 0.8),
    "savl-tiny": (lambda run: cases.network(run, "savl-tiny"), 1.05),
}


@pytest.mark.skipif(WITHOUT_EXTENSION is not None, reason=str(WITHOUT_EXTENSION))
@pytest.mark.parametrize("name", GATES)
def test_fused_kernels_are_much_faster_than_eager(name: str) -> None:
    make, least = GATES[name]
    run = cases.Run(torch.device("cpu"), torch.float32, 64, compiled=False)
    case = make(run).only(("fused",))
    calls, records = timing.check(case, run)
    assert set(calls) == {"eager", "fused"}, records
    ratios: list[float] = []
    for _ in range(ATTEMPTS):
        times, failed = timing.time_in_turn(calls, run, rounds=7)
        assert not failed
        ratios.append(statistics.median(times["eager"]) / statistics.median(times["fused"]))
        if ratios[-1] >= least:
            return
    pytest.fail(f"{name}: eager takes {max(ratios):.2f} times as long as the fused kernels, {least} is the least")
