"""Training on a GPU: recorded passes give the gradients of plain ones; images are degraded there or beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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
@pytest.mark.parametrize("bfloat16", [False, True])
def test_recorded_passes_train_as_plain_ones_do(
    small_config: Callable[..., SAVLConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    frozen: bool,
    compiled: bool,
    bfloat16: bool,
) -> None:
    pytest.importorskip("accelerate")
    recordings: list[object] = []
    record = torch.cuda.make_graphed_callables

    def noted(*arguments: Any, **options: Any) -> Any:
        recordings.append(arguments)
        return record(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", noted)
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
            bfloat16=bfloat16,
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

    plain = trained(False)
    assert not recordings
    recorded = trained(True)
    assert len(recordings) == 1
    torch.testing.assert_close(recorded.pop("losses"), plain.pop("losses"), rtol=1e-2 if bfloat16 else 1e-3, atol=1e-5)
    for name, value in plain.items():
        assert (recorded[name] - value).abs().max() <= 3e-4, name  # of six steps of 1e-4 each


@pytest.mark.parametrize("degrade_on", ["auto", "cpu"])
def test_other_processes_degrade_as_this_one_does(tmp_path: Path, degrade_on: Literal["auto", "cpu"]) -> None:
    pytest.importorskip("kornia")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    settings = DataConfig(
        cache=str(tmp_path / "cache"), patch=8, batch=6, margin=1, pool=12, fresh=3, degrade_on=degrade_on
    )
    patches = PatchSource([tmp_path], 40, None, settings.cache)

    def pool(workers: int, device: str = "cuda") -> PairPool:
        degradation = Degradation(TrainingConfig().degradation)
        given = dataclasses.replace(settings, workers=workers)
        return PairPool(patches, degradation, given, seed=2, device=torch.device(device))

    here, beside, on_cpu = pool(0), pool(2), pool(0, "cpu")
    for step in (0, 1, 5):
        ours, theirs, known = here(step), beside(step), on_cpu(step).to(torch.device("cuda"))
        assert ours.y.is_cuda
        assert theirs.y.is_cuda
        assert torch.equal(ours.x, theirs.x)
        assert (ours.y - theirs.y).abs().mean() < 0.5 / 255  # rounded otherwise with other numbers of threads
        # The noise of a GPU is another.
        assert torch.equal(ours.y, known.y) == (degrade_on == "cpu")
    beside.close()
