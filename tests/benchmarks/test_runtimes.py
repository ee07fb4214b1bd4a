"""Tests of the benchmarks of ONNX Runtime and OpenVINO: results, tolerances, and reports of missing packages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, ratios, timing
from benchmarks.peers import runtimes
from savl.network import CONFIGS, SAVL

RUN = cases.Run(torch.device("cpu"), torch.float32, 16, compiled=False)
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")


def small(name: str) -> SAVL:
    """Return a network with one block, and random weights where an untrained network has zeros."""
    torch.manual_seed(0)
    options = {"depths": (1,), "channels": 48, "heads": 2, "estimator_dilations": (1,)}
    network = SAVL(replace(CONFIGS[name], **options)).eval()
    for parameter in (network.upsampler.to_image.weight, network.upsampler.to_image.bias):
        torch.nn.init.normal_(parameter, std=0.02)
    return network


@pytest.mark.slow
@pytest.mark.skipif(
    any(runtimes.installed(name) is None for name in PACKAGES), reason=f"needs the packages of {runtimes.INSTALL}"
)
@pytest.mark.parametrize("name", ["savl-tiny", "hat-s"])
def test_the_runtimes_agree_with_eager_up_to_the_border(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    exported: list[bytes] = []
    export = runtimes.export
    monkeypatch.setattr(cases, "_weighted", small)
    monkeypatch.setattr(runtimes, "export", lambda *given: exported.append(export(*given)) or exported[-1])
    case = cases.network(RUN, name)
    _, records = timing.check(case.only((*runtimes.VARIANTS, cases.FUSED_BFLOAT16)), RUN)
    for variant in (*runtimes.VARIANTS, cases.FUSED_BFLOAT16):
        if variant not in case.skipped:
            assert "failed" not in records[variant], (variant, records[variant])
            assert records[variant]["error"][0] <= records[variant]["allowed"][0]
    assert len(exported) == 1, "all runtimes run the same graph"
    for node in onnx.load_from_string(exported[0]).graph.node:
        attributes = {each.name: each.i for each in node.attribute}
        assert not attributes.get("exclude_outside"), f"{node.name}: OpenVINO ignores exclude_outside"


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "installed", lambda name: None if name == "openvino" else "1.2.3")
    assert runtimes.summary().endswith("onnxruntime 1.2.3, openvino is not installed; pip install 'savl[peers]'")
    why = "openvino not installed; pip install 'savl[peers]'"
    assert runtimes.unavailable() == {runtimes.OPENVINO: why, runtimes.OPENVINO_DEFAULT: why}
    case = cases.network(RUN, "savl-tiny")
    assert runtimes.ONNX_RUNTIME in case.variants
    assert case.only(runtimes.VARIANTS).skipped == runtimes.unavailable()
    monkeypatch.setattr(runtimes, "installed", lambda name: "1.2.3")
    monkeypatch.setattr(runtimes, "default_precision", lambda: torch.float32)
    assert set(runtimes.unavailable()) == {runtimes.OPENVINO_DEFAULT}, "it would be measured twice"


def test_a_variant_in_bfloat16_is_compared_with_eager_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)

    def rounded(given: Tensor) -> Tensor:
        return (given.bfloat16() @ weight.bfloat16()).float()

    def wrong(given: Tensor) -> Tensor:
        return 1.1 * rounded(given)

    variants: dict[str, Any] = {
        "eager": lambda given: given @ weight.to(given.dtype),
        "rounded": rounded,
        "wrong": wrong,
        "claims float32": rounded,
    }
    precisions = dict.fromkeys(("rounded", "wrong"), torch.bfloat16)
    case = cases.BenchmarkCase("it", (x,), variants, torch.float64, precisions=precisions)
    calls, records = timing.check(case, RUN)
    assert set(calls) == {"eager", "rounded"}
    for name in ("wrong", "claims float32"):
        assert "computes something else" in records[name]["failed"]


def test_ratios_compare_equal_precisions_and_leave_out_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"eager": 8.0, "fused": 4.0, cases.FUSED_BFLOAT16: 2.0, runtimes.OPENVINO_DEFAULT: 3.0}
    case = cases.BenchmarkCase(
        "it",
        (),
        dict.fromkeys(seconds, lambda: torch.zeros(())),
        torch.float64,
        skipped={runtimes.ONNX_RUNTIME: "not installed"},
        precisions=dict.fromkeys((cases.FUSED_BFLOAT16, runtimes.OPENVINO_DEFAULT), torch.bfloat16),
    )

    def timed(case: cases.BenchmarkCase, *_: Any) -> dict[str, Any]:
        return {name: {"seconds": [seconds[name]]} for name in case.variants}

    monkeypatch.setattr(ratios, "check_and_time", timed)
    wanted = {"eager": 1.6, runtimes.ONNX_RUNTIME: 1.6, runtimes.OPENVINO_DEFAULT: 1.5}
    found, _ = ratios.of_case(case, wanted, RUN, 1, {})
    assert {each.against: each.ratio for each in found} == {"eager": 2.0, runtimes.OPENVINO_DEFAULT: 1.5}
    assert found[-1].detail == "2 s in bfloat16"
