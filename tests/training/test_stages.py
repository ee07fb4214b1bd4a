"""What a run may begin from, and what it may be besides: frozen, adversarial, fused, compiled, an ablation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import savl
from savl.training import Trainer, TrainingConfig
from savl.training.checkpoint import load_checkpoint
from savl.training.config import GanConfig

Configure = Callable[..., TrainingConfig]
Tensors = Callable[[Path], dict[str, torch.Tensor]]


def test_a_run_starts_from_given_weights_and_keeps_a_frozen_estimator(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    first = Trainer(configuration(tmp_path / "first")).train()
    config = configuration(tmp_path / "second", initial_weights=str(first))
    config = replace(config, objective=replace(config.objective, alpha=0.0, freeze_estimator=True))
    second = Trainer(config).train()
    assert first is not None
    assert second is not None
    before, after = tensors(first), tensors(second)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("estimator.")} <= same
    assert "conv_first.weight" not in same


def test_an_estimator_trained_alone_leaves_the_network_and_goes_on_where_it_was_stopped(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    first = Trainer(configuration(tmp_path / "first")).train()
    assert first is not None

    def alone(name: str) -> TrainingConfig:
        config = configuration(tmp_path / name, initial_weights=str(first))
        data = replace(config.data, batch=4, fresh=2, images_per_recipe=2)
        objective = replace(config.objective, freeze_network=True, calibration=0.3, content=0.2)
        return replace(config, data=data, objective=objective)

    second = Trainer(alone("second")).train()
    assert second is not None
    before, after = tensors(first), tensors(second)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("estimator."), name
    lines = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    assert all("sr" not in line and {"kl", "calibration", "content", "total"} <= set(line) for line in lines)

    half = Trainer(alone("third"))
    half.train(lambda step, _: half.stop() if step == 3 else None)
    third = Trainer(alone("third")).train()
    assert third is not None
    resumed = tensors(third)
    assert all(torch.equal(after[name], resumed[name]) for name in after), "as if it had never stopped"


@pytest.mark.parametrize("part", ["conv_first.", "guidance.", ""])
def test_no_part_of_a_frozen_network_begins_at_random(configuration: Configure, tmp_path: Path, part: str) -> None:
    first = Trainer(configuration(tmp_path / "first", steps=1)).train()
    config = configuration(tmp_path / "second", initial_weights=str(first), reinitialize=[part])
    config = replace(config, objective=replace(config.objective, freeze_network=True))
    with pytest.raises(
        ValueError, match=r"run.reinitialize: \S+ would begin at random and stay so \(objective.freeze_network"
    ):
        Trainer(config)


def test_parts_of_the_weights_to_start_from_may_begin_anew(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    first = Trainer(configuration(tmp_path / "first")).train()
    assert first is not None
    config = configuration(tmp_path / "second", initial_weights=str(first), reinitialize=["estimator."])
    second = Trainer(config).model.state_dict()
    same = {name for name, tensor in tensors(first).items() if torch.equal(tensor, second[name])}
    changed = set(second) - same
    assert all(name.startswith("estimator.") for name in changed)
    assert "estimator.head.weight" in changed
    with pytest.raises(ValueError, match="run.reinitialize: the network has no weight in a part 'encoder'"):
        Trainer(configuration(tmp_path / "second", initial_weights=str(first), reinitialize=["encoder"]))


@pytest.mark.parametrize(
    "change",
    [{}, {"channel_modulation": False}, {"spatial_modulation": False}, {"degradation_code": "deterministic"}],
    ids=str,
)
def test_rivals_begin_with_one_backbone_that_nothing_guides_yet(
    configuration: Configure, tensors: Tensors, tmp_path: Path, change: dict[str, Any]
) -> None:
    first = Trainer(configuration(tmp_path / "first")).train()
    assert first is not None
    start = tensors(first)
    guided = {name for name in start if ".guidance." in name}
    assert all(start[name].any() for name in guided), "guidance has not learned"
    config = configuration(tmp_path / "second", initial_weights=str(first), reinitialize=["estimator.", "guidance."])
    second = Trainer(replace(config, model=replace(config.model, **change))).model.state_dict()
    for name in guided & set(second):
        assert not second[name].any()
    rest = {name for name in start if name not in guided and not name.startswith("estimator.")}
    assert rest <= {name for name in second if name in start and torch.equal(second[name], start[name])}


def test_no_part_of_a_frozen_estimator_begins_at_random(configuration: Configure, tmp_path: Path) -> None:
    first = Trainer(configuration(tmp_path / "first", steps=1)).train()
    config = configuration(tmp_path / "second", initial_weights=str(first), reinitialize=["head."])
    config = replace(config, objective=replace(config.objective, alpha=0.0, freeze_estimator=True))
    with pytest.raises(ValueError, match=r"run.reinitialize: estimator.head.weight would begin at random and stay so"):
        Trainer(config)


def test_what_a_fresh_part_does_not_hold_must_agree(configuration: Configure, tmp_path: Path) -> None:
    first = Trainer(configuration(tmp_path / "first", steps=1)).train()
    config = configuration(tmp_path / "second", initial_weights=str(first), reinitialize=["estimator."])
    for change in ({"channel_modulation": False}, {"latent": 5}):
        with pytest.raises(ValueError, match=f"another network .* {next(iter(change))} is"):
            Trainer(replace(config, model=replace(config.model, **change)))


def test_weights_of_another_network_are_refused_by_what_differs(configuration: Configure, tmp_path: Path) -> None:
    weights = Trainer(configuration(tmp_path / "first", steps=1)).train()
    config = configuration(tmp_path / "second", initial_weights=str(weights))
    with pytest.raises(ValueError, match="run.initial_weights: .* holds another network .* latent is 4 there"):
        Trainer(replace(config, model=replace(config.model, latent=5)))


@pytest.mark.parametrize("loss", ["vanilla", "relativistic"])
def test_a_gan_stage_trains_both_networks_and_resumes_exactly(
    configuration: Configure, tensors: Tensors, tmp_path: Path, loss: str
) -> None:
    torch.set_num_threads(1)

    def config(output: str, steps: int) -> TrainingConfig:
        base = configuration(tmp_path / output, steps=steps)
        return replace(base, gan=GanConfig(weight=0.1, features=4, loss=loss))  # type: ignore[arg-type]

    whole = Trainer(config("whole", 4))
    assert whole.adversary.plain is not None
    before = {name: value.clone() for name, value in whole.adversary.plain.state_dict().items()}
    whole.train()
    after = whole.adversary.plain.state_dict()
    assert not torch.equal(before["enter.weight"], after["enter.weight"]), "the discriminator has not learned"
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert line["total"] > line["sr"] + 0.1 * line["adversarial"] > line["sr"]
    assert line["discriminator"] > 0

    half = Trainer(config("pieces", 4))
    half.train(lambda step, _: half.stop() if step == 2 else None)
    pieces = Trainer(config("pieces", 4))
    assert pieces.step == 2
    pieces.train()
    assert pieces.adversary.plain is not None
    for name, value in pieces.adversary.plain.state_dict().items():
        assert torch.equal(value, after[name]), name
    for name, tensor in tensors(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, tensors(tmp_path / "pieces" / "model.safetensors")[name]), name


def test_fused_kernels_are_a_setting_that_changes_nothing_else(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    eager = Trainer(configuration(tmp_path / "eager", steps=3)).train()
    fused = Trainer(configuration(tmp_path / "fused", steps=3, fused=True)).train()
    assert eager is not None
    assert fused is not None
    for name, tensor in tensors(eager).items():
        torch.testing.assert_close(tensors(fused)[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_compilation_is_a_setting_and_leaves_the_names_of_weights_alone(
    configuration: Configure, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def compile_(function: object) -> object:
        compiled.append(function)
        return torch_compile(function, backend="eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    plain = Trainer(configuration(tmp_path / "plain", steps=2)).train()
    assert not compiled
    weights = Trainer(configuration(tmp_path / "compiled", steps=2, compile=True)).train()
    assert len(compiled) == 1
    assert plain is not None
    assert weights is not None
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(weights)[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_bfloat16_keeps_weights_in_float32_and_resumes_exactly(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    whole = Trainer(configuration(tmp_path / "whole", bfloat16=True)).train()
    half = Trainer(configuration(tmp_path / "pieces", bfloat16=True))
    half.train(lambda step, _: half.stop() if step == 3 else None)
    pieces = Trainer(configuration(tmp_path / "pieces", bfloat16=True)).train()
    assert whole is not None
    assert pieces is not None
    for name, tensor in tensors(whole).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors(pieces)[name]), name


def test_a_discriminator_that_is_not_finite_stops_the_run_before_it_reaches_the_checkpoint(
    configuration: Configure, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", checkpoint_every=1)
    trainer = Trainer(replace(config, gan=GanConfig(weight=0.1, features=2)))
    assert trainer.adversary.plain is not None
    weight = trainer.adversary.plain.enter.weight
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.step == 3 else gradient)
    with pytest.raises(FloatingPointError, match="step 3: the discriminator's gradient is not finite"):
        trainer.train()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 3
    assert all(bool(value.isfinite().all()) for value in state["adversary"]["discriminator"].values())


def test_a_run_resumes_though_what_it_started_from_is_gone(configuration: Configure, tmp_path: Path) -> None:
    first = Trainer(configuration(tmp_path / "first", steps=1)).train()
    assert first is not None
    config = configuration(tmp_path / "second", initial_weights=str(first))
    second = Trainer(config)
    second.train(lambda step, _: second.stop() if step == 2 else None)
    first.unlink()
    assert Trainer(config).step == 2
    with pytest.raises(ValueError, match="run.initial_weights: .*model.safetensors"):
        Trainer(replace(config, run=replace(config.run, output=str(tmp_path / "third"))))


@pytest.mark.parametrize(
    "changes",
    [
        {"degradation_code": "deterministic"},
        {"degradation_code": "none"},
        {"spatial_modulation": False},
        {"channel_modulation": False},
    ],
)
def test_every_ablation_trains(configuration: Configure, tmp_path: Path, changes: dict[str, object]) -> None:
    config = configuration(tmp_path / "run", steps=2)
    weights = Trainer(replace(config, model=replace(config.model, **changes))).train()  # type: ignore[arg-type]
    assert weights is not None
    assert savl.load(weights).config.degradation_code == changes.get("degradation_code", "variational")
