"""Tests that fail if a fused kernel has become slow in comparison with eager.

Both are timed in turn in one process. The ratio of their medians must be at least about half of that of an idle machine
(docs/benchmarks.md). Noise on a machine with other load therefore does not fail the tests, while a kernel that falls
back to eager, or no longer uses vector instructions or threads, does. No absolute time is checked.
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
