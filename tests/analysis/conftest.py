"""Fixtures for tests of analyses: very small networks and photographs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.manifold import TSNE

from savl.analysis import controlled_results, figures, table_results
from savl.network import SAVL, SAVLConfig


@pytest.fixture(scope="session")
def network() -> Callable[..., SAVL]:
    """Return a function that makes a network whose field varies with its input; keyword arguments change settings."""

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


@pytest.fixture(scope="session")
def write_photographs() -> Callable[..., list[Path]]:
    """Return a function that writes different photographs into a folder: smooth shapes of random colours and grain."""

    def write(folder: Path, count: int = 4, height: int = 64, width: int = 64) -> list[Path]:
        folder.mkdir(exist_ok=True)
        paths = []
        for number in range(count):
            random = np.random.default_rng(number)
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
            grain = random.normal(0, 4 + 8 * number, (height, width, 1))
            paths.append(folder / f"scene{number}.png")
            Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(paths[-1])
        return paths

    return write


@pytest.fixture
def photographs(tmp_path: Path, write_photographs: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """Return a function that writes photographs into a folder of this test."""

    def write(count: int = 4, height: int = 64, width: int = 64) -> list[Path]:
        return write_photographs(tmp_path / "hr", count, height, width)

    return write


@pytest.fixture(scope="module")
def short_estimators() -> Iterator[None]:
    """Shorten MINE, CLUB, t-SNE and bootstraps, which have tests of their own, and draw small figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controlled_results, "mine", partial(controlled_results.mine, steps=3, width=8))
        patch.setattr(controlled_results, "club", partial(controlled_results.club, steps=3, width=8))
        patch.setattr("sklearn.manifold.TSNE", partial(TSNE, max_iter=250))
        for module in (controlled_results, table_results):
            patch.setattr(module, "spearman", partial(module.spearman, resamples=50))
        patch.setattr(figures, "DPI", 30)
        yield
