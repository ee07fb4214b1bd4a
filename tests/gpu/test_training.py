"""Tests of training on a GPU: CUDA graphs of the passes, degradation on the GPU or the CPU, and synchronisation."""

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
from savl.training.checkpoint import load_checkpoint
from savl.training.config import RunConfig, TrainingConfig
from savl.training.data import Batch, PairPool, Prefetcher
from savl.training.data_config import DataConfig
from savl.training.objective_config import Method, ObjectiveConfig, OptimizerConfig
from savl.training.patches import PatchSource
from savl.training.trainer import Trainer

SIZES = DataConfig(patch=16, batch=2)


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    y, x, z = (torch.rand(2, 3, side, side, generator=generator) for side in (16, 64, 16))
    return Batch(y, x, z, torch.rand(2, 16, 16, generator=generator))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_captured_passes_train_like_ordinary_ones(
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

    def record_call(*arguments: Any, **options: Any) -> Any:
        recordings.append(arguments)
        return record(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record_call)
    start = TrainingConfig(
        small_config(), SIZES, run=RunConfig(steps=1, output=str(tmp_path / "start"), images_every=100)
    )
    weights = Trainer(start, batches).train()

    def trained(graph: bool) -> dict[str, torch.Tensor]:
        objective = ObjectiveConfig(alpha=0.0 if frozen else 1.0, freeze_estimator=frozen)
        run = RunConfig(
            steps=6,
            initial_weights=str(weights),
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
        state = {name: value.detach().cpu() for name, value in trainer.unwrapped_objective.state_dict().items()}
        return state | {"losses": torch.tensor(losses)}

    plain = trained(False)
    assert not recordings
    recorded = trained(True)
    assert len(recordings) == 1
    torch.testing.assert_close(recorded.pop("losses"), plain.pop("losses"), rtol=1e-2 if bfloat16 else 1e-3, atol=1e-5)
    for name, value in plain.items():
        assert (recorded[name] - value).abs().max() <= 3e-4, name  # of six steps of 1e-4 each


def settings(
    small_config: Callable[..., SAVLConfig], output: Path, method: Method = "adam", **run: Any
) -> TrainingConfig:
    """Return the settings of a run of twelve steps that writes only its log before the end."""
    given = {"steps": 12, "images_every": 100, "checkpoint_every": 100, "log_every": 1, "output": str(output)} | run
    optimizer = OptimizerConfig(method=method, warmup=2)
    return TrainingConfig(small_config(), SIZES, optimizer=optimizer, run=RunConfig(**given))


@pytest.mark.parametrize("method", ["adam", "muon"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_step_does_not_wait_for_the_gpu(
    small_config: Callable[..., SAVLConfig], tmp_path: Path, method: Method, fused: bool, graph: bool, bfloat16: bool
) -> None:
    pytest.importorskip("accelerate")
    on_gpu = [batches(step).to(torch.device("cuda")) for step in range(4)]
    config = settings(small_config, tmp_path, method, fused=fused, graph=graph, bfloat16=bfloat16)
    trainer = Trainer(config, lambda step: on_gpu[step % 4])
    assert trainer.deferred_checks
    reported: list[int] = []

    def on_step(done: int, _: dict[str, float]) -> None:
        reported.append(done)
        # It does not count waiting for the event that says that the numbers of the step before have arrived.
        torch.cuda.set_sync_debug_mode("error" if 4 <= done < 10 else "default")

    try:
        trainer.train(on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reported == list(range(1, 13))


def test_deferred_checks_change_no_loss_on_a_gpu(small_config: Callable[..., SAVLConfig], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    losses: dict[bool, list[float]] = {True: [], False: []}
    for deferred in (True, False):
        trainer = Trainer(settings(small_config, tmp_path / f"deferred-{deferred}", checkpoint_every=5), batches)
        trainer.deferred_checks = deferred
        weights = trainer.train(lambda done, terms, deferred=deferred: losses[deferred].append(terms["total"]))  # type: ignore[misc]
        assert weights is not None
        assert int(trainer.average.n_averaged) == 12
    assert len(losses[True]) == 12
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=1e-4)  # sums by atomics do not repeat


@pytest.mark.parametrize("method", ["adam", "muon"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [0, 5, 9])
def test_a_step_with_a_non_finite_loss_changes_nothing_on_a_gpu(
    small_config: Callable[..., SAVLConfig], tmp_path: Path, method: Method, graph: bool, what: str, step: int
) -> None:
    pytest.importorskip("accelerate")

    def source(number: int) -> Batch:
        batch = batches(number)
        if number == step and what == "loss":
            batch.x[0, 0, 0, 0] = float("nan")
        return batch

    trainer = Trainer(settings(small_config, tmp_path, method, checkpoint_every=4, graph=graph), source)
    kept: dict[str, torch.Tensor] = {}

    def keep(module: object, arguments: object) -> None:
        if trainer.step == step:  # the step before was enqueued, and this one has not begun
            kept.update({name: value.clone() for name, value in trainer.unwrapped_objective.state_dict().items()})

    trainer.unwrapped_objective.register_forward_pre_hook(keep)
    # Not within the recorded passes, in which a hook would become part of the recording.
    decoder = trainer.unwrapped_objective.decoder
    assert decoder is not None
    weight = next(decoder.parameters())
    weight.register_hook(lambda g: g * float("inf") if what == "gradient" and trainer.step == step else g)
    reported: list[int] = []
    with pytest.raises(FloatingPointError, match=f"step {step}: the {what} is not finite"):
        trainer.train(lambda done, _: reported.append(done))
    assert reported == list(range(1, step + 1))
    assert trainer.step == step
    assert int(trainer.average.n_averaged) == step
    assert all(bool(value.isfinite().all()) for value in trainer.average.parameters())
    for name, value in trainer.unwrapped_objective.state_dict().items():
        assert torch.equal(value, kept[name]), name
    saved = load_checkpoint(tmp_path / "not_finite.pt")
    assert saved["step"] == step
    assert torch.equal(saved["y"], batches(step).y)
    for name, value in saved["weights"].items():
        assert torch.equal(value, kept[name].cpu()), name
    checkpoint = tmp_path / "checkpoint.pt"
    assert load_checkpoint(checkpoint)["step"] == step // 4 * 4 if step >= 4 else not checkpoint.exists()


@pytest.mark.parametrize("degrade_on", ["auto", "cpu"])
def test_prefetched_batches_are_the_same_with_a_busy_gpu(tmp_path: Path, degrade_on: Literal["auto", "cpu"]) -> None:
    pytest.importorskip("kornia")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    patches = PatchSource([tmp_path], 40)
    given = DataConfig(patch=8, batch=6, margin=1, pool=12, fresh=3, degrade_on=degrade_on)
    device = torch.device("cuda")

    def pool() -> PairPool:
        return PairPool(patches, Degradation(TrainingConfig().degradation), given, seed=2, device=device)

    alone = pool()
    expected = [alone(step) for step in range(6)]
    busy = torch.rand(4096, 4096, device=device)
    copies = []
    with Prefetcher(pool(), device) as prefetcher:
        prefetcher.start(0)
        for step in range(6):
            batch = prefetcher.take()
            prefetcher.start(step + 1)
            for _ in range(20):
                busy = (busy @ busy).clamp(0.0, 1.0)
            # Enqueued behind the work above, and read when the batch is gone.
            copies.append((batch.y.clone(), batch.x.clone(), batch.z.clone()))
            del batch
    for (y, x, z), wanted in zip(copies, expected, strict=True):
        assert torch.equal(x, wanted.x)
        torch.testing.assert_close(z, wanted.z, rtol=0.0, atol=1e-6)
        assert (y - wanted.y).abs().mean() < 0.1 / 255  # a convolution may round otherwise


@pytest.mark.parametrize("degrade_on", ["auto", "cpu"])
def test_worker_processes_degrade_like_this_process(tmp_path: Path, degrade_on: Literal["auto", "cpu"]) -> None:
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
