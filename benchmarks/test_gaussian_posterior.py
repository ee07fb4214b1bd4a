"""Gaussian posterior: the fused kernel beside eager and `torch.compile`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import subjects
from benchmarks.timing import time_variant

VARIANTS = ("eager", "compile", "fused", "copy", "clone")


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(variant: str, benchmark: BenchmarkFixture) -> None:
    time_variant(benchmark, subjects.gaussian_posterior(compiled=variant == "compile"), variant)
