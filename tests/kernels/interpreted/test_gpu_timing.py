"""Timing by `savl kernels tune`: each kernel runs alone with given block sizes, and its results are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from savl.kernels.configs import STAGES, KernelConfig, Problem, default_config
from savl.kernels.tune import TuningProblem

CPU = torch.device("cpu")
PLAIN = TuningProblem(Problem("float32", 3, 2, 4), 1, False)
SHIFTED = TuningProblem(Problem("float16", 3, 2, 2), 1, True)
TILE = KernelConfig(16, 32, 1, 1)


@pytest.fixture(autouse=True)
def _four_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on two by two windows, which include a shifted one, as the interpreter is slow."""
    from savl.kernels import gpu_timing

    original = gpu_timing.inputs

    def smaller(problem: TuningProblem, *, side: int, device: torch.device) -> Any:
        return original(problem, side=min(side, 2 * problem.problem.window), device=device)

    monkeypatch.setattr(gpu_timing, "inputs", smaller)


def rule(stage: str, problem: TuningProblem) -> KernelConfig:
    return default_config(stage, problem.problem, (9, 0))


@pytest.mark.parametrize("stage", STAGES)
def test_each_kernel_can_be_run_again_alone_with_its_own_block_sizes(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from savl.kernels import gpu_timing, launch

    launched = []
    original = launch.Attention.launch

    def record(call: Any, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launched.append((kernel.fn.__name__, constants.get("BLOCK_M")))
        original(call, kernel, programs, *arguments, **constants)

    monkeypatch.setattr(launch.Attention, "launch", record)
    problem = SHIFTED if stage == "backward_qkv" else PLAIN
    results, again = gpu_timing.run(stage, gpu_timing.inputs(problem, side=4, device=CPU), KernelConfig(32, 16, 1, 1))
    launched.clear()
    written = {"forward": "out", "backward_qkv": "d v", "backward_q": "d q", "backward_kv": "d k"}.get(stage)
    if written is None:
        again()
    else:
        expected = results[written].clone()
        results[written].fill_(7)
        again()
        assert torch.equal(results[written], expected)
    assert launched == [(stage, 32)]


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        ("forward", PLAIN),
        ("backward_q", PLAIN),
        ("backward_kv", PLAIN),
        ("backward_qkv", SHIFTED),
        ("backward_bias", SHIFTED),
    ],
)
def test_other_block_sizes_agree_with_the_rule(stage: str, problem: TuningProblem) -> None:
    from savl.kernels import gpu_timing

    assert gpu_timing.disagreement(stage, problem, TILE, rule(stage, problem), CPU) is None


@pytest.mark.parametrize(("factor", "error"), [(None, "nan"), (1.1, "0.")], ids=["writes nothing", "off by a tenth"])
def test_a_kernel_with_wrong_results_disagrees(
    factor: float | None, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from savl.kernels import gpu_timing, launch

    original = launch.Attention.launch

    def wrong(call: Any, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if call.config("forward") != TILE:
            original(call, kernel, programs, *arguments, **constants)
        elif factor is not None:
            original(call, kernel, programs, *arguments, **constants)
            dict(zip(kernel.arg_names, arguments, strict=False))["out"].mul_(factor)

    monkeypatch.setattr(launch.Attention, "launch", wrong)
    reason = gpu_timing.disagreement("forward", SHIFTED, TILE, rule("forward", SHIFTED), CPU)
    assert reason is not None
    assert reason.startswith(f"the error of out is {error}")
    assert "is allowed" in reason
