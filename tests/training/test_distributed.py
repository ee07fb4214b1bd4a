"""Several processes: they learn one set of weights from batches of their own, and what one knows all do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.training import Trainer, load_config
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hr").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "hr" / "a.png")
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


STOPPED = """
import sys
import torch
from savl.training import Trainer, load_config
decoded = []
trainer = Trainer(load_config(sys.argv[1], sys.argv[2:]), on_image=lambda *counts: decoded.append(counts))
rank = trainer.accelerator.process_index
trainer.train(lambda step, _: trainer.stop() if step == 2 and rank == 1 else None)
state = {"weights": trainer.plain.state_dict(), "discriminator": trainer.adversary.plain.state_dict()}
torch.save({**state, "batch": trainer.source(0).y, "decoded": len(decoded)}, trainer.output / f"{rank}.pt")
"""


def start(processes: int, *command: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(
    folder: Path, processes: int, output: str, steps: int = 4, changes: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    options = ("--hr", folder / "hr", "-o", folder / output, "--steps", steps)
    settings = [argument for change in changes for argument in ("--set", change)]
    return start(processes, "-m", "savl", "train", folder / "config.toml", *options, *settings)


def log(folder: Path, output: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_together_stop_together_and_resume_exactly(folder: Path) -> None:
    whole = train(folder, 2, "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.strip() == str(folder / "whole" / "model.safetensors"), "the first process alone says where"

    (folder / "stopped.py").write_text(STOPPED)
    changes = [f'data.hr=["{folder / "hr"}"]', f'run.output="{folder / "pieces"}"', "run.steps=4"]
    changes += [f'data.cache="{folder / "decoded"}"']
    stopped = start(2, folder / "stopped.py", folder / "config.toml", *changes)
    assert stopped.returncode == 0, stopped.stderr
    assert load_checkpoint(folder / "pieces" / "checkpoint.pt")["step"] == 2, "one was asked, both stop"
    first, second = (torch.load(folder / "pieces" / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first["batch"], second["batch"])
    assert (first["decoded"], second["decoded"]) == (1, 0), "the first fills the cache, the second finds it"
    for part in ("weights", "discriminator"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), f"{name} differs: the gradients were not shared"
    rest = train(folder, 2, "pieces")  # without the cache, which changes no number
    assert rest.returncode == 0, rest.stderr
    ours, theirs = (load_checkpoint(folder / run / "checkpoint.pt") for run in ("whole", "pieces"))
    assert ours["step"] == theirs["step"] == 4
    for name, tensor in ours["objective"].items():
        assert torch.equal(tensor, theirs["objective"][name]), name

    # What is logged is the mean over both processes' batches: another number than that of one batch.
    assert [line["step"] for line in log(folder, "whole")] == [1, 2, 3, 4]
    alone = Trainer(
        load_config(folder / "config.toml", [*changes[:1], f'run.output="{folder / "alone"}"', "run.steps=1"])
    )
    alone.train()
    assert log(folder, "whole")[0]["sr"] != log(folder, "alone")[0]["sr"]
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        Trainer(load_config(folder / "config.toml", changes))


@pytest.mark.slow
def test_two_processes_train_the_estimator_alone(folder: Path) -> None:
    begin = [f'data.hr=["{folder / "hr"}"]', f'run.output="{folder / "first"}"', "run.steps=1"]
    first = Trainer(load_config(folder / "config.toml", begin)).train()
    assert first is not None
    alone = ("objective.freeze_network=true", "objective.content=0.2", "objective.calibration=0.3", "gan.weight=0.0")
    alone += ('optimizer.method="adam"',)
    changes = [
        f"run.initial_weights={first}",
        *alone,
        "data.images_per_recipe=2",
        "data.batch=4",
        "data.fresh=2",
        "run.bfloat16=true",
    ]
    second = train(folder, 2, "second", 3, changes)
    assert second.returncode == 0, second.stderr
    before, after = (savl.load(path).state_dict() for path in (first, second.stdout.strip()))
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("estimator."), name
    lines = log(folder, "second")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all("sr" not in line and 0 < line["content"] < 2 for line in lines)


TIMED = """
import sys
from itertools import count
from savl.training import Trainer, load_config
trainer = Trainer(load_config(sys.argv[1], sys.argv[2:]))
rank = trainer.accelerator.process_index
clock = count(0, (5, 15)[rank])
trainer.time.now = lambda: float(next(clock))
trainer.train()
# In one write, which those of the other process do not come between.
line = f"process {rank} ended after {trainer.step} steps and {trainer.time.seconds} seconds\\n"
sys.stdout.buffer.write(line.encode())
sys.stdout.flush()
"""


@pytest.mark.slow
def test_two_processes_end_at_once_whatever_their_clocks_say(folder: Path) -> None:
    (folder / "timed.py").write_text(TIMED)
    changes = [f'data.hr=["{folder / "hr"}"]', f'run.output="{folder / "run"}"', "run.minutes=1", "run.steps=1000"]
    done = start(2, folder / "timed.py", folder / "config.toml", *changes)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"process {rank} ended after 7 steps and 60.0 seconds" in done.stdout
    assert [line["step"] for line in log(folder, "run")] == [1, 2, 3, 4, 5, 6, 7]
    assert load_checkpoint(folder / "run" / "checkpoint.pt")["time"] == {"seconds": 60, "steps": 6}
