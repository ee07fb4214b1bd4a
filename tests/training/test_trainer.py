"""The training loop: it learns, it resumes exactly, it survives a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.training import Trainer, TrainingConfig
from savl.training.checkpoint import load_checkpoint, save_checkpoint
from savl.training.config import parse_config
from savl.training.data import Batch

MODEL = {
    "channels": 6, "depths": [2], "heads": 1, "window": 4, "cab_compress": 3, "cab_squeeze": 3, "latent": 4,
    "estimator_width": 6, "estimator_dilations": [1], "decoder_width": 6, "decoder_depth": 2, "drop_path": 0.3,
}  # fmt: skip


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    y, x = np.mgrid[0:96, 0:96]
    for index in range(2):
        waves = np.sin(x / (3 + index)) * np.cos(y / 5)
        pixels = np.stack([waves, -waves, waves**2], axis=-1) * 100 + 128
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def configuration(photographs: Path, output: Path, **run: object) -> TrainingConfig:
    return parse_config(
        {
            "model": MODEL,
            "data": {"hr": [str(photographs)], "patch": 8, "batch": 2},
            "optimizer": {"warmup": 2, "ema": 0.9, "learning_rate": 2e-3},
            "run": {"steps": 6, "checkpoint_every": 2, "log_every": 1, "output": str(output), **run},
        }
    )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return savl.load(path).state_dict()


def test_training_lowers_the_loss(photographs: Path, tmp_path: Path) -> None:
    trainer = Trainer(configuration(photographs, tmp_path / "run", steps=120))
    losses: list[float] = []
    trainer.train(lambda _, values: losses.append(values["sr"]))
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


def test_stopping_and_resuming_gives_the_numbers_of_never_stopping(photographs: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = Trainer(configuration(photographs, tmp_path / "whole")).train()
    assert whole is not None

    class Stop(Exception):
        pass

    def stop_after_three(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    config = configuration(photographs, tmp_path / "pieces")
    with pytest.raises(Stop):
        Trainer(config).train(stop_after_three)
    resumed = Trainer(config)
    assert resumed.step == 2, "the last checkpoint was written after step 2"
    pieces = resumed.train()
    assert pieces is not None
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(pieces)[name]), name


def test_a_stopped_run_finishes_its_step_and_writes_a_checkpoint(photographs: Path, tmp_path: Path) -> None:
    trainer = Trainer(configuration(photographs, tmp_path / "run", checkpoint_every=100))
    assert trainer.train(lambda step, _: trainer.stop() if step == 3 else None) is None
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def endless_run(tmp_path: Path, photographs: Path, checkpoint_every: int) -> tuple[list[str], Path]:
    """The command of a run that will not end by itself, and its run folder."""
    output = tmp_path / "run"
    config = tmp_path / "config.toml"
    model = "\n".join(f"{name} = {json.dumps(value)}" for name, value in MODEL.items())
    config.write_text(
        f"[model]\n{model}\n[data]\npatch = 8\nbatch = 2\n"
        f"[run]\nsteps = 100000\ncheckpoint_every = {checkpoint_every}\nlog_every = 1\n"
        f"output = {json.dumps(str(output))}\n"
    )
    program = "from savl.cli import main; main()"
    return [sys.executable, "-c", program, "train", str(config), "--hr", str(photographs)], output


def end_after_some_steps(command: list[str], log: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a training, send it a signal when it has logged some steps; its exit code and what it said."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 5:
            break
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_a_killed_run_resumes_from_a_whole_checkpoint(photographs: Path, tmp_path: Path) -> None:
    command, output = endless_run(tmp_path, photographs, checkpoint_every=1)
    code, said = end_after_some_steps(command, output / "log.jsonl", signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    done = load_checkpoint(output / "checkpoint.pt")["step"]
    assert done >= 4
    finishing = subprocess.run([*command, "--steps", str(done + 2)], capture_output=True, text=True, timeout=120)
    assert finishing.returncode == 0, finishing.stderr
    assert f"resuming {output} at step {done}" in finishing.stderr.replace("\n", "")
    assert savl.load(output / "model.safetensors").config.channels == 6


def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(photographs: Path, tmp_path: Path) -> None:
    command, output = endless_run(tmp_path, photographs, checkpoint_every=100_000)
    code, said = end_after_some_steps(command, output / "log.jsonl", signal.SIGINT)
    assert code == 130, said
    step = load_checkpoint(output / "checkpoint.pt")["step"]
    assert f"stopped after step {step}" in said


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


def test_a_damaged_checkpoint_is_named(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="checkpoint.pt is not a readable checkpoint"):
        Trainer(configuration(photographs, tmp_path / "run"))


def test_a_checkpoint_of_another_run_is_refused_and_the_settings_are_named(photographs: Path, tmp_path: Path) -> None:
    config = configuration(photographs, tmp_path / "run")
    Trainer(config).train()
    with pytest.raises(ValueError, match="another run: model.channels was 6 and is 12"):
        Trainer(replace(config, model=replace(config.model, channels=12)))
    with pytest.raises(ValueError, match="optimizer.learning_rate was 0.002 and is 0.1"):
        Trainer(replace(config, optimizer=replace(config.optimizer, learning_rate=0.1)))
    with pytest.raises(ValueError, match="run.steps must be at least 6"):
        Trainer(configuration(photographs, tmp_path / "run", steps=2))


def test_a_longer_run_goes_on_from_a_finished_one(photographs: Path, tmp_path: Path) -> None:
    Trainer(configuration(photographs, tmp_path / "run")).train()
    longer = Trainer(configuration(photographs, tmp_path / "run", steps=8))
    assert longer.step == 6
    longer.train()
    assert longer.step == 8


def test_a_checkpoint_that_lacks_a_part_is_named(photographs: Path, tmp_path: Path) -> None:
    config = configuration(photographs, tmp_path / "run")
    Trainer(config).train()
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, {k: v for k, v in load_checkpoint(path).items() if k != "optimizer"})
    with pytest.raises(ValueError, match="checkpoint.pt cannot be resumed from: 'optimizer'"):
        Trainer(config)


def test_a_resumed_run_logs_every_step_once(photographs: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_after_three(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    config = configuration(photographs, tmp_path / "run")
    with pytest.raises(Stop):
        Trainer(config).train(stop_after_three)
    Trainer(config).train()
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(configuration(photographs, tmp_path / "run"))
    weight = trainer.model.conv_first.weight
    weight.register_hook(lambda gradient: gradient * float("inf") if trainer.step == 3 else gradient)
    with pytest.raises(FloatingPointError, match="step 3: the gradient is not finite"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(photographs: Path, tmp_path: Path) -> None:
    def poisoned(step: int) -> Batch:
        x = torch.full((1, 3, 32, 32), float("nan") if step == 3 else 0.5)
        return Batch(y=torch.full((1, 3, 8, 8), 0.5), x=x, z=torch.full((1, 3, 8, 8), 0.5))

    trainer = Trainer(configuration(photographs, tmp_path / "run"), source=poisoned)
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_the_log_has_a_line_a_step_with_loss_and_rate(photographs: Path, tmp_path: Path) -> None:
    Trainer(configuration(photographs, tmp_path / "run")).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"total", "sr", "reconstruction", "kl", "lr", "steps_per_second"} <= set(lines[0])
    assert lines[0]["lr"] < lines[1]["lr"] > lines[-1]["lr"], "warm-up, then decay"


@pytest.mark.parametrize(
    "changes",
    [
        {"degradation_code": "deterministic"},
        {"degradation_code": "none"},
        {"spatial_modulation": False},
        {"channel_modulation": False},
    ],
)
def test_every_ablation_trains(photographs: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    config = configuration(photographs, tmp_path / "run", steps=2)
    weights = Trainer(replace(config, model=replace(config.model, **changes))).train()  # type: ignore[arg-type]
    assert weights is not None
    assert savl.load(weights).config.degradation_code == changes.get("degradation_code", "variational")
