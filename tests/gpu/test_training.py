"""Training on a GPU: recorded passes give the gradients of plain ones; images are degraded there or beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from savl.degradation import Degradation
from savl.network import SAVLConfig
from savl.training.config import DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig, TrainingConfig
from savl.training.data import Batch, PairPool, PatchSource
from savl.training.trainer import Trainer

SIZES = DataConfig(patch=16, batch=2)


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    y, x, z = (torch.rand(2, 3, side, side, generator=generator) for side in (16, 64, 16))
    return Batch(y, x, z, torch.rand(2, 16, 16, generator=generator))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_passes_train_as_plain_ones_do(
    small_config: Callable[..., SAVLConfig], tmp_path: Path, frozen: bool, compiled: bool
) -> None:
    pytest.importorskip("accelerate")
    start = TrainingConfig(
        small_config(), SIZES, run=RunConfig(steps=1, output=str(tmp_path / "start"), images_every=100)
    )
    weights = Trainer(start, batches).train()

    def trained(graph: bool) -> dict[str, torch.Tensor]:
        objective = ObjectiveConfig(alpha=0.0 if frozen else 1.0, freeze_estimator=frozen)
        run = RunConfig(
            steps=6,
            start=str(weights),
            output=str(tmp_path / f"graph-{graph}"),
            images_every=100,
            fused=True,
            graph=graph,
            compile=graph and compiled,
        )
        # Plain gradient descent would show a difference in proportion; Adam's first steps show signs alone.
        optimizer = OptimizerConfig(learning_rate=1e-4, warmup=0)
        config = TrainingConfig(small_config(), SIZES, objective=objective, optimizer=optimizer, run=run)
        trainer = Trainer(config, batches)
        losses: list[float] = []
        trainer.train(lambda step, terms: losses.append(terms["total"]))
        assert len(set(losses)) == 6
        state = {name: value.detach().cpu() for name, value in trainer.plain.state_dict().items()}
        return state | {"losses": torch.tensor(losses)}

    plain, recorded = trained(False), trained(True)
    torch.testing.assert_close(recorded.pop("losses"), plain.pop("losses"), rtol=1e-3, atol=1e-5)
    for name, value in plain.items():
        assert (recorded[name] - value).abs().max() <= 3e-4, name  # of six steps of 1e-4 each


@pytest.mark.parametrize("degrade_on", ["auto", "cpu"])
def test_other_processes_degrade_as_this_one_does(tmp_path: Path, degrade_on: str) -> None:
    pytest.importorskip("kornia")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")

    def pool(workers: int) -> PairPool:
        settings = DataConfig(
            cache=str(tmp_path / "cache"), patch=8, batch=6, margin=1, pool=12, fresh=3, workers=workers,
            degrade_on=degrade_on,  # type: ignore[arg-type]
        )  # fmt: skip
        patches = PatchSource([tmp_path], 40, None, settings.cache)
        return PairPool(
            patches, Degradation(TrainingConfig().degradation), settings, seed=2, device=torch.device("cuda")
        )

    here, beside = pool(0), pool(2)
    for step in (0, 1, 5):
        ours, theirs = here(step), beside(step)
        assert ours.y.is_cuda
        assert theirs.y.is_cuda
        assert torch.equal(ours.x, theirs.x)
        assert (ours.y - theirs.y).abs().mean() < 0.5 / 255  # rounded otherwise with other numbers of threads
