"""Two processes: they learn one set of weights from their own batches, and agree on stopping, time and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.training import Trainer, TrainingConfig, load_config
from savl.training.checkpoint import load_checkpoint

CONFIG = """
[model]
channels = 6
depths = [1]
heads = 1
window = 4
cab_compress = 3
cab_squeeze = 3
latent = 4
estimator_width = 6
estimator_dilations = [1]
decoder_width = 6
decoder_depth = 2
[data]
patch = 8
batch = 2
margin = 1
pool = 4
fresh = 1
[gan]
weight = 0.1
features = 2
[optimizer]
method = "muon"
warmup = 1
[run]
log_every = 1
device = "cpu"
"""
RUNS = """
import sys
from itertools import count
import torch
from savl.cli import main
from savl.training import Trainer, load_config
from savl.training.checkpoint import load_checkpoint

folder = sys.argv[1]

# A run by the command line.
try:
    main(["train", f"{folder}/config.toml", "--hr", f"{folder}/hr", "-o", f"{folder}/whole", "--steps", "4"])
except SystemExit as ended:
    assert not ended.code

def config(output, *changes):
    changes = (f'data.hr=["{folder}/hr"]', f'run.output="{folder}/{output}"', *changes)
    return load_config(f"{folder}/config.toml", changes)

# A run that the second process alone is asked to stop.
decoded = []
trainer = Trainer(
    config("pieces", "run.steps=4", f'data.cache="{folder}/decoded"'), on_image=lambda *counts: decoded.append(counts)
)
rank = trainer.accelerator.process_index
trainer.train(lambda step, _: trainer.stop() if step == 2 and rank == 1 else None)
state = {
    "weights": trainer.unwrapped_objective.state_dict(),
    "discriminator": trainer.adversary.unwrapped.state_dict(),
    "batch": trainer.source(0).y,
    "decoded": len(decoded),
    "checkpoint": load_checkpoint(trainer.output / "checkpoint.pt")["step"],
}
torch.save(state, trainer.output / f"{rank}.pt")
trainer.accelerator.wait_for_everyone()
Trainer(config("pieces", "run.steps=4")).train()  # without the cache, which changes no number

# The estimator alone.
changes = [
    f'run.initial_weights="{folder}/whole/model.safetensors"', "run.steps=3", "run.bfloat16=true", "gan.weight=0.0",
    "objective.freeze_network=true", "objective.content=0.2", "objective.calibration=0.3", 'optimizer.method="adam"',
    "data.images_per_recipe=2", "data.batch=4", "data.fresh=2",
]
Trainer(config("estimator", *changes)).train()

# A mixture with real pairs, of which the batch of each process has another number.
pairs = [
    f'pairs.lr=["{folder}/lr"]', f'pairs.hr=["{folder}/hr"]', "pairs.share=0.5", "run.steps=4", "gan.weight=0.0",
    "objective.content=0.2", "objective.calibration=0.3", "data.images_per_recipe=2", "data.batch=4", "data.fresh=2",
    "data.pool=8",
]
trainer = Trainer(config("pairs", *pairs))
trainer.train()
real = [int(trainer.source(step).real.sum()) for step in range(4)]
trainer.source.close()
torch.save({"weights": trainer.unwrapped_objective.state_dict(), "real": real}, trainer.output / f"{rank}.pt")

# A run that ends by the clock, which goes faster in one process than in the other.
trainer = Trainer(config("timed", "run.minutes=1", "run.steps=1000"))
clock = count(0, (5, 15)[rank])
trainer.time.now = lambda: float(next(clock))
trainer.train()
(trainer.output / f"{rank}.txt").write_text(f"{trainer.step} steps, {trainer.time.seconds} seconds")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs, which one launch of two processes makes one after the other."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "hr").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "hr" / "a.png")
    (folder / "lr").mkdir()
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(folder / "lr" / "a_x4.png")
    (folder / "config.toml").write_text(CONFIG)
    (folder / "runs.py").write_text(RUNS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, folder / "runs.py", folder],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "whole" / "model.safetensors"), "the first process alone prints the path"
    return folder


def single(folder: Path, output: str, steps: int) -> TrainingConfig:
    changes = [f'data.hr=["{folder / "hr"}"]', f'run.output="{folder / output}"', f"run.steps={steps}"]
    return load_config(folder / "config.toml", changes)


def log(folder: Path, output: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_together_stop_together_and_resume_exactly(folder: Path) -> None:
    first, second = (torch.load(folder / "pieces" / f"{rank}.pt") for rank in (0, 1))
    assert first["checkpoint"] == second["checkpoint"] == 2, "one was asked, both stopped"
    assert not torch.equal(first["batch"], second["batch"])
    assert (first["decoded"], second["decoded"]) == (1, 0), "the first fills the cache, the second reads it"
    for part in ("weights", "discriminator"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), f"{name} differs: the gradients were not shared"
    whole, pieces = (load_checkpoint(folder / run / "checkpoint.pt") for run in ("whole", "pieces"))
    assert whole["step"] == pieces["step"] == 4
    for name, tensor in whole["objective"].items():
        assert torch.equal(tensor, pieces["objective"][name]), name


@pytest.mark.slow
def test_the_log_has_the_mean_over_the_batches_of_both_processes(folder: Path) -> None:
    assert [line["step"] for line in log(folder, "whole")] == [1, 2, 3, 4]
    Trainer(single(folder, "alone", steps=1)).train()
    assert log(folder, "whole")[0]["sr"] != log(folder, "alone")[0]["sr"]


@pytest.mark.slow
def test_a_run_of_two_processes_is_not_resumed_by_one(folder: Path) -> None:
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        Trainer(single(folder, "pieces", steps=4))


@pytest.mark.slow
def test_two_processes_train_the_estimator_alone(folder: Path) -> None:
    before, after = (savl.load(folder / run / "model.safetensors").state_dict() for run in ("whole", "estimator"))
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("estimator."), name
    lines = log(folder, "estimator")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all("sr" not in line and 0 < line["content"] < 2 for line in lines)


@pytest.mark.slow
def test_two_processes_train_on_a_mixture_with_real_pairs(folder: Path) -> None:
    first, second = (torch.load(folder / "pairs" / f"{rank}.pt") for rank in (0, 1))
    assert first["real"] != second["real"]
    assert set(first["real"] + second["real"]) <= {0, 2, 4}
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), f"{name} differs: the gradients were not shared"


@pytest.mark.slow
def test_two_processes_end_at_the_same_step_although_their_clocks_differ(folder: Path) -> None:
    for rank in (0, 1):
        assert (folder / "timed" / f"{rank}.txt").read_text() == "7 steps, 60.0 seconds"
    assert [line["step"] for line in log(folder, "timed")] == [1, 2, 3, 4, 5, 6, 7]
    assert load_checkpoint(folder / "timed" / "checkpoint.pt")["time"] == {"seconds": 60, "steps": 6}
