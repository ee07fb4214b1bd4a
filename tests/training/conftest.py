"""A run short enough for any machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.training import TrainingConfig
from savl.training.config import parse_config

Configure = Callable[..., TrainingConfig]


@pytest.fixture(scope="session")
def small_tables() -> dict[str, dict[str, Any]]:
    """``[model]`` and ``[data]`` of such a run."""
    model = {
        "channels": 6, "depths": [2], "heads": 1, "window": 4, "cab_compress": 3, "cab_squeeze": 3, "latent": 4,
        "estimator_width": 6, "estimator_dilations": [1], "decoder_width": 6, "decoder_depth": 2, "drop_path": 0.3,
    }  # fmt: skip
    return {"model": model, "data": {"patch": 8, "batch": 2, "margin": 1, "pool": 4, "fresh": 1}}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of two pictures of 96×96 pixels."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    y, x = np.mgrid[0:96, 0:96]
    for index in range(2):
        waves = np.sin(x / (3 + index)) * np.cos(y / 5)
        pixels = np.stack([waves, -waves, waves**2], axis=-1) * 100 + 128
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def configuration(photographs: Path, small_tables: dict[str, dict[str, Any]]) -> Configure:
    """Settings of a run into a folder; keyword arguments change ``[run]``."""

    def configure(output: Path, **run: object) -> TrainingConfig:
        return parse_config(
            {
                "model": small_tables["model"],
                "data": small_tables["data"] | {"hr": [str(photographs)]},
                "degradation": {"strength": [0.0, 0.3]},
                "optimizer": {"warmup": 2, "ema": 0.9, "learning_rate": 2e-3},
                "run": {"steps": 6, "checkpoint_every": 2, "log_every": 1, "output": str(output), **run},
            }
        )

    return configure


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The weights in a file, by name."""
    return lambda path: savl.load(path).state_dict()
