"""A small network with random weights, in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import savl
from savl.network import SAVL, SAVLConfig

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def model_file(small_config: Callable[..., SAVLConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    savl.save(SAVL(small_config()).eval(), path)
    return path
