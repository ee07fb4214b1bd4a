"""Whole networks on a 64×64 tile, end to end."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import subjects
from benchmarks.timing import time_variant


@pytest.mark.parametrize("variant", ["eager", "sdpa", "compile", "fused"])
@pytest.mark.parametrize("name", ["savl-tiny", "savl-base", "hat-s"])
def test_one_tile(name: str, variant: str, benchmark: BenchmarkFixture) -> None:
    if variant == "compile" and name != "savl-tiny":
        pytest.skip("takes minutes to compile: python -m benchmarks.ratios --compile measures it")
    time_variant(benchmark, subjects.network(name, compiled=variant == "compile"), variant, rounds=5)
