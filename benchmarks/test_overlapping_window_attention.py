"""Overlapping window attention: the fused kernel beside eager, SDPA and `torch.compile`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import subjects
from benchmarks.timing import time_variant

VARIANTS = ("eager", "sdpa", "sdpa, mask kept", "compile", "fused")


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(variant: str, benchmark: BenchmarkFixture) -> None:
    time_variant(benchmark, subjects.overlapping_window_attention(compiled=variant == "compile"), variant)
