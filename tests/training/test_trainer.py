"""The training loop: it learns, it resumes exactly, it survives a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import savl
from savl.cli.app import app
from savl.degradation import Degradation, DegradationConfig
from savl.degradation.config import CameraConfig
from savl.network import SAVL, SAVLConfig
from savl.training import Trainer, TrainingConfig, TrainingUnavailable
from savl.training.checkpoint import load_checkpoint, save_checkpoint
from savl.training.config import FORMER_NAMES
from savl.training.data import Batch
from savl.training.data_config import ValidationConfig
from savl.training.monitoring import Validation
from savl.training.objectives import Outcome

Configure = Callable[..., TrainingConfig]
Tables = dict[str, dict[str, Any]]
Tensors = Callable[[Path], dict[str, torch.Tensor]]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss(configuration: Configure, tmp_path: Path) -> None:
    trainer = Trainer(configuration(tmp_path / "run", steps=40, checkpoint_every=100))
    losses: list[float] = []
    trainer.train(lambda _, values: losses.append(values["sr"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_resumed_run_gives_the_results_of_an_uninterrupted_one(
    configuration: Configure, tensors: Tensors, finished: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop_after_three(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    config = configuration(tmp_path / "pieces")
    with pytest.raises(Stop):
        Trainer(config).train(stop_after_three)
    resumed = Trainer(config)
    assert resumed.step == 2, "the last checkpoint was written after step 2"
    pieces = resumed.train()
    assert pieces is not None
    for name, tensor in tensors(finished / "model.safetensors").items():
        assert torch.equal(tensor, tensors(pieces)[name]), name
    logs = [log_of(folder) for folder in (finished, tmp_path / "pieces")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6], "each step once"
    for ours, theirs in zip(*logs, strict=True):
        del ours["steps_per_second"], theirs["steps_per_second"]
        assert ours == theirs


def test_a_stopped_run_finishes_its_step_and_writes_a_checkpoint(configuration: Configure, tmp_path: Path) -> None:
    trainer = Trainer(configuration(tmp_path / "run", checkpoint_every=100))
    assert trainer.train(lambda step, _: trainer.stop() if step == 3 else None) is None
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def endless_run(tmp_path: Path, photographs: Path, tables: Tables, checkpoint_every: int) -> tuple[list[str], Path]:
    """The arguments of ``savl`` for a run that does not end by itself, and the folder of the run."""
    output = tmp_path / "run"
    config = tmp_path / "config.toml"
    text = "".join(
        f"[{title}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
        for title, table in tables.items()
    )
    config.write_text(
        f"{text}[run]\nsteps = 100000\ncheckpoint_every = {checkpoint_every}\nlog_every = 1\n"
        f"output = {json.dumps(str(output))}\n"
    )
    return ["train", str(config), "--hr", str(photographs)], output


def test_a_checkpoint_loads_as_the_network_that_is_exported(finished: Path) -> None:
    exported = savl.load(finished / "model.safetensors")
    loaded = savl.load(finished / "checkpoint.pt")
    assert loaded.config == exported.config
    assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_killed_run_resumes_from_a_whole_checkpoint(photographs: Path, small_tables: Tables, tmp_path: Path) -> None:
    arguments, output = endless_run(tmp_path, photographs, small_tables, checkpoint_every=1)
    log = output / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", "from savl.cli import main; main()", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 5:
            break
        time.sleep(0.02)
    process.kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, stderr
    done = load_checkpoint(output / "checkpoint.pt")["step"]
    assert done >= 4
    finishing = CliRunner().invoke(app, [*arguments, "--steps", str(done + 2)])
    assert finishing.exit_code == 0, finishing.stderr
    assert f"resuming {output} at step {done}" in finishing.stderr.replace("\n", "")
    assert savl.load(output / "model.safetensors").config.channels == 6


def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(
    photographs: Path, small_tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, output = endless_run(tmp_path, photographs, small_tables, checkpoint_every=100_000)
    step = Trainer._step

    def interrupted(trainer: Trainer, batch: Batch, lr_factor: float) -> Outcome:
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, batch, lr_factor)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130, result.stderr
    assert "stopped after step 3" in result.stderr
    assert load_checkpoint(output / "checkpoint.pt")["step"] == 3


def test_the_trainer_alone_obeys_a_signal_to_all_processes(
    photographs: Path,
    small_tables: Tables,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = small_tables["data"] | {"workers": 1, "cache": str(tmp_path / "cache"), "patch": 16, "fresh": 4}
    arguments, output = endless_run(tmp_path, photographs, small_tables | {"data": data}, checkpoint_every=100_000)
    step = Trainer._step

    def interrupted(trainer: Trainer, batch: Batch, lr_factor: float) -> Outcome:
        if trainer.step == 2:  # as from a terminal, which sends a signal to the group of processes
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, batch, lr_factor)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130, result.stderr
    assert not multiprocessing.active_children()
    assert load_checkpoint(output / "checkpoint.pt")["step"] == 3
    assert "stopped after step 3" in result.stderr
    assert "Traceback" not in result.stderr + capfd.readouterr().err


def test_steps_before_a_batch_that_cannot_be_made_are_saved(configuration: Configure, tmp_path: Path) -> None:
    good = Trainer(configuration(tmp_path / "other")).source

    def source(step: int) -> Batch:
        if step == 3:
            raise MemoryError("no more")
        return good(step)

    with pytest.raises(MemoryError, match="no more"):
        Trainer(configuration(tmp_path / "run", checkpoint_every=100), source).train()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_a_script_that_trains_on_import_is_an_error_with_the_remedy(
    configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text(
        """
