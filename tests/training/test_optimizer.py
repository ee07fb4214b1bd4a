"""Muon for the matrices inside a network, Adam for all other weights, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from savl.network import CONFIGS, SAVL
from savl.training import Trainer, TrainingConfig
from savl.training.objective_config import ObjectiveConfig, OptimizerConfig
from savl.training.objectives import Objective
from savl.training.optimizer import AveragedWeights, HiddenMatrix, Muon, build_optimizer, hidden_matrices, orthogonalise

Configure = Callable[..., TrainingConfig]
Tensors = Callable[[Path], dict[str, Tensor]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def polar(matrix: Tensor) -> Tensor:
    """U·Vᵀ, by singular value decomposition."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 4, 9), (2, 9, 4), (1, 48, 432)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_singular_values(
    shape: tuple[int, int, int],
) -> None:
    matrices = random(*shape)
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    seen = u.mT @ orthogonalise(matrices) @ vh.mT
    new_values = torch.diagonal(seen, dim1=-2, dim2=-1)
    off_diagonal = seen - torch.diag_embed(new_values)
    assert off_diagonal.abs().max() < 1e-9
    assert values.amax() / values.amin() > 1.5  # of which nothing is left
    assert new_values.min() > 0.65
    assert new_values.max() < 1.25


def test_orthogonalisation_is_independent_of_scale_and_keeps_zeros() -> None:
    matrices = random(2, 5, 7)
    torch.testing.assert_close(orthogonalise(1e-3 * matrices), orthogonalise(matrices), rtol=1e-3, atol=1e-3)
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def network(**changes: object) -> SAVL:
    torch.manual_seed(0)
    settings: dict[str, object] = {"channels": 12, "depths": (2,), "heads": 2, "modulation_shift": False, **changes}
    return SAVL(replace(CONFIGS["savl-tiny"], **settings))  # type: ignore[arg-type]


def test_hidden_matrices_are_those_between_first_convolution_and_upsampler() -> None:
    model = network()
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {names[id(each.weight)]: each.maps for each in hidden_matrices(model)}
    wanted = {
        name
        for name, weight in model.named_parameters()
        if name.startswith(("groups.", "conv_last.")) and name.endswith(".weight") and weight.ndim > 1
    }
    assert set(found) == wanted
    assert len(found) > 20
    assert all((maps == 3) == ("qkv" in name) for name, maps in found.items())
    assert all(maps == 1 for name, maps in found.items() if "qkv" not in name)
    shifted = network(modulation_shift=True)
    projections = [each.maps for each in hidden_matrices(shifted) if each.weight.shape == (24, shifted.config.latent)]
    assert projections == [2] * 3  # gamma over beta
    model.groups.requires_grad_(False)
    assert [names[id(each.weight)] for each in hidden_matrices(model)] == ["conv_last.weight"]


def test_matrices_are_updated_along_their_orthogonalised_momentum() -> None:
    weight, projection, convolution = (nn.Parameter(random(*shape)) for shape in [(4, 6), (9, 5), (4, 3, 3, 3)])
    matrices = [HiddenMatrix(weight, 1), HiddenMatrix(projection, 3), HiddenMatrix(convolution, 1)]
    muon = Muon(matrices, [nn.Parameter(random(3))], lr=0.1, betas=(0.9, 0.99), momentum=0.8)
    expected = [each.weight.detach().clone() for each in matrices]
    momenta = [torch.zeros_like(each) for each in expected]
    for step in range(3):
        muon.zero_grad()
        for index, each in enumerate(matrices):
            each.weight.grad = random(*each.weight.shape, seed=10 * step + index)
            gradient = each.weight.grad
            momenta[index] = 0.8 * momenta[index] + 0.2 * gradient
            direction = 0.2 * gradient + 0.8 * momenta[index]
            flat = direction.reshape(each.maps, direction.shape[0] // each.maps, -1)
            length = math.sqrt(max(flat.shape[1:]))
            orthogonal = torch.cat([orthogonalise(part[None])[0] for part in flat]).reshape(direction.shape)
            expected[index] -= 0.1 * 0.2 * length * orthogonal
        muon.step()
    for each, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(each.weight.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_an_update_is_near_the_exact_one_and_has_the_size_of_adams() -> None:
    weight = nn.Parameter(torch.zeros(48, 96, dtype=torch.float64))
    muon = Muon([HiddenMatrix(weight, 1)], [nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.99), momentum=0.0)
    weight.grad = random(48, 96)
    muon.step()
    exact = -0.2 * math.sqrt(96) * polar(weight.grad)
    assert (weight.detach() - exact).norm() / exact.norm() < 0.3
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_all_other_weights_are_updated_as_by_adam() -> None:
    ours, theirs = (nn.Parameter(random(5, 3, dtype=torch.float32)) for _ in range(2))
    matrix = nn.Parameter(random(4, 4, dtype=torch.float32))
    muon = Muon([HiddenMatrix(matrix, 1)], [ours], lr=1e-2, betas=(0.8, 0.95), momentum=0.9)
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.8, 0.95))
    for step in range(4):
        matrix.grad = random(4, 4, seed=step, dtype=torch.float32)
        ours.grad = random(5, 3, seed=step, dtype=torch.float32)
        theirs.grad = ours.grad.clone()
        muon.step()
        adam.step()
    assert torch.equal(ours, theirs)


