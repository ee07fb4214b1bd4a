"""Entries of the pytest-benchmark suites, and a simulated clock that reports times measured before.

pytest-benchmark times one test after the other. On a machine with other load, ratios of such times are not reliable.
Therefore `benchmarks.timing` times all variants of an entry in turn when the first of its tests runs. Each test then
passes the times of its variant to pytest-benchmark by advancing the simulated clock. Statistics, groups, JSON and
comparisons are those of pytest-benchmark.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.cases import BenchmarkCase, Run
from benchmarks.timing import ceilings, check_and_time, release_memory

DEVICES = ("cpu", "cuda")
Records = dict[str, dict[str, Any]]


class Clock:
    """A timer for pytest-benchmark whose time changes only by `advance`."""

    __name__ = "benchmarks.suite.Clock"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now += seconds


CLOCK = Clock()


@dataclass(frozen=True)
class Entry:
    """A case of a suite, with the variants to measure."""

    name: str
    build: Callable[[Run], BenchmarkCase] | None
    variants: tuple[str, ...]
    more: tuple[str, ...] = ()
    """Variants with ``--full``."""
    rounds: int = 15
    """Rounds on a CPU; a GPU does twice as many."""
    full: bool = False
    """Whether the entry is measured with ``--full`` only."""
    sides: tuple[int, int] = (64, 512)
    """Side of the image in tokens, on a CPU and on a GPU."""
    measure: Callable[[Run, int], Records] | None = None
    """Function that measures instead of `benchmarks.timing.check_and_time`, for entries without a case."""
    devices: tuple[str, ...] = DEVICES

    def __str__(self) -> str:
        return self.name

    def run(self, device: str) -> Run:
        """Return device, dtype and size: float32 on a CPU, bfloat16 on a GPU."""
        cuda = device == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        return Run(torch.device(device), dtype, self.sides[cuda], precomputed_masks=not cuda)

    def records(self, device: str, variants: tuple[str, ...]) -> Records:
        """Measure all variants in turn."""
        run, rounds = self.run(device), self.rounds * (2 if device == "cuda" else 1)
        if self.measure is not None:
            return self.measure(run, rounds)
        assert self.build is not None
        case = self.build(run).only(variants)
        return {
            name: {**record, "items": case.items}
            for name, record in check_and_time(case, run, rounds, limits(device)).items()
        }


@cache
def limits(device: str) -> dict[str, float]:
    """Return the ceilings of a device in the dtype that the suites use there."""
    return ceilings(Entry("ceilings", None, ()).run(device))


@cache
def facts(device: str) -> dict[str, Any]:
    """Return the facts about a device that the figures depend on."""
    return machine.device_facts(torch.device(device))


def parameters(entries: list[Entry], full: bool) -> Iterator[tuple[Entry, str, str, tuple[str, ...]]]:
    """Yield entry, device, variant and all variants of the entry, for each test of a suite."""
    for device in DEVICES:
        for entry in entries:
            if device not in entry.devices or (entry.full and not full):
                continue
            variants = entry.variants + (entry.more if full else ())
            for variant in variants:
                yield entry, device, variant, variants


class Suite:
    """Measure each entry once, and report the times of one variant after the other to pytest-benchmark."""

    def __init__(self) -> None:
        self._measured: tuple[str, str] | None = None
        self._records: Records = {}

    def hand_over(
        self, benchmark: BenchmarkFixture, entry: Entry, device: str, variant: str, variants: tuple[str, ...]
    ) -> None:
        """Report the times of a variant, with its other facts in ``extra_info``."""
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA GPU")
        if self._measured != (entry.name, device):
            self._records = {}
            torch.compiler.reset()
            release_memory(entry.run(device))
            self._records = entry.records(device, variants)
            self._measured = (entry.name, device)
        record = self._records.get(variant, {"failed": "it is not among the variants here"})
        if "seconds" not in record:
            self._explain(variant, record)
        seconds = record["seconds"]
        benchmark.group = f"{entry.name}, {device}"
        benchmark.extra_info |= {"on": device, "device": facts(device)["device"], **_known(record)}
        times = iter(seconds)
        benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(times),), {}), rounds=len(seconds))

    def _explain(self, variant: str, record: Mapping[str, Any]) -> None:
        """Fail if the package is at fault, skip if a baseline is."""
        why = record.get("failed", "it was not timed")
        if variant in ("eager", "fused", "accelerated") or "something else" in why:
            pytest.fail(f"{variant}: {why}")
        pytest.skip(why)


def _known(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``extra_info``."""
    known = {name: value for name, value in record.items() if name not in ("seconds", "items")}
    if (items := record.get("items", 1)) > 1:
        known["images_per_second"] = items / statistics.median(record["seconds"])
    return known
