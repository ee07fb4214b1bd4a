"""A coordinator that runs in this process, so that a worker can be tested without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from savl.distributed.coordinator import Coordinator
from savl.distributed.worker import Settings, Worker
from savl.images.format import format_of_suffix
from savl.images.write import write_image
from savl.inference import upscale_image
from savl.version import version
from tests.cli.conftest import FakeUpscaler


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def make_worker(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Worker]:
    """Return a function that makes a worker with a stand-in for a network; keyword arguments are settings."""
    monkeypatch.setattr(upscale_image, "as_upscaler", lambda model, **settings: FakeUpscaler())
    monkeypatch.setattr(
        Worker, "_call_without_name", lambda self, method, *arguments: getattr(coordinator, method)(*arguments)
    )

    def make(kind: type[Worker] = Worker, *arguments: Any, **settings: Any) -> Worker:
        return kind(
            replace(Settings(model="savl-tiny", version=version(), started=time.time()), **settings),
            None,
            *arguments,
        )

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes small pictures that differ, into a subfolder of `tmp_path`."""

    def write(count: int, folder: str = "in", suffix: str = ".png", side: int = 8) -> list[Path]:
        random = np.random.default_rng(count)
        paths = [tmp_path / folder / f"{number:03d}{suffix}" for number in range(count)]
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            image_format = format_of_suffix(path)
            assert image_format is not None
            write_image(path, random.integers(0, 256, (side, side + 4, 3), dtype=np.uint8), image_format=image_format)
        return paths

    return write
