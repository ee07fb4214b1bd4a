"""A running service with two workers and a small network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def service(model_file: Path) -> Iterator[object]:
    pytest.importorskip("fastapi", reason="needs savl[serve]")
    from running_service import LIMITS, start

    running, stop = start(model_file, LIMITS)
    yield running
    stop()
    assert running.pool.process_ids == []
