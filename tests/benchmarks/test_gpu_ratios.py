"""Tests of the script that measures on GPUs, run on the CPU, and of its baselines."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, gpu_ratios, timing
from benchmarks.peers import flex, sdpa
from savl import ops
from savl.network import CONFIGS
from savl.ops.library import EAGER, FUSED
from savl.ops.op import OPS, why_unavailable

WITHOUT_EXTENSION = why_unavailable("window_attention", "cpp")
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ["--device", "cpu", "--side", "32", "--no-compile", "--network", "savl-tiny", "--rounds", "1"]


@pytest.fixture
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurement of the ceilings, which takes seconds."""
    monkeypatch.setattr(gpu_ratios, "ceilings", lambda run: {"copy_gb_per_second": 10.0, "product_tflops": 0.1})


def run(path: Path, *arguments: str) -> dict[str, Any]:
    assert gpu_ratios.main([*CPU, "--dtype", "float32", "--json", str(path), *arguments]) == 0
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.skipif(WITHOUT_EXTENSION is not None, reason=str(WITHOUT_EXTENSION))
def test_a_run_on_the_cpu_measures_every_op_and_reports_what_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = dataclasses.replace(CONFIGS["savl-tiny"], depths=(1,))
    monkeypatch.setitem(CONFIGS, "savl-tiny", shallow)
    parts = ["window", "window-backward", "posterior", "modulation", "network", "max-autotune"]
    content = run(tmp_path / "new" / "ratios.json", "--only", *parts)
    assert content["complete"]
    assert content["settings"] == {
        "side": 32,
        "dtype": "float32",
        "rounds": 1,
        "compiled": False,
        "network": "savl-tiny",
    }
    assert {"device", "torch", "savl", "commit"} <= set(content["machine"])
    assert set(content["ceilings"]) == {"copy_gb_per_second", "product_tflops"}
    assert list(content["parts"]) == parts
    assert content["parts"].pop("max-autotune")["state"] == "not on this device"
    for name, part in content["parts"].items():
        assert part["state"] == "done", (name, part)
        for variant, record in part["variants"].items():
            if variant == "flex":
                assert record == {"failed": "torch.compile was switched off"}
                continue
            if variant == cases.FUSED_GRAPH:
                assert record == {"failed": "CUDA graphs need a CUDA GPU"}
                continue
            assert "failed" not in record, (name, variant, record)
            assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
            if variant != timing.COPY:
                assert all(error <= most for error, most in zip(record["error"], record["allowed"], strict=True))
        for row in part["ratios"]:
            measured = row["against"] not in ("flex", cases.FUSED_GRAPH) and "memory" not in row["what"]
            assert (row["ratio"] is not None) == measured, row
            assert row["met"] == (None if row["wanted"] is None or not measured else row["ratio"] >= row["wanted"])
            assert measured or row["why"]
    assert len(content["parts"]["window-backward"]["variants"]["fused"]["error"]) == 4, "out and three gradients"


@pytest.mark.usefixtures("_no_ceilings")
def test_a_failing_variant_is_recorded_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(cases.sdpa, "window_attention", out_of_memory)
    monkeypatch.setattr(cases.Run, "fused", lambda self: cases.EAGER)
    part = run(tmp_path / "ratios.json", "--only", "window")["parts"]["window"]
    assert part["state"] == "done"
    assert part["variants"]["sdpa"]["failed"].startswith("OutOfMemoryError: CUDA out of memory")
    assert part["variants"]["eager"]["median_ms"] > 0
    (row,) = (row for row in part["ratios"] if row["against"] == "sdpa")
    assert row["ratio"] is None
    assert "out of memory" in row["why"]


@pytest.mark.usefixtures("_no_ceilings")
def test_a_variant_with_wrong_results_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.sdpa, "window_attention", lambda qkv, *_, **__: qkv[..., :144].clone())
    monkeypatch.setattr(cases.Run, "fused", lambda self: cases.EAGER)
    part = run(tmp_path / "ratios.json", "--only", "window")["parts"]["window"]
    assert "computes something else" in part["variants"]["sdpa"]["failed"]
    assert "median_ms" not in part["variants"]["sdpa"]


@pytest.mark.usefixtures("_no_ceilings")
def test_a_failing_part_keeps_earlier_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ratios.json"

    def cut_off(settings: gpu_ratios.Settings) -> cases.BenchmarkCase:
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_ratios.PARTS, "network", gpu_ratios.Part(cut_off, {}))
    monkeypatch.setattr(cases.Run, "fused", lambda self: cases.EAGER)
    with pytest.raises(KeyboardInterrupt):
        run(path, "--only", "modulation", "network")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert not content["complete"]
    assert content["parts"]["modulation"]["state"] == "done"


def test_the_fused_variant_requests_its_backend_explicitly() -> None:
    for kind in ("cpu", "cuda"):
        wanted = cases.Run(torch.device(kind), torch.float32, 32, False).fused()
        chosen = {name: getattr(wanted, name) for name in OPS}
        without = {name for name, op in OPS.items() if all(FUSED[each].device != kind for each in op.backends)}
        assert without == {name for name, backend in chosen.items() if backend == EAGER}
        assert {FUSED[backend].device for backend in chosen.values() if backend != EAGER} == {kind}


@pytest.mark.parametrize(("window", "shift", "batch"), [(16, 8, 1), (8, 4, 2), (16, 0, 1)])
def test_flex_and_padded_sdpa_agree_with_the_reference_on_shifted_windows(window: int, shift: int, batch: int) -> None:
    qkv = torch.randn(batch, 32, 32, 3 * 48)
    table, severity = torch.randn((2 * window - 1) ** 2, 2), 2 * torch.rand(batch, 32, 32)
    expected = ops.window_attention(qkv, table, severity, window=window, shift=shift, kernels=cases.EAGER)
    mask = flex.shift_block_mask(32, 32, window, shift, batch) if shift else None
    by_flex = quietly(flex.window_attention, qkv, table, severity, window=window, shift=shift, block_mask=mask)
    torch.testing.assert_close(by_flex, expected, rtol=0, atol=2e-5)
    for backend in (None, sdpa.SDPBackend.MATH):
        by_sdpa = sdpa.window_attention(
            qkv, table, severity, window=window, shift=shift, padded_head_dim=32, backend=backend
        )
        torch.testing.assert_close(by_sdpa, expected, rtol=0, atol=2e-5)


def test_flex_and_padded_sdpa_agree_with_the_reference_on_overlapping_windows() -> None:
    q, kv = torch.randn(1, 32, 32, 144).split((48, 96), dim=-1)
    table, severity = torch.randn(39**2, 2), 2 * torch.rand(1, 32, 32)
    windows = {"window": 16, "key_window": 24}
    expected = ops.overlapping_window_attention(q, kv, table, severity, **windows, kernels=cases.EAGER)
    by_flex = quietly(flex.overlapping_window_attention, q, kv, table, severity, **windows)
    torch.testing.assert_close(by_flex, expected, rtol=0, atol=2e-5)
    by_sdpa = sdpa.overlapping_window_attention(q, kv, table, severity, **windows, padded_head_dim=32)
    torch.testing.assert_close(by_sdpa, expected, rtol=0, atol=2e-5)


def quietly(call: Any, *arguments: Any, **options: Any) -> Tensor:
    """Ignore the warning that uncompiled flex_attention is slow; its results are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result: Tensor = call(*arguments, **options)
    return result
