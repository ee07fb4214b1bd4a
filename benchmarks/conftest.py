"""Options and parameters of the suites; see `benchmarks.suite`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # or the time to compile is that of a lookup
sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import suite
from benchmarks.peers import runtimes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--full``."""
    parser.addoption(
        "--full", action="store_true", help="also run the benchmarks that take minutes to compile or to run"
    )


def pytest_report_header() -> str:
    """State which inference runtimes are installed."""
    return runtimes.summary()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each variant of the entries of a module; the tests of an entry follow each other."""
    if "of_suite" in metafunc.fixturenames:
        chosen = list(suite.parameters(metafunc.module.ENTRIES, metafunc.config.getoption("--full")))
        names = [f"{entry.name}-{device}-{variant}" for entry, device, variant, _ in chosen]
        metafunc.parametrize("of_suite", chosen, ids=names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Use the simulated clock in all suites."""
    for item in items:
        if "of_suite" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=suite.CLOCK))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Write the facts of `benchmarks.machine` into the results, and no host names."""
    measured = {each["extra_info"].pop("on") for each in output_json["benchmarks"]}
    output_json["devices"] = {device: suite.facts(device) for device in suite.DEVICES if device in measured}
    output_json["ceilings"] = {device: suite.limits(device) for device in output_json["devices"]}
    output_json["machine_info"] = next(iter(output_json["devices"].values()), {})
    output_json.pop("commit_info", None)
    for each in output_json["benchmarks"]:
        each["stats"].pop("data", None)
        each["params"] = {"of_suite": [str(part) for part in each["params"]["of_suite"][:3]]}


@pytest.fixture(scope="session")
def _suite() -> suite.Suite:
    return suite.Suite()


@pytest.fixture
def hand_over(
    benchmark: BenchmarkFixture, of_suite: tuple[suite.Entry, str, str, tuple[str, ...]], _suite: suite.Suite
) -> Callable[[], None]:
    """Return a function that measures the entry, unless an earlier test did, and passes on its times."""
    return lambda: _suite.hand_over(benchmark, *of_suite)
