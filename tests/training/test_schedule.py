"""Learning rate schedule, and runs with a time limit by a clock that the tests set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import pytest

from savl.training import Trainer, TrainingConfig
from savl.training.checkpoint import load_checkpoint, save_checkpoint
from savl.training.objective_config import OptimizerConfig
from savl.training.schedule import TrainingTime, learning_rate_factor

Configure = Callable[..., TrainingConfig]


def clock(*seconds: float) -> Callable[[], float]:
    """Make a clock that advances by the next of the given seconds at each call, and by the last of them afterwards."""
    passing: Iterator[float] = chain(seconds, repeat(seconds[-1]))
    now = 1000.0

    def look() -> float:
        nonlocal now
        now += next(passing)
        return now

    return look


def train(config: TrainingConfig, *seconds: float, until: int = 10**9) -> Trainer:
    """Train with steps that take the given seconds, and stop after step ``until``."""
    trainer = Trainer(config)
    trainer.time.now = clock(*seconds)
    weights = trainer.train(lambda done, _: trainer.stop() if done == until else None)
    assert (weights is None) == (trainer.step == until)
    return trainer


def log(trainer: Trainer, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (trainer.output / "log.jsonl").read_text().splitlines()]


def test_a_run_ends_at_its_time_limit_with_the_final_learning_rate(configuration: Configure, tmp_path: Path) -> None:
    # The first step, of 500 seconds, is not counted: kernels are compiled in it.
    timed = train(configuration(tmp_path / "timed", steps=1000, minutes=1.0), 500, 10)
    assert timed.step == 7
    assert (timed.time.seconds, timed.time.steps) == (60, 6)
    assert load_checkpoint(timed.output / "checkpoint.pt")["step"] == 7
    by_steps = Trainer(configuration(tmp_path / "steps", steps=7))
    by_steps.train()
    assert log(timed, "step") == log(by_steps, "step")
    assert log(timed, "lr") == pytest.approx(log(by_steps, "lr"))
    assert timed.expected_steps == 7


def test_the_learning_rate_follows_the_time_per_step(configuration: Configure, tmp_path: Path) -> None:
    slower = train(configuration(tmp_path / "slower", steps=1000, minutes=1.0), *[4] * 6, 10)
    faster = train(configuration(tmp_path / "faster", steps=1000, minutes=1.0), *[10] * 4, 4)
    assert slower.step == 10
    assert faster.step == 12
    for trainer in (slower, faster):
        rates = log(trainer, "lr")
        assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True), "warm-up, then decay alone"
        assert rates[2] == trainer.config.optimizer.learning_rate
        assert rates[-1] < 0.2 * rates[2]


def test_steps_may_end_a_run_before_its_time_limit(configuration: Configure, finished: Path, tmp_path: Path) -> None:
    timed = train(configuration(tmp_path / "timed", minutes=1000.0), 10)
    assert timed.step == 6
    assert log(timed, "lr") == [json.loads(line)["lr"] for line in (finished / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_remaining_time(configuration: Configure, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", steps=1000, minutes=1.0)
    assert train(config, 10, until=4).time.seconds == 30
    resumed = Trainer(config)
    assert (resumed.time.seconds, resumed.time.steps) == (30, 3)
    assert resumed.expected_steps == 7
    resumed = train(config, 10_000, 10)
    assert resumed.step == 8, "one step of either part is not counted"
    done = Trainer(config)
    assert done.train() is not None
    assert done.step == 8
    longer = train(replace(config, run=replace(config.run, minutes=1.5)), 10)
    assert longer.step == 12
    assert log(longer, "step") == list(range(1, 13))


def test_a_time_limit_may_be_set_on_resuming(configuration: Configure, tmp_path: Path) -> None:
    first = Trainer(configuration(tmp_path / "run"))
    first.time.now = clock(10)
    first.train()
    assert load_checkpoint(first.output / "checkpoint.pt")["time"] == {"seconds": 50, "steps": 5}
    assert train(configuration(tmp_path / "run", steps=1000, minutes=2), 10).step == 14


def test_a_checkpoint_without_time_begins_at_zero(configuration: Configure, finished: Path) -> None:
    path = finished / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["time"], state["settings"]["run.seed"]
    save_checkpoint(path, state)
    assert train(configuration(finished, steps=1000, minutes=1.0), 10).step == 13


def test_the_last_step_is_validated_logged_and_saved(
    configuration: Configure, photographs: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", steps=1000, minutes=1.0, log_every=100, checkpoint_every=100)
    validation = replace(config.validation, hr=str(photographs), side=64, images=1)
    trainer = train(replace(config, validation=validation), 10)
    lines = [json.loads(line) for line in (trainer.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 7]
    assert "lr" in lines[0]
    assert "psnr_y" in lines[1]
    assert load_checkpoint(trainer.output / "checkpoint.pt")["step"] == 7


def test_processes_count_the_mean_of_their_times() -> None:
    measured: list[float] = []

    def mean(seconds: float) -> float:
        measured.append(seconds)
        return 20.0

    time = TrainingTime(1.0, mean)
    time.now = clock(10)
    time.begin()
    for _ in range(4):
        assert not time.limit_reached
        time.step_done()
    assert measured == [10, 10, 10]
    assert time.limit_reached
    unlimited = TrainingTime(0.0, mean)
    unlimited.now = clock(10)
    for _ in range(3):
        unlimited.step_done()
    assert unlimited.seconds == 20
    assert unlimited.limit == math.inf
    assert len(measured) == 3, "without a limit processes need not wait for each other"


def test_the_expected_length_follows_from_the_mean_time_per_step() -> None:
    time = TrainingTime(1.0)
    assert time.expected_steps(0, 100) == 100, "nothing is known yet"
    time.load_state_dict({"seconds": 20.0, "steps": 4})
    assert time.expected_steps(5, 100) == 13
    assert time.expected_steps(5, 10) == 10
    time.load_state_dict({"seconds": 61.0, "steps": 4})
    assert time.expected_steps(5, 100) == 5


def test_learning_rates_follow_their_schedule() -> None:
    cosine = OptimizerConfig(warmup=10, final_fraction=0.1)
    shares = [learning_rate_factor(cosine, step, 110) for step in (0, 9, 10, 60, 110)]
    assert shares == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])
    steps = OptimizerConfig(warmup=0, schedule="multistep", milestones=(5, 8), gamma=0.5)
    assert [learning_rate_factor(steps, step, 10) for step in (0, 4, 5, 7, 8)] == [1.0, 1.0, 0.5, 0.5, 0.25]
