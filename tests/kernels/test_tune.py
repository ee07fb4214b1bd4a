"""The search for block sizes, on a simulated GPU; interpreted/test_gpu_timing.py tests what runs on a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from savl.kernels import configs, tune
from savl.kernels.configs import KernelConfig, Problem, default_config
from savl.kernels.tune import CannotRunError, Task, TuningProblem
from savl.ops.library import TRITON_MISSING

needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))

HOPPER = (9, 0)
PROBLEM = Problem("bfloat16", 24, 16, 16)
TASK = Task("forward", TuningProblem(PROBLEM, 6, True))
TASKS = [Task(stage, TASK.tuning_problem) for stage in configs.STAGES]
RULE = default_config("forward", PROBLEM, HOPPER)
BEST = KernelConfig(128, 32, 4, 1)


@dataclass
class FakeGpu:
    """Takes 100 µs for everything but what ``times`` says."""

    times: dict[KernelConfig, float] = field(default_factory=dict)
    wrong: set[KernelConfig] = field(default_factory=set)
    broken: set[KernelConfig] = field(default_factory=set)
    noise: Callable[[int], float] = lambda count: 0.0
    name: str = "NVIDIA Test 80GB"
    architecture: tuple[int, int] = HOPPER
    triton: str = "3.9.0"
    measured: list[tuple[str, KernelConfig]] = field(default_factory=list)

    def measure(self, stage: str, tuning_problem: TuningProblem, config: KernelConfig) -> float:
        if config in self.broken:
            raise CannotRunError("out of resources")
        self.measured.append((stage, config))
        return self.times.get(config, 100.0) + self.noise(len(self.measured))

    def disagreement(
        self, stage: str, tuning_problem: TuningProblem, config: KernelConfig, rule: KernelConfig
    ) -> str | None:
        return "out differs" if config in self.wrong else None


def fits(task: Task, config: KernelConfig) -> None:
    return None


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that the fake GPU's block sizes are stored in."""
    monkeypatch.setenv("SAVL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(configs, "SHIPPED_FOLDER", tmp_path / "shipped")
    (tmp_path / "kernels").mkdir()
    configs.forget()
    yield tmp_path / "kernels" / "nvidia-test-80gb.json"
    configs.forget()


# Candidates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("window", "key_window"), [(16, 16), (16, 24), (8, 12), (5, 9), (2, 2)])
def test_candidates_are_configurations_that_a_kernel_supports(dtype: str, window: int, key_window: int) -> None:
    found = tune.candidates(Problem(dtype, 24, window, key_window))
    assert found
    assert len(set(found)) == len(found)
    for config in found:
        assert {config.block_m, config.block_n} <= {16, 32, 64, 128}
        assert config.block_m // 2 < window**2 or config.block_m == 16, "half the tile would hold all queries"
        assert config.block_n // 2 < key_window**2 or config.block_n == 16
        assert config.warps in (1, 2, 4, 8)
    assert len(found) <= 50, "each costs a compilation"


# The search


@pytest.mark.parametrize("best", [BEST, replace(BEST, stages=3), KernelConfig(16, 16, 1, 2)])
def test_the_fastest_is_found_and_a_pipeline_is_tried_where_it_is_fast_without(best: KernelConfig) -> None:
    machine = FakeGpu({replace(best, stages=1): 90.0, best: 80.0})
    outcome = tune.search(TASK, machine, fits)
    assert outcome.entry.config == best
    assert (outcome.entry.microseconds, outcome.entry.rule_microseconds) == (80.0, 100.0)
    assert outcome.gain == pytest.approx(0.2)
    assert outcome.entry.kernels == configs.kernels_hash()
    assert outcome.entry.triton == "3.9.0"


def test_slow_candidates_are_measured_less_often_than_fast_ones() -> None:
    machine = FakeGpu({config: 50.0 + place for place, config in enumerate(tune.candidates(PROBLEM))})
    tune.search(TASK, machine, fits)
    first, *_, last = tune.candidates(PROBLEM)
    counts = [sum(config == each for _, config in machine.measured) for each in (first, last)]
    assert counts[1] == 1
    assert counts[0] >= tune.TURNS + tune.FINAL_TURNS


def test_candidates_that_the_compiler_rejects_are_not_measured() -> None:
    machine = FakeGpu({BEST: 10.0, KernelConfig(32, 32, 2, 1): 50.0})
    outcome = tune.search(TASK, machine, lambda task, config: "spills" if config.warps == BEST.warps else None)
    assert outcome.entry.config == KernelConfig(32, 32, 2, 1)
    assert not [config for _, config in machine.measured if config.warps == BEST.warps]
    assert RULE.warps != BEST.warps
    assert outcome.left_out == sum(config.warps == BEST.warps for config in tune.candidates(PROBLEM))


def test_the_rule_is_measured_whatever_the_compiler_says() -> None:
    outcome = tune.search(TASK, FakeGpu(), lambda task, config: "spills")
    assert outcome.entry.config == RULE
    assert outcome.entry.rule_microseconds == 100.0


@pytest.mark.parametrize(("time", "wins"), [(98.5, False), (97.5, True)])
def test_a_gain_of_two_percent_or_less_is_none(time: float, wins: bool) -> None:
    entry = tune.search(TASK, FakeGpu({BEST: time}), fits).entry
    assert entry.config == (BEST if wins else RULE)
    assert entry.microseconds == (time if wins else 100.0)


def test_a_gain_that_drowns_in_noise_is_none() -> None:
    machine = FakeGpu({BEST: 90.0}, noise=lambda count: 30.0 * (count // 3 % 2))
    assert tune.search(TASK, machine, fits).entry.config == RULE


def test_candidates_with_wrong_results_are_skipped() -> None:
    second = KernelConfig(32, 32, 2, 1)
    machine = FakeGpu({BEST: 50.0, second: 60.0}, wrong={BEST, replace(BEST, stages=2), replace(BEST, stages=3)})
    assert tune.search(TASK, machine, fits).entry.config == second


def test_candidates_that_do_not_run_are_skipped() -> None:
    second = KernelConfig(32, 32, 2, 1)
    assert tune.search(TASK, FakeGpu({second: 60.0}, broken={BEST}), fits).entry.config == second


def test_a_rule_that_fails_is_reported() -> None:
    with pytest.raises(CannotRunError, match="out of resources"):
        tune.search(TASK, FakeGpu(broken={RULE}), fits)


def test_the_steps_are_reported() -> None:
    reported: list[tuple[Task, KernelConfig, str]] = []
    machine = FakeGpu()
    tune.search(TASK, machine, fits, lambda *step: reported.append(step))
    assert [(task.stage, config) for task, config, _ in reported] == machine.measured
    assert {why.partition(" ")[0] for _, _, why in reported} == {"rule", "turn", "final"}


def test_a_comparison_measures_both_in_turn() -> None:
    machine = FakeGpu({BEST: 80.0})
    assert tune.compare(TASK, machine, BEST) == (100.0, 80.0)
    assert [config for _, config in machine.measured[:4]] == [RULE, BEST, RULE, BEST]
    assert tune.compare(TASK, machine, RULE) == (100.0, 100.0)


# Storing


def run(machine: FakeGpu, store: Path, tasks: list[Task] = TASKS, **options: Any) -> list[tune.Outcome]:
    return list(tune.tune(tasks, machine, store, unfit=fits, **options))


def test_configurations_that_were_found_are_used_afterwards(store: Path) -> None:
    assert configs.config_for("forward", PROBLEM, "NVIDIA Test 80GB", HOPPER) == (RULE, "rule")
    outcomes = run(FakeGpu({BEST: 80.0}), store)
    assert [outcome.task for outcome in outcomes] == TASKS
    for stage in configs.STAGES:
        assert configs.config_for(stage, PROBLEM, "NVIDIA Test 80GB", HOPPER) == (BEST, "tuned here")


def test_a_rule_that_wins_is_stored_too(store: Path) -> None:
    run(FakeGpu(), store, [TASK])
    assert configs.config_for("forward", PROBLEM, "NVIDIA Test 80GB", HOPPER) == (RULE, "tuned here")


def test_an_interrupted_run_goes_on_where_it_stopped(store: Path) -> None:
    class Interrupted(FakeGpu):
        def measure(self, stage: str, tuning_problem: TuningProblem, config: KernelConfig) -> float:
            if stage == TASKS[2].stage:
                raise KeyboardInterrupt
            return super().measure(stage, tuning_problem, config)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted({BEST: 80.0}), store)
    machine = FakeGpu({BEST: 70.0})
    outcomes = run(machine, store)
    assert [outcome.kept for outcome in outcomes] == [True, True, False, False, False]
    assert [outcome.entry.microseconds for outcome in outcomes] == [80.0, 80.0, 70.0, 70.0, 70.0]
    assert {stage for stage, _ in machine.measured} == {task.stage for task in TASKS[2:]}


def test_force_searches_again_and_leaves_other_problems_stored(store: Path) -> None:
    run(FakeGpu({BEST: 80.0}), store)
    (outcome,) = run(FakeGpu({BEST: 70.0}), store, [TASK], force=True)
    assert (outcome.kept, outcome.entry.microseconds) == (False, 70.0)
    stored = configs.read_store(store, "NVIDIA Test 80GB")
    assert stored is not None
    assert {key[0]: entry.microseconds for key, entry in stored.tuned.items()} == {
        stage: 70.0 if stage == "forward" else 80.0 for stage in configs.STAGES
    }


def test_another_triton_is_searched_with_again(store: Path) -> None:
    run(FakeGpu({BEST: 80.0}, triton="3.8.0"), store, [TASK])
    (outcome,) = run(FakeGpu(), store, [TASK])
    assert not outcome.kept
    assert outcome.entry.triton == "3.9.0"


def test_other_kernels_are_searched_for_again(store: Path) -> None:
    run(FakeGpu({BEST: 80.0}), store)
    store.write_text(store.read_text().replace(configs.kernels_hash(), "0" * 16))
    (outcome,) = run(FakeGpu(), store, [TASK])
    assert not outcome.kept
    assert len(json.loads(store.read_text())["configs"]) == 1, "what no kernel can use is not kept"


@pytest.mark.parametrize("content", ["no JSON", '{"format": 1, "gpu": "another", "configs": []}'])
def test_a_file_of_something_else_is_not_replaced_unless_forced(store: Path, content: str) -> None:
    store.write_text(content)
    with pytest.raises(ValueError, match="--force replaces it") as reported:
        run(FakeGpu(), store, [TASK])
    assert str(store) in str(reported.value)
    assert store.read_text() == content
    run(FakeGpu(), store, [TASK], force=True)
    assert configs.config_for("forward", PROBLEM, "NVIDIA Test 80GB", HOPPER) == (RULE, "tuned here")


# Reports of the compiler


@needs_triton
@pytest.mark.parametrize(
    ("used", "fragment"),
    [
        ({}, None),
        ({"stack": 8}, "spills 8 bytes"),
        ({"shared": 170 * 1024}, None),
        ({"shared": 171 * 1024}, "wants 175104 bytes of shared memory, 174336 are sure"),
        ({"registers": 255, "warps": 16}, "wants 255 registers"),
    ],
)
def test_spills_and_shared_memory_speak_against_a_candidate(
    monkeypatch: pytest.MonkeyPatch, used: dict[str, int], fragment: str | None
) -> None:
    from savl.kernels import compile_ahead_of_time

    asked: list[Any] = []

    def resources(*arguments: Any, **options: Any) -> compile_ahead_of_time.Resources:
        asked.append((*arguments, options))
        return compile_ahead_of_time.Resources(**({"registers": 128, "stack": 0, "shared": 0, "warps": 4} | used))

    monkeypatch.setattr(compile_ahead_of_time, "resources", resources)
    reason = tune.why_unfit(TASK, BEST, HOPPER)
    assert reason is None if fragment is None else fragment in str(reason)
    assert asked == [("forward", PROBLEM, BEST, HOPPER, {"severity": True, "shifted": True, "heads": 6})]


@needs_triton
def test_configurations_that_do_not_compile_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    from savl.kernels import compile_ahead_of_time

    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyError("no such layout")

    monkeypatch.setattr(compile_ahead_of_time, "resources", fail)
    assert tune.why_unfit(TASK, BEST, HOPPER) == "does not compile (KeyError)"


@needs_triton
@pytest.mark.slow
def test_other_processes_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("forward", TuningProblem(Problem("bfloat16", 24, 8, 8), 2, False))
    small = KernelConfig(32, 32, 2, 1)
    monkeypatch.setattr(tune, "candidates", lambda problem: [small])
    with tune.Compilations([task], HOPPER) as unfit:
        assert unfit(task, small) is None
        assert str(unfit(task, replace(small, block_m=48))).startswith("does not compile")
