"""Training with CUDA graphs, tested without a GPU.

A substitute for `torch.cuda.make_graphed_callables` stores its arguments and captures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from savl.network import SAVL, SAVLConfig
from savl.training import Trainer, TrainingConfig
from savl.training.cuda_graphs import graphed_reconstruct

Recorded = list[tuple[nn.Module, tuple[Tensor, ...]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Replace `torch.cuda.make_graphed_callables` by a function that returns the module; return its arguments."""
    seen: Recorded = []

    def record(module: nn.Module, samples: tuple[Tensor, ...], **_: Any) -> nn.Module:
        seen.append((module, samples))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return seen


@pytest.mark.parametrize(
    ("code", "strength", "inputs"),
    [
        ("variational", False, 3),
        ("deterministic", False, 2),
        ("none", False, 1),
        ("variational", True, 4),
        ("deterministic", True, 3),
    ],
)
def test_graphed_reconstruct_computes_the_same_result(
    small_config: Callable[..., SAVLConfig], recorded: Recorded, code: str, strength: bool, inputs: int
) -> None:
    model = SAVL(small_config(degradation_code=code, restoration_strength=strength))
    lr = torch.rand(2, 3, 8, 8)
    expected = model(lr)
    model.reconstruct = graphed_reconstruct(model, torch.rand(2, 3, 8, 8))  # type: ignore[method-assign, assignment]
    assert torch.equal(model(lr), expected)
    ((module, samples),) = recorded
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}, (
        "gradients do not reach the weights"
    )
    assert len(samples) == inputs
    assert all(sample.is_leaf for sample in samples)
    learned = code != "none"
    assert [sample.requires_grad for sample in samples[1:]] == [learned] * (len(samples) - 1)


def test_the_inputs_need_no_gradients_if_the_estimator_is_frozen(
    small_config: Callable[..., SAVLConfig], recorded: Recorded
) -> None:
    model = SAVL(small_config())
    assert model.estimator is not None
    model.estimator.requires_grad_(False)
    graphed_reconstruct(model, torch.rand(1, 3, 8, 8))
    assert not any(sample.requires_grad for sample in recorded[0][1])


def test_training_on_a_cpu_records_no_graphs(
    configuration: Callable[..., TrainingConfig], recorded: Recorded, tmp_path: Path
) -> None:
    plain = Trainer(configuration(tmp_path / "plain", steps=2)).train()
    graph = Trainer(configuration(tmp_path / "graph", steps=2, graph=True)).train()
    assert plain is not None
    assert graph is not None
    assert plain.read_bytes() == graph.read_bytes()
    assert not recorded
