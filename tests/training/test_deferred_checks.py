"""Steps that are looked at late, as on a GPU: the same numbers, and nothing that is not finite reaches the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from savl.training import Trainer, TrainingConfig
from savl.training.checkpoint import load_checkpoint
from savl.training.config import GanConfig
from savl.training.data import Batch
from savl.training.optimizer import AveragedWeights
from savl.training.trainer import _can_defer_checks

Configure = Callable[..., TrainingConfig]
Make = Callable[..., Trainer]


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    y, x, z = (torch.rand(2, 3, side, side, generator=generator) for side in (8, 32, 8))
    return Batch(y, x, z)


@pytest.fixture
def make(configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Trainers of one run, with the optimizer of a GPU, each into a folder of its name; ``late`` or at once."""
    monkeypatch.setattr("savl.training.trainer._can_defer_checks", lambda *_: True)

    def trainer(name: str, late: bool = True, source: Callable[[int], Batch] = batches, **run: object) -> Trainer:
        settings = {"steps": 7, "checkpoint_every": 3, "images_every": 100} | run
        made = Trainer(configuration(tmp_path / name, **settings), source)
        assert made.bare_optimizer.defaults["fused"]
        made.deferred_checks = late
        return made

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network only waits for more
    yield trainer
    torch.set_num_threads(threads)


def state(trainer: Trainer) -> dict[str, Any]:
    """Everything that learns, apart from what goes on."""
    parts = {
        "step": trainer.step,
        "weights": trainer.plain.state_dict(),
        "average": trainer.average.state_dict(),
        "optimizer": trainer.bare_optimizer.state_dict()["state"],
    }
    return deepcopy(parts)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def log(trainer: Trainer) -> list[dict[str, float]]:
    lines = map(json.loads, (trainer.output / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


def test_looking_late_changes_no_number(make: Make) -> None:
    told: dict[bool, list[tuple[int, dict[str, float]]]] = {True: [], False: []}
    seen: dict[bool, list[int]] = {True: [], False: []}
    trainers = {late: make(f"late-{late}", late) for late in (True, False)}
    for late, trainer in trainers.items():

        def on_step(done: int, losses: dict[str, float], late: bool = late, trainer: Trainer = trainer) -> None:
            told[late].append((done, losses))
            seen[late].append(trainer.step)

        assert trainer.train(on_step) is not None
    assert seen[False] == [1, 2, 3, 4, 5, 6, 7]
    assert seen[True] == [2, 3, 3, 5, 6, 6, 7], "a step is told of after the next one, but for checkpoints and the end"
    assert [done for done, _ in told[True]] == [1, 2, 3, 4, 5, 6, 7]
    assert told[True] == told[False]
    assert log(trainers[True]) == log(trainers[False])
    assert same(state(trainers[True]), state(trainers[False]))
    kept = [load_checkpoint(trainer.output / "checkpoint.pt") for trainer in trainers.values()]
    for checkpoint in kept:
        del checkpoint["time"]
    assert same(*kept)


@pytest.mark.parametrize(
    ("step", "what"),
    [(0, "loss"), (3, "gradient"), (5, "loss"), (6, "gradient")],  # (5 and 6 are looked at before a checkpoint)
)
def test_what_is_not_finite_stops_the_run_as_if_the_step_had_never_been(make: Make, step: int, what: str) -> None:
    before = make("before", late=False)
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
    told: list[int] = []
    with pytest.raises(FloatingPointError, match=f"step {step}: the {what} is not finite, at losses of"):
        trainer.train(lambda done, _: told.append(done))
    assert told == list(range(1, step + 1))
    assert [line["step"] for line in log(trainer)] == told if told else not (trainer.output / "log.jsonl").exists()
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
    assert same(saved["weights"], before.plain.state_dict())

    # With another batch in its place, the same trainer goes on as if nothing had happened.
    poisoned.clear()
    trainer.train()
    whole = make("whole", late=False)
    whole.train()
    assert same(state(trainer), state(whole))


def test_a_stop_after_what_is_not_finite_still_says_so(make: Make) -> None:
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


def test_a_stop_looks_at_the_last_step_first(make: Make) -> None:
    trainer = make("run", checkpoint_every=100)
    told: list[int] = []

    def on_step(done: int, _: dict[str, float]) -> None:
        told.append(done)
        if done == 3:
            trainer.stop()

    assert trainer.train(on_step) is None
    assert told == [1, 2, 3, 4], "the fourth was under way"
    assert [line["step"] for line in log(trainer)] == told
    kept = load_checkpoint(trainer.output / "checkpoint.pt")
    assert kept["step"] == kept["average"]["n_averaged"] == 4


@pytest.mark.parametrize("finite", [True, False])
def test_a_batch_that_cannot_be_made_leaves_no_step_unseen(make: Make, finite: bool) -> None:
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


def test_a_checkpoint_by_hand_holds_no_step_unseen(make: Make) -> None:
    trainer = make("run", checkpoint_every=100)
    kept: list[dict[str, Any]] = []

    def on_step(done: int, _: dict[str, float]) -> None:
        if done == 2:
            trainer.checkpoint()
            kept.append(load_checkpoint(trainer.output / "checkpoint.pt"))

    trainer.train(on_step)
    assert kept[0]["step"] == kept[0]["average"]["n_averaged"] == 3
    assert [line["step"] for line in log(trainer)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_late_run_resumes_exactly(make: Make) -> None:
    whole, pieces = make("whole"), make("pieces")
    whole.train()
    pieces.train(lambda done, _: pieces.stop() if done == 4 else None)
    rest = make("pieces")
    assert rest.step == 5
    rest.train()
    assert same(state(rest), state(whole))


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_goes_on_where_another_optimizer_of_torch_serves(
    configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """A run may move from a GPU to a CPU and back."""

    def trainer(steps: int, fused: bool) -> Trainer:
        monkeypatch.setattr("savl.training.trainer._can_defer_checks", lambda *_: fused)
        return Trainer(configuration(tmp_path / "run", steps=steps), batches)

    first = trainer(3, not fused)
    first.train()
    second = trainer(6, fused)
    assert [group["fused"] for group in second.bare_optimizer.param_groups] == [True if fused else None]
    assert same(state(second)["optimizer"], state(first)["optimizer"])
    second.train()
    assert second.step == 6


def test_steps_are_looked_at_late_on_one_gpu_without_a_gan() -> None:
    def late(device: str, processes: int, weight: float = 0.0) -> bool:
        accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
        return _can_defer_checks(TrainingConfig(gan=GanConfig(weight=weight)), accelerator)

    assert late("cuda", 1)
    assert not late("cpu", 1)
    assert not late("cuda", 2)
    assert not late("cuda", 1, 0.1)


def test_averaged_weights_are_those_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    torchs, ours = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), AveragedWeights(model, 0.9)
    for step in range(5):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(torch.rand(tensor.shape) * 10)
        torchs.update_parameters(model)
        ours.update_parameters(model)
        assert same(dict(ours.state_dict()), dict(torchs.state_dict())), step
    assert all(weight.requires_grad for weight in ours.parameters())
