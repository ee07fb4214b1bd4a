"""The CUDA kernels compile for every supported GPU without spills, and the committed table is up to date."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predicted import cuda_resources

COMMITTED: dict[str, Any] = json.loads(cuda_resources.COMMITTED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(toolkit: Any, cuda_objects: Path) -> dict[str, Any]:
    """Every source, compiled for every architecture of the table."""
    return cuda_resources.measure(toolkit, cuda_objects)


@pytest.mark.slow
def test_no_kernel_spills_or_has_a_stack_frame(measured: dict[str, Any]) -> None:
    assert measured["kernels"], "the compiler named no kernel"
    assert not cuda_resources.problems(measured)


@pytest.mark.slow
def test_the_committed_table_matches_the_kernels(measured: dict[str, Any]) -> None:
    again = "python -m benchmarks.predicted.cuda_resources --json csrc/cuda/resources.json"
    assert measured["kernels"].keys() == COMMITTED["kernels"].keys(), f"other kernels: run {again}"
    if set(measured["architectures"]) == set(COMMITTED["architectures"]) and measured["nvcc"] == COMMITTED["nvcc"]:
        assert measured == COMMITTED, f"other resources: run {again}"
    else:  # another nvcc may know fewer architectures, and assigns registers differently
        assert set(measured["architectures"]) <= set(COMMITTED["architectures"])


def test_the_committed_table_has_every_architecture_and_source_and_no_spill() -> None:
    wanted = [f"sm_{each.number}" for each in cuda_resources.nvcc.parse_architectures(cuda_resources.nvcc.DEFAULT)]
    assert COMMITTED["architectures"] == wanted
    assert not cuda_resources.problems(COMMITTED)
    assert {name.partition(":")[0] for name in COMMITTED["kernels"]} == set(cuda_resources.nvcc.SOURCES)


def test_every_source_is_compiled() -> None:
    found = {path.name for path in (cuda_resources.ROOT / "csrc/cuda").glob("*.cu")}
    assert found == set(cuda_resources.nvcc.SOURCES)


def test_spills_stack_frames_and_missing_kernels_are_reported() -> None:
    report = copy.deepcopy(COMMITTED)
    names = list(report["kernels"])
    report["kernels"][names[0]]["sm_90"]["spill_loads"] = 4
    report["kernels"][names[1]]["sm_80"]["stack_frame"] = 8
    del report["kernels"][names[2]]["sm_120"]
    assert len(cuda_resources.problems(report)) == 3


def test_the_page_has_the_committed_figures() -> None:
    page = cuda_resources.PAGE.read_text(encoding="utf-8")
    assert cuda_resources.with_table(page, COMMITTED) == page, (
        "run python -m benchmarks.predicted.cuda_resources --page"
    )
