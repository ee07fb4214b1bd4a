"""What tests of analyses share: networks of next to no weights, and small photographs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from savl.analysis import controlled_results
from savl.network import SAVL, SAVLConfig


@pytest.fixture
def network() -> Callable[..., SAVL]:
    """Makes a network whose field varies with what it sees; keyword arguments change settings."""

    def make(**changes: Any) -> SAVL:
        settings: dict[str, Any] = {
            "channels": 6, "depths": (1,), "heads": 1, "window": 4, "cab_compress": 3, "cab_squeeze": 3,
            "upsampler": "pixelshuffledirect", "image_residual": True, "latent": 5, "estimator_width": 6,
            "estimator_dilations": (1,),
        }  # fmt: skip
        torch.manual_seed(1)
        model = SAVL(SAVLConfig(**(settings | changes))).eval()
        if model.estimator is not None:
            with torch.no_grad():
                model.estimator.head.weight.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def photographs(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes photographs: smooth shapes of random colours under fine grain, no two alike."""

    def write(count: int = 4, height: int = 64, width: int = 64, folder: str = "hr") -> list[Path]:
        (tmp_path / folder).mkdir(exist_ok=True)
        paths = []
        for number in range(count):
            random = np.random.default_rng(number)
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
            grain = random.normal(0, 4 + 8 * number, (height, width, 1))
            paths.append(tmp_path / folder / f"scene{number}.png")
            Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(paths[-1])
        return paths

    return write


@pytest.fixture
def short_estimators(monkeypatch: pytest.MonkeyPatch) -> None:
    """MINE and CLUB as they are, but hardly fitted: their own tests are elsewhere."""
    monkeypatch.setattr(controlled_results, "mine", partial(controlled_results.mine, steps=3, width=8))
    monkeypatch.setattr(controlled_results, "club", partial(controlled_results.club, steps=3, width=8))
