"""Runs that end after some minutes, by a clock that the tests set."""

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
from savl.training.schedule import TrainingTime

Configure = Callable[..., TrainingConfig]


def clock(*seconds: float) -> Callable[[], float]:
    """Advances by so many seconds from one look at it to the next, and by the last of them from then on."""
    passing: Iterator[float] = chain(seconds, repeat(seconds[-1]))
    now = 1000.0

    def look() -> float:
        nonlocal now
        now += next(passing)
        return now

    return look


def train(config: TrainingConfig, *seconds: float, until: int = 10**9) -> Trainer:
    """Run it, steps taking so many seconds, or stop it after a step."""
    trainer = Trainer(config)
    trainer.time.now = clock(*seconds)
    weights = trainer.train(lambda done, _: trainer.stop() if done == until else None)
    assert (weights is None) == (trainer.step == until)
    return trainer


def log(trainer: Trainer, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (trainer.output / "log.jsonl").read_text().splitlines()]


def test_a_run_ends_with_its_minutes_and_its_rate_has_fallen_by_then(configuration: Configure, tmp_path: Path) -> None:
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


def test_the_rate_follows_the_time_that_steps_take(configuration: Configure, tmp_path: Path) -> None:
    slower = train(configuration(tmp_path / "slower", steps=1000, minutes=1.0), *[4] * 6, 10)
    faster = train(configuration(tmp_path / "faster", steps=1000, minutes=1.0), *[10] * 4, 4)
    assert slower.step == 10
    assert faster.step == 12
    for trainer in (slower, faster):
        rates = log(trainer, "lr")
        assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True), "warm-up, then decay alone"
        assert rates[2] == trainer.config.optimizer.learning_rate
        assert rates[-1] < 0.2 * rates[2]


def test_steps_may_end_the_run_before_its_minutes(configuration: Configure, tmp_path: Path) -> None:
    timed = train(configuration(tmp_path / "timed", minutes=1000.0), 10)
    by_steps = Trainer(configuration(tmp_path / "steps"))
    by_steps.train()
    assert timed.step == 6
    assert log(timed, "lr") == log(by_steps, "lr")


def test_a_resumed_run_has_the_rest_of_its_time(configuration: Configure, tmp_path: Path) -> None:
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


def test_minutes_may_be_asked_for_on_resuming(configuration: Configure, tmp_path: Path) -> None:
    first = Trainer(configuration(tmp_path / "run"))
    first.time.now = clock(10)
    first.train()
    assert load_checkpoint(first.output / "checkpoint.pt")["time"] == {"seconds": 50, "steps": 5}
    assert train(configuration(tmp_path / "run", steps=1000, minutes=2), 10).step == 14


def test_a_checkpoint_that_knows_no_time_begins_at_zero(configuration: Configure, tmp_path: Path) -> None:
    Trainer(configuration(tmp_path / "run")).train()
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["time"], state["settings"]["run.seed"]
    save_checkpoint(path, state)
    assert train(configuration(tmp_path / "run", steps=1000, minutes=1.0), 10).step == 13


def test_the_end_is_validated_logged_and_kept(configuration: Configure, photographs: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", steps=1000, minutes=1.0, log_every=100, checkpoint_every=100)
    validation = replace(config.validation, hr=str(photographs), side=64, images=1)
    trainer = train(replace(config, validation=validation), 10)
    lines = [json.loads(line) for line in (trainer.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 7]
    assert "lr" in lines[0]
    assert "psnr_y" in lines[1]
    assert load_checkpoint(trainer.output / "checkpoint.pt")["step"] == 7


def test_several_processes_count_one_time() -> None:
    asked: list[float] = []

    def agree(seconds: float) -> float:
        asked.append(seconds)
        return 20.0

    time = TrainingTime(1.0, agree)
    time.now = clock(10)
    time.begin()
    for _ in range(4):
        assert not time.over
        time.step_done()
    assert asked == [10, 10, 10]
    assert time.over
    unlimited = TrainingTime(0.0, agree)
    unlimited.now = clock(10)
    for _ in range(3):
        unlimited.step_done()
    assert unlimited.seconds == 20
    assert unlimited.limit == math.inf
    assert len(asked) == 3, "where nothing depends on it, processes need not wait for each other"


def test_the_steps_to_come_are_expected_to_take_as_long_as_those_before() -> None:
    time = TrainingTime(1.0)
    assert time.expected_steps(0, 100) == 100, "nothing is known yet"
    time.load_state_dict({"seconds": 20.0, "steps": 4})
    assert time.expected_steps(5, 100) == 13
    assert time.expected_steps(5, 10) == 10
    time.load_state_dict({"seconds": 61.0, "steps": 4})
    assert time.expected_steps(5, 100) == 5
