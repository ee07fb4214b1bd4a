"""Runs that are short enough for any machine, and one that is finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.training import Trainer, TrainingConfig
from savl.training.config import parse_config

Configure = Callable[..., TrainingConfig]


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    """One thread: more only wait for each other in so small a network, and sums would be rounded differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_tables() -> dict[str, dict[str, Any]]:
    """``[model]`` and ``[data]`` of such a run."""
    model = {
        "channels": 6, "depths": [2], "heads": 1, "window": 4, "cab_compress": 3, "cab_squeeze": 3, "latent": 4,
        "estimator_width": 6, "estimator_dilations": [1], "decoder_width": 6, "decoder_depth": 2, "drop_path": 0.3,
        "modulation_shift": False, "restoration_strength": False,
    }  # fmt: skip
    return {"model": model, "data": {"patch": 8, "batch": 2, "margin": 1, "pool": 4, "fresh": 1}}


def save_photographs(folder: Path) -> Path:
    folder.mkdir()
    y, x = np.mgrid[0:96, 0:96]
    for index in range(2):
        waves = np.sin(x / (3 + index)) * np.cos(y / 5)
        pixels = np.stack([waves, -waves, waves**2], axis=-1) * 100 + 128
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of two images of 96×96 pixels."""
    return save_photographs(tmp_path / "photographs")


def make_config(tables: dict[str, dict[str, Any]], photographs: Path, output: Path, **run: object) -> TrainingConfig:
    return parse_config(
        {
            "model": tables["model"],
            "data": tables["data"] | {"hr": [str(photographs)]},
            "degradation": {"strength": [0.0, 0.3]},
            "optimizer": {"warmup": 2, "ema": 0.9, "learning_rate": 2e-3},
            "run": {"steps": 6, "checkpoint_every": 2, "log_every": 1, "output": str(output), **run},
        }
    )


@pytest.fixture
def configuration(photographs: Path, small_tables: dict[str, dict[str, Any]]) -> Configure:
    """Settings of a run into a folder; keyword arguments change ``[run]``."""
    return lambda output, **run: make_config(small_tables, photographs, output, **run)


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory, small_tables: dict[str, dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = make_config(small_tables, save_photographs(folder / "photographs"), folder / "run", images_every=3)
    Trainer(config).train()
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """The folder of a run of ``configuration`` that has finished its six steps; a copy, which a test may change."""
    return Path(shutil.copytree(_finished, tmp_path / "finished"))


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The weights in a file, by name."""
    return lambda path: savl.load(path).state_dict()