from savl.training import Trainer
from savl.training.config import parse_config
Trainer(parse_config({"data": {"hr": ["photographs"], "cache": "cache", "workers": 1}})).train()
"""
    )
    config = configuration(tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=1, cache=str(tmp_path / "cache")))
    monkeypatch.setitem(sys.modules, "__main__", script)  # which the worker process imports
    with pytest.raises(RuntimeError, match="worker"):
        Trainer(config).train()
    assert "data.workers: the processes that degrade images import the main script again" in capfd.readouterr().err


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt"]


def test_a_damaged_checkpoint_is_reported(configuration: Configure, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="checkpoint.pt is not a readable checkpoint"):
        Trainer(configuration(tmp_path / "run"))


def test_a_checkpoint_of_another_run_is_refused_with_the_settings_that_differ(
    configuration: Configure, finished: Path
) -> None:
    config = configuration(finished)
    with pytest.raises(ValueError, match="another run: model.channels was 6 and is 12"):
        Trainer(replace(config, model=replace(config.model, channels=12)))
    with pytest.raises(ValueError, match="optimizer.learning_rate was 0.002 and is 0.1"):
        Trainer(replace(config, optimizer=replace(config.optimizer, learning_rate=0.1)))
    with pytest.raises(ValueError, match="optimizer.method was 'adam' and is 'muon'"):
        Trainer(replace(config, optimizer=replace(config.optimizer, method="muon")))
    with pytest.raises(ValueError, match="run.steps must be at least 6"):
        Trainer(configuration(finished, steps=2))


def test_a_finished_run_can_be_made_longer(configuration: Configure, finished: Path) -> None:
    longer = Trainer(configuration(finished, steps=8))
    assert longer.step == 6
    longer.train()
    assert longer.step == 8


def test_a_checkpoint_of_a_version_with_fewer_settings_and_former_names_resumes(
    configuration: Configure, finished: Path
) -> None:
    config = configuration(finished)
    path = finished / "checkpoint.pt"
    state = load_checkpoint(path)
    settings = state["settings"]
    del settings["objective.fidelity"]
    for old, new in FORMER_NAMES.items():
        settings[old] = settings.pop(new)
    save_checkpoint(path, state)
    assert Trainer(config).step == 6
    with pytest.raises(ValueError, match="another run: objective.fidelity was 'l1' and is 'l2'"):
        Trainer(replace(config, objective=replace(config.objective, fidelity="l2")))
    with pytest.raises(ValueError, match="another run: objective.likelihood_scale was 'fixed' and is 'learned'"):
        Trainer(replace(config, objective=replace(config.objective, likelihood_scale="learned")))


def test_a_part_that_a_checkpoint_lacks_is_reported(configuration: Configure, finished: Path) -> None:
    path = finished / "checkpoint.pt"
    save_checkpoint(path, {k: v for k, v in load_checkpoint(path).items() if k != "optimizer"})
    with pytest.raises(ValueError, match="checkpoint.pt cannot be resumed from: 'optimizer'"):
        Trainer(configuration(finished))


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(configuration(tmp_path / "run"))
    weight = trainer.model.conv_first.weight
    weight.register_hook(lambda gradient: gradient * float("inf") if trainer.step == 3 else gradient)
    with pytest.raises(FloatingPointError, match="step 3: the gradient is not finite"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(configuration: Configure, tmp_path: Path) -> None:
    def poisoned(step: int) -> Batch:
        x = torch.full((1, 3, 32, 32), float("nan") if step == 3 else 0.5)
        return Batch(y=torch.full((1, 3, 8, 8), 0.5), x=x, z=torch.full((1, 3, 8, 8), 0.5))

    trainer = Trainer(configuration(tmp_path / "run"), source=poisoned)
    with pytest.raises(FloatingPointError, match="step 3: the loss is not finite, at losses of .*nan"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    saved = load_checkpoint(tmp_path / "run" / "not_finite.pt")
    assert saved["step"] == 3
    assert saved["x"].isnan().all()
    assert saved["images_per_recipe"] == 1
    assert saved["degradation_mask"] is None
    trainer.unwrapped_objective.load_state_dict(saved["weights"])  # enough to repeat the step


def test_the_log_has_a_line_per_step_with_losses_and_learning_rate(finished: Path) -> None:
    lines = log_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"total", "sr", "reconstruction", "kl", "lr", "steps_per_second"} <= set(lines[0])
    assert lines[0]["lr"] < lines[1]["lr"] > lines[-1]["lr"], "warm-up, then decay"


def test_tensorboard_shows_losses_and_images(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert {"total", "sr", "reconstruction", "kl", "lr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("sr")] == [1, 2, 3, 4, 5, 6]
    for name in ("LR", "SR", "HR", "severity"):
        assert {event.step for event in events.Images(name)} == {3, 6}, name


def validated(configuration: Configure, photographs: Path, output: Path, **settings: object) -> TrainingConfig:
    config = configuration(output, steps=4, log_every=100)
    return replace(config, validation=ValidationConfig(hr=str(photographs), every=2, **settings))  # type: ignore[arg-type]


def test_validation_scores_the_averaged_weights(configuration: Configure, photographs: Path, tmp_path: Path) -> None:
    Trainer(validated(configuration, photographs, tmp_path / "run", side=64)).train()
    scores = [line for line in log_of(tmp_path / "run") if "psnr_y" in line]
    assert [line["step"] for line in scores] == [2, 4]
    assert {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "gain_y"} <= set(scores[0])
    assert scores[0]["psnr_y"] != scores[1]["psnr_y"], "the weights have changed in between"


def test_validation_compares_with_the_targets_of_a_camera(photographs: Path) -> None:
    settings = ValidationConfig(hr=str(photographs), side=64, images=1)
    soft, plain = (
        Validation(settings, Degradation(DegradationConfig(camera=CameraConfig(1.0, soft_target=target))), 0).pairs[0]
        for target in (True, False)
    )
    assert torch.equal(soft[0], plain[0])
    assert not torch.equal(soft[1], plain[1])


def test_validation_pairs_of_the_wrong_scale_or_size_are_reported(
    configuration: Configure, photographs: Path, tmp_path: Path
) -> None:
    enlarged = str(shutil.copytree(photographs, tmp_path / "enlarged"))
    with pytest.raises(
        ValueError,
        match=r"validation: .*0.png must be 4 times as large as .*384x384 pixels, got 96x96; .*validation.reduce_lr",
    ):
        Trainer(validated(configuration, photographs, tmp_path / "run", lr=enlarged))
    reduced = Trainer(validated(configuration, photographs, tmp_path / "run", lr=enlarged, reduce_lr=True))
    assert reduced.validation is not None
    assert {(lr.shape[1], hr.shape[1]) for lr, hr in reduced.validation.pairs} == {(24, 96)}
    Image.new("RGB", (18, 300)).save(photographs / "0.png")
    with pytest.raises(ValueError, match=r"validation: .*0.png must have at least 19 pixels"):
        Trainer(validated(configuration, photographs, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"validation: lr: .*nowhere is not a folder"):
        Trainer(validated(configuration, photographs, tmp_path / "run", lr=str(tmp_path / "nowhere")))


def test_validation_on_given_pairs_scores_those(configuration: Configure, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "lr").mkdir()
    for path in photographs.iterdir():
        Image.open(path).resize((24, 24), Image.Resampling.BICUBIC).save(tmp_path / "lr" / path.name)
    trainer = Trainer(validated(configuration, photographs, tmp_path / "run", lr=str(tmp_path / "lr")))
    assert trainer.validation is not None
    fresh = {**trainer.config.model.to_dict(), "image_residual": True, "upsampler": "pixelshuffledirect"}
    bicubic = SAVL(SAVLConfig.from_dict(fresh))  # such a network, untrained, is bicubic interpolation
    assert trainer.validation(bicubic)["gain_y"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.validation.bicubic.psnr_y > 25


def test_a_log_with_foreign_lines_does_not_keep_a_run_from_resuming(configuration: Configure, finished: Path) -> None:
    log = finished / "log.jsonl"
    log.write_text(log.read_text() + '{"note": 1}\nnot json\n{"step": 2')
    Trainer(configuration(finished, steps=7)).train()
    assert [line["step"] for line in log_of(finished)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_missing_accelerate_is_an_error_with_the_remedy(
    configuration: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingUnavailable, match=r"pip install 'savl\[train\]'"):
        Trainer(configuration(tmp_path / "run"))
