"""The objectives: their terms, their weights, and what they train."""

from __future__ import annotations

import pytest
import torch

from savl.network import SAVL, SAVLConfig
from savl.training.config import ObjectiveConfig
from savl.training.data import Batch
from savl.training.objectives import ContentCritic, Objective

SMALL = {
    "channels": 6, "depths": (1,), "heads": 1, "window": 4, "cab_compress": 3, "cab_squeeze": 3,
    "upsampler": "pixelshuffledirect", "latent": 4, "estimator_width": 6, "estimator_dilations": (1,),
    "decoder_width": 6, "decoder_depth": 2,
}  # fmt: skip


def setup(objective: ObjectiveConfig, **changes: object) -> tuple[SAVL, Objective, Batch]:
    torch.manual_seed(0)
    model = SAVL(SAVLConfig(**{**SMALL, **changes}))  # type: ignore[arg-type]
    batch = Batch(y=torch.rand(2, 3, 8, 8), x=torch.rand(2, 3, 32, 32), z=torch.rand(2, 3, 8, 8))
    return model, Objective(model, objective), batch


def test_total_is_sr_plus_alpha_reconstruction_plus_beta_kl() -> None:
    model, objective, batch = setup(ObjectiveConfig(alpha=0.3, beta=0.7))
    losses = objective(model, batch, seed=1)
    assert losses.reconstruction is not None
    assert losses.kl is not None
    torch.testing.assert_close(losses.total, losses.sr + 0.3 * losses.reconstruction + 0.7 * losses.kl)
    assert losses.kl > 0


def test_gaussian_likelihood_is_a_squared_norm() -> None:
    model, objective, batch = setup(ObjectiveConfig(likelihood="gaussian"))
    field = model.estimate(batch.y, seed=1)
    assert field is not None
    assert field.sample is not None
    assert objective.decoder is not None
    expected = (objective.decoder(batch.z, field.sample) - batch.y).square().mean()
    torch.testing.assert_close(objective(model, batch, seed=1).reconstruction, expected)


def test_every_parameter_of_network_and_decoder_is_trained() -> None:
    model, objective, batch = setup(ObjectiveConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # leave the zeros some layers start from
    objective(model, batch, seed=1).total.backward()
    idle = [n for m in (model, objective) for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_a_deterministic_code_has_no_kl_and_hat_has_the_sr_loss_alone() -> None:
    model, objective, batch = setup(ObjectiveConfig(), degradation_code="deterministic")
    losses = objective(model, batch, seed=1)
    assert losses.kl is None
    assert losses.reconstruction is not None
    model, objective, batch = setup(ObjectiveConfig(), degradation_code="none")
    losses = objective(model, batch, seed=1)
    assert losses.reconstruction is None
    assert losses.total is losses.sr


def test_club_trains_the_code_by_the_bound_and_the_critic_by_its_likelihood() -> None:
    model, objective, batch = setup(ObjectiveConfig(club=0.5), degradation_code="deterministic")
    losses = objective(model, batch, seed=1)
    assert losses.club is not None
    assert objective.critic is not None
    losses.club.backward(retain_graph=True)
    assert all(p.grad is None for p in objective.critic.parameters()), "the bound must not train the critic"
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    losses.total.backward()
    assert all(p.grad is not None for p in objective.critic.parameters())


@pytest.mark.parametrize("correlated", [True, False])
def test_club_tells_a_code_that_holds_the_content_from_one_that_does_not(correlated: bool) -> None:
    random = torch.Generator().manual_seed(0)
    critic = ContentCritic(3)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(150):
        z = torch.randn(8, 3, 6, 6, generator=random)
        r = z if correlated else torch.randn(8, 3, 6, 6, generator=random)
        optimizer.zero_grad()
        (-critic.log_likelihood(r, z)).backward()
        optimizer.step()
    bound = float(critic.bound(r, z))
    assert bound > 2 if correlated else abs(bound) < 0.3, bound
