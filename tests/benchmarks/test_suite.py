"""Tests of the suites: their results in pytest-benchmark, skipped variants, and the pages made from their files."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import allocation, cases, scaling, suite, timing
from benchmarks.reporting import compare, figures, join, report
from benchmarks.suite import CLOCK, Entry
from savl.ops.op import why_unavailable

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_EXTENSION = why_unavailable("window_attention", "cpp")
RUN = cases.Run(torch.device("cpu"), torch.float32, 32, compiled=False)
CEILINGS = {"copy_gb_per_second": 10.0, "product_tflops": 0.1}
needs_extension = pytest.mark.skipif(WITHOUT_EXTENSION is not None, reason=str(WITHOUT_EXTENSION))


def collected(*arguments: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("::", 1)[1] for line in done.stdout.splitlines() if "::" in line]


def test_every_op_block_and_network_has_benchmarks_on_both_devices() -> None:
    modules = [importlib.import_module(f"benchmarks.test_{name}") for name in ("ops", "blocks", "networks", "startup")]
    names = {
        f"[{entry.name}-{device}-{variant}]"
        for module in modules
        for entry, device, variant, _ in suite.parameters(module.ENTRIES, full=False)
    }
    for device in suite.DEVICES:
        for entry in (
            "window attention",
            "overlapping attention and gradients",
            "posterior",
            "modulation and gradients",
            "layer norm and gradients",
            "DSCA",
            "HAB",
            "OCAB",
            "savl-tiny, tile",
            "savl-base, tile",
            "hat-s, tile",
            "savl-tiny, batch",
            "savl-tiny, 1 megapixel",
            "savl-tiny, training step",
        ):
            for variant in ("eager", "fused"):
                assert f"[{entry}-{device}-{variant}]" in names, (entry, device, variant)
    assert "[start-cpu-import savl]" in names
    full = {name[name.index("[") :] for name in collected("--full")}
    assert names < full
    assert any("compile, max-autotune" in name for name in full - names)


def test_the_simulated_clock_returns_the_measured_times() -> None:
    start = CLOCK()
    CLOCK.advance(0.25)
    assert CLOCK() - start == pytest.approx(0.25)


@needs_extension
def test_a_suite_reports_the_times_of_each_variant_or_skips_it_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = {
        "eager": {"seconds": [3.0, 1.0, 2.0], "items": 4, "error": [1e-7]},
        "fused": {"failed": "RuntimeError: no"},
        "flex": {"failed": "not compiled"},
        "compile": {"failed": "ArithmeticError: computes something else"},
    }
    asked: list[str] = []

    def records(self: Entry, device: str, variants: tuple[str, ...]) -> suite.Records:
        asked.append(self.name)
        return measured

    monkeypatch.setattr(Entry, "records", records)
    entry, variants = Entry("it", partial(cases.op_case, name="channel_modulation"), tuple(measured)), tuple(measured)
    given = FakeBenchmark()
    suites = suite.Suite()
    suites.hand_over(given, entry, "cpu", "eager", variants)  # type: ignore[arg-type]
    assert given.times == [3.0, 1.0, 2.0]
    assert given.group == "it, cpu"
    assert given.extra_info["images_per_second"] == 2.0
    assert given.extra_info["error"] == [1e-7]
    with pytest.raises(pytest.skip.Exception, match="not compiled"):
        suites.hand_over(given, entry, "cpu", "flex", variants)  # type: ignore[arg-type]
    for variant in ("fused", "compile"):
        with pytest.raises(pytest.fail.Exception, match=variant):
            suites.hand_over(given, entry, "cpu", variant, variants)  # type: ignore[arg-type]
    assert asked == ["it"], "an entry is measured once"
    if not torch.cuda.is_available():
        with pytest.raises(pytest.skip.Exception, match="no CUDA GPU"):
            suites.hand_over(given, entry, "cuda", "eager", variants)  # type: ignore[arg-type]


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that `Suite.hand_over` uses, with its clock."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.times: list[float] = []

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            arguments, options = setup()
            start = CLOCK()
            target(*arguments, **options)
            self.times.append(CLOCK() - start)


@needs_extension
def test_a_measurement_has_times_errors_memory_and_shares_of_the_ceilings() -> None:
    case = cases.op_case(RUN, "window_attention").only(("sdpa", "fused", "flex"))
    records = timing.check_and_time(case, RUN, 3, CEILINGS)
    assert set(records) == {"eager", "sdpa", "fused", "flex"}
    assert records["flex"] == {"failed": "torch.compile was switched off"}
    for name in ("eager", "sdpa", "fused"):
        record = records[name]
        assert len(record["seconds"]) == 3
        assert record["first_call_seconds"] > 0
        assert record["error"][0] <= record["allowed"][0]
        assert record["of_roofline"] > 0
        assert record["of_product_tflops"] == pytest.approx(record["tflops"] / 0.1)
    assert "peak_bytes" in records["eager"] or sys.platform != "linux"


def test_the_flops_of_attention_count_only_unmasked_pairs() -> None:
    shift = cases.WINDOW // 2
    y = (torch.arange(32) - shift) % 32
    seen = 0
    for first in range(32):
        same_window = y // cases.WINDOW == y[first] // cases.WINDOW
        wrapped = (torch.arange(32) < shift) == (first < shift)
        last = y // cases.WINDOW == 1
        seen += int((same_window & (~last | wrapped)).sum())
    case = cases.op_case(RUN, "window_attention")
    assert case.flops == 2 * 2 * seen**2 * cases.CHANNELS


def test_the_share_of_the_roofline_uses_the_limiting_ceiling() -> None:
    case = cases.BenchmarkCase("it", (), {}, None, moved=1e9, flops=1e9)
    found = timing.rates(case, 0.5, CEILINGS)
    assert found["gb_per_second"] == pytest.approx(2.0)
    assert found["tflops"] == pytest.approx(0.002)
    assert found["of_roofline"] == pytest.approx(0.2), "memory takes 0.1 s, the product 0.01 s"


# Files


def benchmark_file(path: Path, **medians: float) -> Path:
    benchmarks = [
        {
            "name": f"test_op[it-cpu-{variant}]",
            "group": "it, cpu",
            "stats": {"median": median, "q1": 0.98 * median, "q3": 1.02 * median},
        }
        for variant, median in medians.items()
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {"device": "x"}}))
    return path


def test_compare_distinguishes_slower_from_noise_and_the_kernel_from_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = benchmark_file(tmp_path / "before.json", eager=2.0, fused=1.0, gone=1.0)
    slower = benchmark_file(tmp_path / "slower.json", eager=2.0, fused=1.3)
    assert compare.main([str(before), str(slower)]) == 1
    said = capsys.readouterr().out
    assert "| test_op[it-cpu-fused] | 1000 ms ± 2% | 1300 ms ± 2% | 1.30 | slower |" in said
    assert "eager" not in said
    assert "2 compared: 1 slower, 0 faster, 1 same; 1 gone, 0 new" in said
    noise = benchmark_file(tmp_path / "noise.json", eager=2.02, fused=1.03)
    assert compare.main([str(before), str(noise)]) == 0
    machine = benchmark_file(tmp_path / "machine.json", eager=4.0, fused=2.0)
    assert compare.main([str(before), str(machine)]) == 1
    assert compare.main([str(before), str(machine), "--against", "eager"]) == 0
    assert compare.main([str(slower), str(before), "--against", "eager"]) == 0
    assert "faster" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": [{}]}'])
def test_a_file_that_is_not_a_result_is_named_in_the_error(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = benchmark_file(tmp_path / "good.json", eager=1.0), tmp_path / "bad.json"
    bad.write_text(content)
    assert compare.main([str(good), str(bad)]) == 2
    assert "bad.json: not a file of --benchmark-json" in capsys.readouterr().err
    assert compare.main([str(good), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def part(path: Path, name: str, product: float, commit: str = "c") -> Path:
    """Write a result with one benchmark of 0.01 TFLOP/s and 5 GB/s; ``product`` is the ceiling in TFLOP/s."""
    info = {"device": "x", "tflops": 0.01, "gb_per_second": 5.0, "of_roofline": 0.9, "peak_bytes": 1}
    benchmark = {"fullname": name, "params": {"of_suite": [name, "cpu", "fused"]}, "extra_info": info}
    ceilings = {"cpu": {"product_tflops": product, "copy_gb_per_second": 20.0}}
    whole = {"devices": {"cpu": {"device": "x", "commit": commit}}, "ceilings": ceilings, "benchmarks": [benchmark]}
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def test_joined_parts_use_the_highest_ceilings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = part(tmp_path / "1.json", "a", 0.02), part(tmp_path / "2.json", "b", 0.1)
    whole = tmp_path / "whole.json"
    join.main([str(first), str(second), "-o", str(whole)])
    found = json.loads(whole.read_text(encoding="utf-8"))
    assert found["ceilings"]["cpu"] == {"product_tflops": 0.1, "copy_gb_per_second": 20.0}
    assert [each["fullname"] for each in found["benchmarks"]] == ["a", "b"]
    for each in found["benchmarks"]:
        known = each["extra_info"]
        assert known["of_product_tflops"] == pytest.approx(0.1)
        assert known["of_copy_bandwidth"] == known["of_roofline"] == pytest.approx(0.25)
        assert known["peak_bytes"] == 1
    other = part(tmp_path / "3.json", "c", 0.1, commit="another")
    for parts, words in (([first, other], "they differ in commit"), ([first, first], "more than one part has a")):
        with pytest.raises(SystemExit):
            join.main([*map(str, parts), "-o", str(tmp_path / "none.json")])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_durations_have_a_suitable_unit() -> None:
    found = [report.duration(seconds) for seconds in (2.5e-5, 0.0123, 3.456, 688.0, 2048.0)]
    assert found == ["25 µs", "12.3 ms", "3.46 s", "688 s", "34.1 min"]


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are those of Linux")
def test_time_in_the_system_and_page_faults_are_reported() -> None:
    found = allocation.measure_here("savl-tiny", "eager")
    assert 0 <= found["system_seconds"] <= 2 * found["seconds"]
    assert found["page_faults"] >= 0
    rows = [{"allocator": "kept", "backend": "eager", **found, "page_faults": 1190242.0}]
    assert "| keeps freed memory | eager |" in allocation.table({"rows": rows})
    assert "| 1,190,242 |" in allocation.table({"rows": rows})


def test_every_allocator_and_backend_is_measured_in_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append((env.get("GLIBC_TUNABLES"), command[-1]))
        record = {"seconds": float(len(seen)), "system_seconds": 0.0, "page_faults": 0.0}
        return subprocess.CompletedProcess(command, 0, stdout=f"a warning\n{json.dumps(record)}\n", stderr="")

    monkeypatch.setattr(allocation, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(allocation.machine, "facts", dict)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    rows = allocation.measure("savl-tiny", rounds=3)["rows"]
    kept = allocation.KEPT["GLIBC_TUNABLES"]
    assert seen == 3 * [(None, "eager"), (None, "fused"), (kept, "eager"), (kept, "fused")], "in turn"
    assert [(row["allocator"], row["backend"], row["seconds"]) for row in rows] == [
        ("as it is", "eager", 5.0),
        ("as it is", "fused", 6.0),
        ("kept", "eager", 7.0),
        ("kept", "fused", 8.0),
    ]


def test_growth_is_the_exponent_of_the_area() -> None:
    rows = [{"side": side, "tile": 0, "seconds": 3e-6 * side**2} for side in (64, 128, 256)]
    assert scaling.growth(rows) == pytest.approx(1)
    assert scaling.growth([row | {"seconds": row["seconds"] ** 2} for row in rows]) == pytest.approx(2)
    assert scaling.growth(rows[:2]) is None


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read off /proc")
def test_a_point_that_exceeds_the_memory_limit_is_out_of_memory() -> None:
    point = scaling.Point("area", "window attention", "eager", 64)
    assert scaling.measure(point, 8)["seconds"] > 0
    large = scaling.Point("area", "window attention", "eager", 512)
    assert scaling.measure(large, 0.5)["failed"] == "out of memory"


def test_the_page_and_its_figures_match_the_committed_results() -> None:
    text, drawn = report.page()
    assert report.PAGE.read_text(encoding="utf-8") == text, "out of date: run python -m benchmarks.reporting.report"
    assert drawn
    for name in drawn:
        assert f"benchmarks/{name}" in text
        assert (report.FIGURES / name).read_text(encoding="utf-8").startswith("<?xml"), name
    assert {path.name for path in report.FIGURES.glob("*.svg")} == set(drawn), "figures of nothing"


def test_a_slower_fused_kernel_is_marked_as_slower() -> None:
    known = {"device": "x"}
    found = {
        "it, cpu": {
            "eager": {"median": 2.0, **known},
            "compile": {"median": 0.5, **known},
            "fused": {"median": 1.0, **known},
        }
    }
    assert report.best_peer(found["it, cpu"]) == ("compile", 0.5)
    assert "0.50 × compile, **slower**" in report.suite_tables(found)
    drawing = figures.speedups({"it": {"eager": 2.0, "compile": 0.5, "fused": 1.0}})
    assert "<svg" in drawing
    assert "4.00" in drawing
