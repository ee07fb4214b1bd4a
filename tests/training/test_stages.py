"""Initial weights, frozen parts, the GAN stage, fused and compiled networks, and ablations."""

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
from savl.training.objective_config import AdversarialLoss, Discriminator, GanConfig

Configure = Callable[..., TrainingConfig]
Tensors = Callable[[Path], dict[str, torch.Tensor]]


@pytest.fixture
def weights(finished: Path) -> Path:
    """Weights of a run of six steps."""
    return finished / "model.safetensors"


def test_a_run_begins_with_initial_weights_and_keeps_a_frozen_estimator(
    configuration: Configure, tensors: Tensors, weights: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", steps=3, initial_weights=str(weights))
    config = replace(config, objective=replace(config.objective, alpha=0.0, freeze_estimator=True))
    exported = Trainer(config).train()
    assert exported is not None
    before, after = tensors(weights), tensors(exported)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("estimator.")} <= same
    assert "conv_first.weight" not in same


def test_an_estimator_trained_alone_leaves_the_network_unchanged_and_resumes_exactly(
    configuration: Configure, tensors: Tensors, weights: Path, tmp_path: Path
) -> None:
    def alone(name: str) -> TrainingConfig:
        config = configuration(tmp_path / name, steps=4, initial_weights=str(weights))
        data = replace(config.data, batch=4, fresh=2, images_per_recipe=2)
        objective = replace(config.objective, freeze_network=True, calibration=0.3, content=0.2)
        return replace(config, data=data, objective=objective)

    whole = Trainer(alone("whole")).train()
    assert whole is not None
    before, after = tensors(weights), tensors(whole)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("estimator."), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all("sr" not in line and {"kl", "calibration", "content", "total"} <= set(line) for line in lines)

    half = Trainer(alone("pieces"))
    half.train(lambda step, _: half.stop() if step == 2 else None)
    pieces = Trainer(alone("pieces")).train()
    assert pieces is not None
    resumed = tensors(pieces)
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.parametrize("part", ["conv_first.", "guidance.", ""])
def test_no_part_of_a_frozen_network_may_be_reinitialized(
    configuration: Configure, weights: Path, tmp_path: Path, part: str
) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=[part])
    config = replace(config, objective=replace(config.objective, freeze_network=True))
    with pytest.raises(
        ValueError,
        match=r"run.reinitialize = .*: \S+ would begin at random and stay so, because objective.freeze_network",
    ):
        Trainer(config)


def test_parts_of_the_initial_weights_may_be_reinitialized(
    configuration: Configure, tensors: Tensors, weights: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=["estimator."])
    initial = Trainer(config).model.state_dict()
    same = {name for name, tensor in tensors(weights).items() if torch.equal(tensor, initial[name])}
    changed = set(initial) - same
    assert all(name.startswith("estimator.") for name in changed)
    assert "estimator.head.weight" in changed
    with pytest.raises(ValueError, match="run.reinitialize: the network has no weight in a part 'encoder'"):
        Trainer(configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=["encoder"]))


def test_a_run_with_a_strength_begins_with_weights_without_one(
    configuration: Configure, tensors: Tensors, weights: Path, tmp_path: Path
) -> None:
    def learning(parts: list[str]) -> TrainingConfig:
        config = configuration(tmp_path / "run", steps=3, initial_weights=str(weights), reinitialize=parts)
        objective = replace(config.objective, alpha=0.0, freeze_estimator=True)
        return replace(config, model=replace(config.model, restoration_strength=True), objective=objective)

    with pytest.raises(ValueError, match="another network .*: restoration_strength is False there"):
        Trainer(learning([]))
    trainer = Trainer(learning(["strength."]))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    given = tensors(weights)
    assert {name for name in before if name not in given} == {
        f"strength.{layer}.{kind}" for layer in ("expand", "contract") for kind in ("weight", "bias")
    }
    assert all(torch.equal(given[name], before[name]) for name in given)
    exported = trainer.train()
    assert exported is not None
    assert not torch.equal(tensors(exported)["strength.contract.bias"], before["strength.contract.bias"])
    assert savl.load(exported).config.restoration_strength
    again = configuration(tmp_path / "again", initial_weights=str(exported), reinitialize=["strength."])
    assert "strength.contract.bias" not in Trainer(again).model.state_dict()


