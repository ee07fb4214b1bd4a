"""How the pytest-benchmark suites time a variant: checked first, warmed up, its work written beside its time."""

from __future__ import annotations

from functools import cache

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.subjects import Subject


def time_variant(benchmark: BenchmarkFixture, subject: Subject, variant: str, rounds: int = 15) -> None:
    """Time one variant of a subject once all of them are known to agree.

    Args:
        benchmark: The fixture of pytest-benchmark; `extra_info` gets the machine, GFLOP/s and GB/s.
        subject: What is computed.
        variant: The way to time, or one of the subject's copies.
        rounds: How often.
    """
    subject.check()
    benchmark.group = subject.name
    benchmark.extra_info.update(machine.facts())
    copies = subject.copies or {}
    benchmark.pedantic({**subject.variants, **copies}[variant], rounds=rounds, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    if subject.flops and variant not in copies:
        gflops = subject.flops / seconds / 1e9
        benchmark.extra_info.update(gflops=round(gflops, 1), of_peak=round(gflops / _peak_gflops(), 3))
    if subject.bytes:
        benchmark.extra_info["gb_per_second"] = round(subject.bytes / seconds / 1e9, 2)


@cache
def _peak_gflops() -> float:
    return machine.peak_gflops()
