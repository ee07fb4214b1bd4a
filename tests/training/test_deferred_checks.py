"""Deferred checks of steps, as on a GPU: the same results, and nothing that is not finite reaches the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.training import Trainer, TrainingConfig
from savl.training.checkpoint import load_checkpoint
from savl.training.data import Batch
from savl.training.objective_config import GanConfig
from savl.training.trainer import _can_defer_checks

Configure = Callable[..., TrainingConfig]
Make = Callable[..., Trainer]


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    y, x, z = (torch.rand(2, 3, side, side, generator=generator) for side in (8, 32, 8))
    return Batch(y, x, z)


@pytest.fixture
def make(configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make trainers of one run, each into its own folder, with the optimizer of a GPU and deferred checks or not."""
    monkeypatch.setattr("savl.training.trainer._can_defer_checks", lambda *_: True)

    def trainer(name: str, deferred: bool = True, source: Callable[[int], Batch] = batches, **run: object) -> Trainer:
        settings = {"steps": 7, "checkpoint_every": 3, "images_every": 100} | run
        made = Trainer(configuration(tmp_path / name, **settings), source)
        assert made.unwrapped_optimizer.defaults["fused"]
        made.deferred_checks = deferred
        return made

    return trainer


def state(trainer: Trainer) -> dict[str, Any]:
    """A copy of the state of training."""
    parts = {
        "step": trainer.step,
        "weights": trainer.unwrapped_objective.state_dict(),
        "average": trainer.average.state_dict(),
        "optimizer": trainer.unwrapped_optimizer.state_dict()["state"],
    }
    return deepcopy(parts)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def log(trainer: Trainer) -> list[dict[str, float]]:
    lines = map(json.loads, (trainer.output / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


def test_deferred_checks_change_no_result(make: Make) -> None:
    reported: dict[bool, list[tuple[int, dict[str, float]]]] = {True: [], False: []}
    begun: dict[bool, list[int]] = {True: [], False: []}
    trainers = {deferred: make(f"deferred-{deferred}", deferred) for deferred in (True, False)}
    for deferred, trainer in trainers.items():

        def on_step(
            number: int, losses: dict[str, float], deferred: bool = deferred, trainer: Trainer = trainer
        ) -> None:
            reported[deferred].append((number, losses))
            begun[deferred].append(trainer.step)

        assert trainer.train(on_step) is not None
    assert begun[False] == [1, 2, 3, 4, 5, 6, 7]
    assert begun[True] == [2, 3, 3, 5, 6, 6, 7], (
        "a step is reported after the next one, except at checkpoints and the end"
    )
    assert [number for number, _ in reported[True]] == [1, 2, 3, 4, 5, 6, 7]
    assert reported[True] == reported[False]
    assert log(trainers[True]) == log(trainers[False])
    assert same(state(trainers[True]), state(trainers[False]))
    saved = [load_checkpoint(trainer.output / "checkpoint.pt") for trainer in trainers.values()]
    for checkpoint in saved:
        del checkpoint["time"]
    assert same(*saved)


@pytest.mark.parametrize(
    ("step", "what"),
    [(0, "loss"), (3, "gradient"), (5, "loss"), (6, "gradient")],  # 5 and 6 are checked before a checkpoint
)
def test_a_step_that_is_not_finite_stops_the_run_and_changes_nothing(make: Make, step: int, what: str) -> None:
    before = make("before", deferred=False)
    if step:
        before.train(lambda done, _: before.stop() if done == step else None)
    poisoned = [step]

    def source(number: int) -> Batch:
        batch = batches(number)
        if what == "loss" and number in poisoned:
            batch.x[0, 0, 0, 0] = float("nan")
        return batch

    trainer = make("run", source=source)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if what == "gradient" and trainer.step in poisoned else gradient

    trainer.model.conv_first.weight.register_hook(spoil)
    reported: list[int] = []
    with pytest.raises(FloatingPointError, match=f"step {step}: the {what} is not finite, at losses of"):
        trainer.train(lambda done, _: reported.append(done))
    assert reported == list(range(1, step + 1))
    assert (
        [line["step"] for line in log(trainer)] == reported if reported else not (trainer.output / "log.jsonl").exists()
    )
    left, wanted = state(trainer), state(before)
    if step == 0:  # the optimizer has made its moments by now
        assert not any(moment.any() for moments in left.pop("optimizer").values() for moment in moments.values())
        del wanted["optimizer"]
    assert same(left, wanted)
    checkpoint = trainer.output / "checkpoint.pt"
    if step >= 3:
        assert load_checkpoint(checkpoint)["step"] == step // 3 * 3
    else:
        assert not checkpoint.exists()

    saved = load_checkpoint(trainer.output / "not_finite.pt")
    assert saved["step"] == step
    assert saved["seed"] == step  # of a run of seed 0
    assert torch.equal(saved["y"], batches(step).y)
    assert bool(saved["x"].isnan().any()) == (what == "loss")
    assert bool(torch.tensor(saved["losses"]["total"]).isnan()) == (what == "loss")
    assert same(saved["weights"], before.unwrapped_objective.state_dict())

    # With another batch in its place, the same trainer continues like an uninterrupted one.
    poisoned.clear()
    trainer.train()
    whole = make("whole", deferred=False)
    whole.train()
    assert same(state(trainer), state(whole))


def test_a_stop_during_a_step_that_is_not_finite_raises_the_error(make: Make) -> None:
    trainer = make("run", checkpoint_every=100)

    def spoil(gradient: Tensor) -> Tensor:
        if trainer.step != 3:
            return gradient
        trainer.stop()
        return gradient * float("nan")

    trainer.model.conv_first.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="step 3: the gradient is not finite"):
        trainer.train()
    assert not (trainer.output / "checkpoint.pt").exists()


def test_a_stop_checks_the_last_step_first(make: Make) -> None:
    trainer = make("run", checkpoint_every=100)
    reported: list[int] = []

    def on_step(done: int, _: dict[str, float]) -> None:
        reported.append(done)
        if done == 3:
            trainer.stop()

    assert trainer.train(on_step) is None
    assert reported == [1, 2, 3, 4], "the fourth was running"
    assert [line["step"] for line in log(trainer)] == reported
    kept = load_checkpoint(trainer.output / "checkpoint.pt")
    assert kept["step"] == kept["average"]["n_averaged"] == 4


@pytest.mark.parametrize("finite", [True, False])
def test_a_batch_that_cannot_be_made_leaves_no_step_unchecked(make: Make, finite: bool) -> None:
    def source(step: int) -> Batch:
        if step == 4:
            raise MemoryError("no more")
        batch = batches(step)
        if step == 3 and not finite:
            batch.x.fill_(float("inf"))
        return batch

    trainer = make("run", source=source, checkpoint_every=100)
    with pytest.raises(
        MemoryError if finite else FloatingPointError, match="no more" if finite else "step 3: the loss"
    ):
        trainer.train()
    assert [line["step"] for line in log(trainer)] == [1, 2, 3, 4][: 4 if finite else 3]
    if finite:
        assert load_checkpoint(trainer.output / "checkpoint.pt")["average"]["n_averaged"] == 4
    else:
        assert not (trainer.output / "checkpoint.pt").exists()


def test_a_checkpoint_on_request_contains_checked_steps_only(make: Make) -> None:
    trainer = make("run", checkpoint_every=100)
    kept: list[dict[str, Any]] = []

    def on_step(done: int, _: dict[str, float]) -> None:
        if done == 2:
            trainer.checkpoint()
            kept.append(load_checkpoint(trainer.output / "checkpoint.pt"))

    trainer.train(on_step)
    assert kept[0]["step"] == kept[0]["average"]["n_averaged"] == 3
    assert [line["step"] for line in log(trainer)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_with_deferred_checks_resumes_exactly(make: Make) -> None:
    whole, pieces = make("whole"), make("pieces")
    whole.train()
    pieces.train(lambda done, _: pieces.stop() if done == 4 else None)
    rest = make("pieces")
    assert rest.step == 5
    rest.train()
    assert same(state(rest), state(whole))


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_resumes_with_the_other_implementation_of_adam(
    configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """A run may move from a GPU to a CPU and back."""

    def trainer(steps: int, fused: bool) -> Trainer:
        monkeypatch.setattr("savl.training.trainer._can_defer_checks", lambda *_: fused)
        return Trainer(configuration(tmp_path / "run", steps=steps), batches)

    first = trainer(3, not fused)
    first.train()
    second = trainer(6, fused)
    assert [group["fused"] for group in second.unwrapped_optimizer.param_groups] == [True if fused else None]
    assert same(state(second)["optimizer"], state(first)["optimizer"])
    second.train()
    assert second.step == 6


def test_checks_are_deferred_on_one_gpu_without_a_gan() -> None:
    def deferred(device: str, processes: int, weight: float = 0.0) -> bool:
        accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
        return _can_defer_checks(TrainingConfig(gan=GanConfig(weight=weight)), accelerator)

    assert deferred("cuda", 1)
    assert not deferred("cpu", 1)
    assert not deferred("cuda", 2)
    assert not deferred("cuda", 1, 0.1)