def test_only_the_named_parts_are_trained(
    configuration: Configure, tensors: Tensors, weights: Path, tmp_path: Path
) -> None:
    def calibrating(part: str, **run: Any) -> TrainingConfig:
        config = configuration(tmp_path / "run", steps=3, initial_weights=str(weights), **run)
        objective = replace(config.objective, alpha=0.0, train_only=(part,))
        return replace(config, model=replace(config.model, restoration_strength=bool(run)), objective=objective)

    with pytest.raises(ValueError, match="objective.train_only: the network has no weight in strengths"):
        Trainer(calibrating("strengths"))
    trainer = Trainer(calibrating("strength.", reinitialize=["strength."]))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    exported = trainer.train()
    assert exported is not None
    changed = {name for name, tensor in tensors(exported).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("strength.") for name in changed)


@pytest.mark.parametrize(
    ("reinitialize", "train_only", "random"),
    [
        (["strength.", "estimator."], ["strength."], "estimator.body.0.weight"),
        (["strength."], ["guidance."], "strength.expand.weight"),
        (["strength."], ["strength.contract."], "strength.expand.weight"),
    ],
)
def test_no_part_that_is_not_trained_may_be_reinitialized(
    configuration: Configure, weights: Path, tmp_path: Path, reinitialize: list[str], train_only: list[str], random: str
) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=reinitialize)
    objective = replace(config.objective, alpha=0.0, train_only=tuple(train_only))
    config = replace(config, model=replace(config.model, restoration_strength=True), objective=objective)
    with pytest.raises(ValueError, match="reinitialize only parts that are trained") as caught:
        Trainer(config)
    named = f"run.reinitialize = {reinitialize}: {random} would begin at random", f"objective.train_only = {train_only}"
    assert all(words in str(caught.value) for words in named)


@pytest.mark.parametrize(
    "change",
    [{}, {"channel_modulation": False}, {"spatial_modulation": False}, {"degradation_code": "deterministic"}],
    ids=str,
)
def test_baselines_begin_with_one_backbone_and_guidance_of_zero(
    configuration: Configure, tensors: Tensors, weights: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    trained = tensors(weights)
    guidance = {name for name in trained if ".guidance." in name}
    assert all(trained[name].any() for name in guidance), "guidance has not been trained"
    parts = ["estimator.", "guidance."]
    config = configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=parts)
    initial = Trainer(replace(config, model=replace(config.model, **change))).model.state_dict()
    for name in guidance & set(initial):
        assert not initial[name].any()
    backbone = {name for name in trained if name not in guidance and not name.startswith("estimator.")}
    assert backbone <= {name for name in initial if name in trained and torch.equal(initial[name], trained[name])}


def test_no_part_of_a_frozen_estimator_may_be_reinitialized(
    configuration: Configure, weights: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=["head."])
    config = replace(config, objective=replace(config.objective, alpha=0.0, freeze_estimator=True))
    with pytest.raises(ValueError, match=r"estimator.head.weight would begin at random .* objective.freeze_estimator"):
        Trainer(config)


def test_settings_of_parts_that_are_not_reinitialized_must_agree(
    configuration: Configure, weights: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights), reinitialize=["estimator."])
    for change in ({"channel_modulation": False}, {"latent": 5}):
        with pytest.raises(ValueError, match=f"another network .* {next(iter(change))} is"):
            Trainer(replace(config, model=replace(config.model, **change)))


def test_weights_of_another_network_are_refused_with_the_settings_that_differ(
    configuration: Configure, weights: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights))
    with pytest.raises(ValueError, match="run.initial_weights: .* holds another network .* latent is 4 there"):
        Trainer(replace(config, model=replace(config.model, latent=5)))


@pytest.mark.parametrize(("loss", "discriminator"), [("vanilla", "unet"), ("relativistic", "patch")])
def test_a_gan_stage_trains_both_networks_and_resumes_exactly(
    configuration: Configure, tensors: Tensors, tmp_path: Path, loss: AdversarialLoss, discriminator: Discriminator
) -> None:

    def config(output: str, steps: int) -> TrainingConfig:
        base = configuration(tmp_path / output, steps=steps)
        return replace(base, gan=GanConfig(weight=0.1, features=4, loss=loss, discriminator=discriminator))

    whole = Trainer(config("whole", 2))
    assert whole.adversary.unwrapped is not None
    before = {name: value.clone() for name, value in whole.adversary.unwrapped.state_dict().items()}
    whole.train()
    after = whole.adversary.unwrapped.state_dict()
    assert not torch.equal(before["enter.weight"], after["enter.weight"]), "the discriminator has not learned"
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert line["total"] > line["sr"] + 0.1 * line["adversarial"] > line["sr"]
    assert line["discriminator"] > 0

    half = Trainer(config("pieces", 2))
    half.train(lambda step, _: half.stop() if step == 1 else None)
    pieces = Trainer(config("pieces", 2))
    assert pieces.step == 1
    pieces.train()
    assert pieces.adversary.unwrapped is not None
    for name, value in pieces.adversary.unwrapped.state_dict().items():
        assert torch.equal(value, after[name]), name
    for name, tensor in tensors(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, tensors(tmp_path / "pieces" / "model.safetensors")[name]), name


