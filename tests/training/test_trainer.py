"""The training loop: it learns, it resumes exactly, it survives a kill."""

from __future__ import annotations

import json
import os
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
    "channels": 6, "depths": [1], "heads": 1, "window": 4, "cab_compress": 3, "cab_squeeze": 3, "latent": 4,
    "estimator_width": 6, "estimator_dilations": [1], "decoder_width": 6, "decoder_depth": 2, "drop_path": 0.0,
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


def test_a_killed_run_resumes_from_a_whole_checkpoint(photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = tmp_path / "config.toml"
    model = "\n".join(f"{name} = {json.dumps(value)}" for name, value in MODEL.items())
    config.write_text(
        f"[model]\n{model}\n[data]\npatch = 8\nbatch = 2\n"
        f"[run]\nsteps = 100000\ncheckpoint_every = 1\nlog_every = 1\noutput = {json.dumps(str(output))}\n"
    )
    command = [
        sys.executable,
        "-c",
        "from savl.cli import main; main()",
        "train",
        str(config),
        "--hr",
        str(photographs),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 90
        log = output / "log.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) > 5:
                break
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert load_checkpoint(output / "checkpoint.pt")["step"] >= 4
    done = load_checkpoint(output / "checkpoint.pt")["step"]
    finishing = subprocess.run([*command, "--steps", str(done + 2)], capture_output=True, text=True, timeout=120)
    assert finishing.returncode == 0, finishing.stderr
    assert f"resuming {output} at step {done}" in finishing.stderr.replace("\n", "")
    assert savl.load(output / "model.safetensors").config.channels == 6


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


def test_a_checkpoint_of_another_network_is_refused(photographs: Path, tmp_path: Path) -> None:
    config = configuration(photographs, tmp_path / "run")
    Trainer(config).train()
    with pytest.raises(ValueError, match="belongs to another network"):
        Trainer(replace(config, model=replace(config.model, channels=12)))


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