def test_weights_without_a_gradient_are_not_updated() -> None:
    still, moving = (nn.Parameter(random(4, 4, seed=seed)) for seed in range(2))
    other = nn.Parameter(random(3))
    before = still.detach().clone(), other.detach().clone()
    muon = Muon([HiddenMatrix(still, 1), HiddenMatrix(moving, 1)], [other], lr=1.0, betas=(0.9, 0.99), momentum=0.9)
    moving.grad = random(4, 4)
    muon.step()
    assert torch.equal(still, before[0])
    assert torch.equal(other, before[1])


def test_found_inf_skips_a_step() -> None:
    matrix, other = nn.Parameter(random(4, 4, dtype=torch.float32)), nn.Parameter(random(3, dtype=torch.float32))
    muon = Muon([HiddenMatrix(matrix, 1)], [other], lr=1e-2, betas=(0.9, 0.99), momentum=0.9, fused=True)

    def step(flag: float, gradient: float) -> None:
        matrix.grad, other.grad = torch.full_like(matrix, gradient), torch.full_like(other, gradient)
        muon.found_inf = torch.tensor(flag)
        muon.step()

    step(0.0, 1.0)
    before = matrix.detach().clone(), other.detach().clone(), muon.state[matrix]["momentum"].clone()
    step(1.0, math.nan)
    assert torch.equal(matrix, before[0])
    assert torch.equal(other, before[1])
    assert torch.equal(muon.state[matrix]["momentum"], before[2])
    matrix.grad, other.grad = torch.ones_like(matrix), torch.ones_like(other)
    muon.found_inf = None
    muon.step()
    assert not torch.equal(matrix, before[0])
    assert not torch.equal(other, before[1])


def test_an_objective_gets_the_optimizer_of_the_settings() -> None:
    objective = Objective(network(), ObjectiveConfig())
    adam = build_optimizer(objective, OptimizerConfig(), fused=False)
    assert type(adam) is torch.optim.Adam
    muon = build_optimizer(objective, OptimizerConfig(method="muon", momentum=0.7, learning_rate=3e-3), fused=False)
    assert isinstance(muon, Muon)
    assert {group["momentum"] for group in muon.param_groups if group["maps"] > 0} == {0.7}
    assert {group["lr"] for group in muon.param_groups} == {3e-3}
    held = [id(weight) for group in muon.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in objective.parameters() if weight.requires_grad)


def with_muon(config: TrainingConfig) -> TrainingConfig:
    return replace(config, optimizer=replace(config.optimizer, method="muon"))


@pytest.mark.parametrize("deferred", [False, True])
def test_a_resumed_run_with_muon_gives_the_results_of_an_uninterrupted_one(
    configuration: Configure, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deferred: bool
) -> None:
    monkeypatch.setattr("savl.training.trainer._can_defer_checks", lambda *_: deferred)
    whole = Trainer(with_muon(configuration(tmp_path / "whole", steps=4))).train()
    config = with_muon(configuration(tmp_path / "pieces", steps=4))
    first = Trainer(config)
    assert first.train(lambda step, _: first.stop() if step == 2 else None) is None
    resumed = Trainer(config)
    assert resumed.step >= 2
    pieces = resumed.train()
    assert whole is not None
    assert pieces is not None
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(pieces)[name]), name


def test_training_with_muon_lowers_the_loss(configuration: Configure, tmp_path: Path) -> None:
    losses: list[float] = []
    config = with_muon(configuration(tmp_path / "run", steps=40, checkpoint_every=100))
    Trainer(config).train(lambda _, terms: losses.append(terms["sr"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_averaged_weights_equal_those_of_torch() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    torchs, ours = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), AveragedWeights(model, 0.9)
    for step in range(5):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(torch.rand(tensor.shape) * 10)
        torchs.update_parameters(model)
        ours.update_parameters(model)
        expected = torchs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items()), step
    assert all(weight.requires_grad for weight in ours.parameters())