def test_the_adversarial_loss_acts_from_its_start_on_a_discriminator_that_is_trained_before(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    def train(name: str, **gan: Any) -> dict[str, torch.Tensor]:
        config = configuration(tmp_path / name, steps=2)
        exported = Trainer(replace(config, gan=GanConfig(features=4, discriminator="patch", **gan))).train()
        assert exported is not None
        return tensors(exported)

    without, late = train("without"), train("late", weight=0.1, start=2)
    assert all(torch.equal(without[name], late[name]) for name in without)
    lines = [json.loads(line) for line in (tmp_path / "late" / "log.jsonl").read_text().splitlines()]
    assert all("adversarial" not in line and line["discriminator"] > 0 for line in lines)
    state = load_checkpoint(tmp_path / "late" / "checkpoint.pt")["adversary"]["optimizer"]
    assert int(state["state"][0]["step"]) == 2
    train("at_1", weight=0.1, start=1)
    lines = [json.loads(line) for line in (tmp_path / "at_1" / "log.jsonl").read_text().splitlines()]
    assert ["adversarial" in line for line in lines] == [False, True]


def test_the_gradient_of_the_discriminator_is_clipped_as_that_of_the_network(
    configuration: Configure, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "run")
    optimizer = replace(config.optimizer, clip=1e-3)
    trainer = Trainer(replace(config, optimizer=optimizer, gan=GanConfig(weight=0.1, features=4)))
    adversary = trainer.adversary
    assert adversary.unwrapped is not None
    losses = adversary.discriminator_losses(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
    assert adversary.backward(losses["discriminator"])
    norm = torch.stack([p.grad.norm() for p in adversary.unwrapped.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_fused_kernels_are_a_setting_that_changes_nothing_else(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    eager = Trainer(configuration(tmp_path / "eager", steps=2)).train()
    fused = Trainer(configuration(tmp_path / "fused", steps=2, fused=True)).train()
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

    def train(name: str, compile: bool) -> dict[str, torch.Tensor]:
        config = configuration(tmp_path / name, steps=1, compile=compile)
        exported = Trainer(replace(config, model=replace(config.model, depths=(1,)))).train()
        assert exported is not None
        return tensors(exported)

    plain = train("plain", compile=False)
    assert not compiled
    weights = train("compiled", compile=True)
    assert len(compiled) == 1
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_bfloat16_keeps_weights_in_float32_and_resumes_exactly(
    configuration: Configure, tensors: Tensors, tmp_path: Path
) -> None:
    whole = Trainer(configuration(tmp_path / "whole", steps=2, bfloat16=True)).train()
    half = Trainer(configuration(tmp_path / "pieces", steps=2, bfloat16=True))
    half.train(lambda step, _: half.stop() if step == 1 else None)
    pieces = Trainer(configuration(tmp_path / "pieces", steps=2, bfloat16=True)).train()
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
    assert trainer.adversary.unwrapped is not None
    weight = trainer.adversary.unwrapped.enter.weight
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.step == 1 else gradient)
    with pytest.raises(FloatingPointError, match="step 1: the discriminator's gradient is not finite"):
        trainer.train()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 1
    assert all(bool(value.isfinite().all()) for value in state["adversary"]["discriminator"].values())


def test_a_run_resumes_without_its_initial_weights(configuration: Configure, weights: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", initial_weights=str(weights))
    trainer = Trainer(config)
    trainer.train(lambda step, _: trainer.stop() if step == 2 else None)
    weights.unlink()
    assert Trainer(config).step == 2
    with pytest.raises(ValueError, match="run.initial_weights: .*model.safetensors"):
        Trainer(replace(config, run=replace(config.run, output=str(tmp_path / "other"))))


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
