"""The terms of the loss, their weights, and the parameters they train."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from savl.network import SAVL, SAVLConfig
from savl.training.data import Batch
from savl.training.objective_config import ObjectiveConfig
from savl.training.objectives import (
    ContentCritic,
    Objective,
    axis_targets,
    concentration,
    content_share,
    correlation_within,
    fidelity_loss,
    prior_weight,
    visible_degradation,
)

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
    losses = objective(batch, 1, 0).losses
    assert losses.reconstruction is not None
    assert losses.kl is not None
    torch.testing.assert_close(losses.total, losses.sr + 0.3 * losses.reconstruction + 0.7 * losses.kl)
    assert losses.kl > 0


def test_suppression_adds_to_the_weight_of_the_divergence() -> None:
    model, objective, batch = setup(ObjectiveConfig(alpha=0.3, beta=0.1, suppression=2.0))
    losses = objective(batch, 1, 0).losses
    assert losses.reconstruction is not None
    assert losses.kl is not None
    torch.testing.assert_close(losses.total, losses.sr + 0.3 * losses.reconstruction + 0.3 * losses.kl)


def test_the_divergence_has_a_start_and_a_warm_up() -> None:
    settings = ObjectiveConfig(beta=0.2, suppression=1.0, kl_start=10, kl_warmup=20)
    weights = [prior_weight(settings, step) for step in (0, 9, 10, 20, 30, 1000)]
    assert weights == pytest.approx([0.0, 0.0, 0.0, 0.2, 0.4, 0.4])


def test_free_bits_leave_a_small_divergence_alone() -> None:
    def pull(free_bits: float) -> float:
        model, objective, batch = setup(ObjectiveConfig(alpha=1e-6, beta=1.0, free_bits=free_bits))
        with torch.no_grad():
            model.estimator.head.bias += 0.5
        objective(batch, 1, 0).losses.total.backward()
        gradient = model.estimator.head.bias.grad
        assert gradient is not None
        return gradient.abs().max().item()

    assert pull(1e6) < 1e-3 < 0.1 < pull(0.0)


def test_an_estimator_that_no_loss_depends_on_needs_no_gradient() -> None:
    idle = {"channel_modulation": False, "spatial_modulation": False}
    model, _, _ = setup(ObjectiveConfig(alpha=0.0), **idle)
    assert not any(parameter.requires_grad for parameter in model.estimator.parameters())
    objectives = (
        ObjectiveConfig(alpha=0.1),
        *(ObjectiveConfig(alpha=0.0, **{name: 0.1}) for name in ("calibration", "contrast", "content")),
    )
    for objective in objectives:
        model, _, _ = setup(objective, **idle)
        assert all(parameter.requires_grad for parameter in model.estimator.parameters())


def test_a_frozen_estimator_is_not_trained() -> None:
    model, objective, batch = setup(ObjectiveConfig(alpha=0.0, freeze_estimator=True))
    objective(batch, 1, 0).losses.total.backward()
    assert model.estimator is not None
    assert all(parameter.grad is None for parameter in model.estimator.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_freeze_network_trains_the_estimator_alone_without_an_sr_image() -> None:
    model, objective, batch = setup(ObjectiveConfig(alpha=0.3, beta=0.7, freeze_network=True))
    model.reconstruct = None  # type: ignore[assignment, method-assign]
    outcome = objective(batch, 1, 0)
    losses = outcome.losses
    assert outcome.sr is None
    assert losses.sr is None
    assert outcome.severity is not None
    assert "sr" not in losses.to_log()
    torch.testing.assert_close(losses.total, 0.3 * losses.reconstruction + 0.7 * losses.kl)
    losses.total.backward()
    assert model.estimator is not None
    of_field = {f"estimator.{name}" for name, _ in model.estimator.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == of_field
    assert {name for name, p in model.named_parameters() if p.requires_grad} == of_field


def test_fidelity_is_the_mean_absolute_or_squared_error_or_a_hundredth_of_the_psnr() -> None:
    x = torch.full((2, 3, 4, 4), 0.5)
    sr = x + torch.tensor([0.1, -0.01]).view(2, 1, 1, 1)
    assert fidelity_loss(sr, x, "l1").item() == pytest.approx(0.055)
    assert fidelity_loss(sr, x, "l2").item() == pytest.approx((0.01 + 0.0001) / 2)
    assert fidelity_loss(sr, x, "psnr").item() == pytest.approx(-(20 + 40) / 2 / 100, abs=1e-3)
    assert fidelity_loss(x, x, "psnr").item() == pytest.approx(-0.589, abs=1e-3), "finite, and as good as 8 bits"
    objective = ObjectiveConfig(alpha=0.0, fidelity="l2")
    model, loss, batch = setup(objective)
    outcome = loss(batch, 1, 0)
    torch.testing.assert_close(outcome.losses.total, (outcome.sr - batch.x).square().mean())


def test_the_gradient_of_the_psnr_weighs_relative_errors_equally() -> None:
    x = torch.full((2, 3, 4, 4), 0.5)
    sr = (x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)).requires_grad_()
    fidelity_loss(sr, x, "psnr").backward()
    assert sr.grad is not None
    hopeless, easy = (sr.grad * (sr - x)).detach().sum(dim=(1, 2, 3)).tolist()
    assert hopeless == pytest.approx(easy, rel=0.01)


def test_gaussian_likelihood_is_a_squared_norm() -> None:
    model, objective, batch = setup(ObjectiveConfig(likelihood="gaussian"))
    field = model.estimate(batch.y, seed=1)
    assert field is not None
    assert field.sample is not None
    assert objective.decoder is not None
    expected = (objective.decoder(batch.z, field.sample)[0] - batch.y).square().mean()
    torch.testing.assert_close(objective(batch, 1, 0).losses.reconstruction, expected)


@pytest.mark.parametrize("likelihood", ["laplacian", "gaussian"])
def test_a_learned_scale_makes_the_reconstruction_a_log_likelihood(likelihood: str) -> None:
    model, objective, batch = setup(ObjectiveConfig(likelihood=likelihood, likelihood_scale="learned"))  # type: ignore[arg-type]
    losses = objective(batch, 1, 0).losses
    scale = torch.full_like(batch.y, 8 / 255)  # of a fresh decoder, which also says z
    distribution = (torch.distributions.Laplace if likelihood == "laplacian" else torch.distributions.Normal)(
        batch.z, scale
    )
    torch.testing.assert_close(losses.reconstruction, -distribution.log_prob(batch.y).sum(dim=1).mean())


def test_calibration_targets_a_high_variance_where_little_was_degraded() -> None:
    model, objective, batch = setup(ObjectiveConfig(alpha=0.0, calibration=2.0))
    with pytest.raises(ValueError, match="calibration and contrast need batches with a degradation_mask"):
        objective(batch, 1, 0)
    batch = replace(batch, degradation_mask=torch.rand(2, 8, 8))
    field = model.estimate(batch.y, seed=1)
    assert field is not None
    assert field.variance is not None
    wanted = 1 - 0.3 * visible_degradation(batch.y, batch.z, batch.degradation_mask)
    losses = objective(batch, 1, 0).losses
    torch.testing.assert_close(losses.calibration, (field.variance - wanted).abs().mean())
    torch.testing.assert_close(losses.total - losses.sr, 2 * losses.calibration)
    losses.total.backward()
    assert model.estimator is not None
    assert model.estimator.head.bias.grad is not None
    assert model.estimator.head.bias.grad[4:].any(), "the log-variances learn nothing from it"


def test_visible_degradation_follows_its_formula_and_is_monotonic_within_an_image() -> None:
    mask = torch.linspace(0, 1, 64).view(1, 8, 8)
    z = torch.rand(1, 3, 8, 8)
    y = z + 0.03 * mask[:, None] * torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)  # d is 0.03 by construction
    found = visible_degradation(y, z, mask)
    torch.testing.assert_close(found, 1 - torch.exp(-0.03 / 0.06 * mask))
    assert bool((found.flatten().diff() > 0).all())


def test_visible_degradation_distinguishes_a_strong_recipe_from_a_weak_one() -> None:
    z, noise, even = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.ones(2, 8, 8)
    gentle, harsh = visible_degradation(z + noise * torch.tensor([0.005, 0.1]).view(2, 1, 1, 1), z, even)
    assert gentle.max() < 0.15
    assert harsh.min() > 0.7
    torch.testing.assert_close(harsh, harsh[0, 0].expand(8, 8))


def test_contrast_is_one_more_than_the_correlation_within_images_that_vary() -> None:
    model, objective, batch = setup(ObjectiveConfig(alpha=0.0, contrast=0.5))
    with torch.no_grad():
        model.estimator.head.weight.normal_()  # a fresh field's variance is the same everywhere
    mask = torch.rand(2, 8, 8)
    mask[1] = 0.7  # an even image has no shape to follow
    field = model.estimate(batch.y, seed=1)
    assert field is not None
    assert field.variance is not None
    correlation = torch.corrcoef(torch.stack((field.variance[0].flatten(), mask[0].flatten())))[0, 1]
    losses = objective(replace(batch, degradation_mask=mask), 1, 0).losses
    torch.testing.assert_close(losses.contrast, 1 + correlation)
    torch.testing.assert_close(losses.total - losses.sr, 0.5 * losses.contrast)


def test_correlation_within_images_is_independent_of_scale_and_0_where_nothing_varies() -> None:
    mask = torch.rand(3, 8, 8)
    torch.testing.assert_close(correlation_within(1.0 - 1e-3 * mask, mask), torch.tensor(-1.0), atol=1e-3, rtol=0)
    assert correlation_within(mask, torch.full_like(mask, 0.4)) == 0
    assert correlation_within(torch.ones_like(mask), mask).abs() < 1e-6


def test_visible_degradation_is_0_where_the_mask_is_0() -> None:
    assert not visible_degradation(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8)).any()


def test_every_parameter_of_network_and_decoder_is_trained() -> None:
    model, objective, batch = setup(ObjectiveConfig())
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # leave the zeros some layers start from
    objective(batch, 1, 0).losses.total.backward()
    idle = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_a_deterministic_code_has_no_kl_and_hat_has_the_sr_loss_alone() -> None:
    model, objective, batch = setup(ObjectiveConfig(), degradation_code="deterministic")
    losses = objective(batch, 1, 0).losses
    assert losses.kl is None
    assert losses.reconstruction is not None
    model, objective, batch = setup(ObjectiveConfig(), degradation_code="none")
    losses = objective(batch, 1, 0).losses
    assert losses.reconstruction is None
    assert losses.total is losses.sr


def test_club_trains_the_code_by_the_bound_and_the_critic_by_its_likelihood() -> None:
    model, objective, batch = setup(ObjectiveConfig(club=0.5), degradation_code="deterministic")
    losses = objective(batch, 1, 0).losses
    assert losses.club is not None
    assert objective.critic is not None
    losses.club.backward(retain_graph=True)
    assert all(p.grad is None for p in objective.critic.parameters()), "the bound must not train the critic"
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    losses.total.backward()
    assert all(p.grad is not None for p in objective.critic.parameters())


@pytest.mark.parametrize("correlated", [True, False])
def test_the_club_bound_is_high_only_for_a_code_that_contains_the_content(correlated: bool) -> None:
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


def test_the_content_share_is_small_if_the_recipe_determines_mu_and_1_if_it_does_not_affect_it() -> None:
    random = torch.Generator().manual_seed(0)
    recipe = torch.randn(100, 5, 1, 1, generator=random).repeat_interleave(4, dim=0)
    content = torch.randn(400, 5, 1, 1, generator=random)
    local = torch.randn(400, 5, 6, 6, generator=random)
    local = local - local.mean(dim=(2, 3), keepdim=True)  # within an image anything may vary
    assert content_share(recipe + local, 4).item() == pytest.approx(0.1 / 1.1, abs=0.02), "the ridge is a tenth"
    assert content_share(content + local, 4).item() == pytest.approx(1.0, abs=0.1)
    both = content_share(recipe + content + local, 4).item()
    assert both == pytest.approx(1 - 0.5 / 1.1, abs=0.07)
    assert content_share(100 * (recipe + content) + 3, 4).item() == pytest.approx(both, abs=1e-3), "of any scale"


def test_the_content_share_gives_every_direction_the_same_weight() -> None:
    random = torch.Generator().manual_seed(0)
    recipe = torch.randn(100, 4, 1, 1, generator=random).repeat_interleave(4, dim=0)
    content = torch.randn(400, 4, 1, 1, generator=random)
    loud = torch.tensor([10.0, 1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    known = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    mu = loud * (known * recipe + (1 - known) * content)  # the loud direction alone encodes the recipe
    assert content_share(mu, 4).item() > 0.7


def test_the_concentration_is_the_inverse_of_the_number_of_directions() -> None:
    random = torch.Generator().manual_seed(0)
    content = torch.randn(8000, 6, 2, 2, generator=random)
    for directions in (1, 2, 3):
        basis = torch.linalg.qr(torch.randn(6, directions, generator=random)).Q
        recipe = (torch.randn(2000, directions, generator=random) @ basis.T)[:, :, None, None]
        found = concentration(recipe.repeat_interleave(4, dim=0) + 0.5 * content, 4)
        assert found.item() == pytest.approx(1 / directions, abs=0.02), "content does not count"
    with pytest.raises(ValueError, match="even images_per_recipe, got 3"):
        concentration(content[:6], 3)


def test_axis_targets_are_orthogonal_and_grow_with_amount_and_mask() -> None:
    amounts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 30.0, 0.0], [0.0, 0.0, 70.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.ones(5, 4, 4)
    targets = axis_targets(amounts, mask, 64)
    assert targets.shape == (5, 64)
    torch.testing.assert_close(targets.norm(dim=1), torch.tensor([1.5, 2.0, 3.2, 3.0, 0.0]))
    gram = targets[:3] @ targets[:3].T
    torch.testing.assert_close(gram, gram.diagonal().diag())
    torch.testing.assert_close(axis_targets(amounts, 0.5 * mask, 64), 0.5 * targets)


def test_axes_leave_out_images_whose_amounts_are_not_known() -> None:
    _, objective, _ = setup(ObjectiveConfig(alpha=0.0, axes=0.5))
    amounts = torch.tensor([[1.0, 0.0, 0.0], [math.nan] * 3, [0.0, 20.0, 0.0]])
    y = torch.rand(3, 3, 8, 8)
    batch = Batch(y, torch.rand(3, 3, 32, 32), y, torch.ones(3, 8, 8), amounts=amounts)
    losses = objective(batch, 1, 0).losses
    mu = objective.model.estimate(y, seed=1).mu.mean(dim=(2, 3))
    known = [0, 2]
    wanted = axis_targets(amounts[known], torch.ones(2, 8, 8), mu.shape[1])
    torch.testing.assert_close(losses.axes, (mu[known] - wanted).square().sum(dim=1).mean())
    torch.testing.assert_close(losses.total - losses.sr, 0.5 * losses.axes)
    losses.total.backward()
    gradients = [p.grad for p in objective.model.estimator.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients), "a NaN among the amounts must not reach a gradient"
    with pytest.raises(ValueError, match="objective.axes needs batches with amounts"):
        objective(Batch(y, batch.x, y, batch.degradation_mask), 1, 0)


def test_terms_that_need_a_known_degradation_leave_out_real_pairs() -> None:
    settings = ObjectiveConfig(alpha=0.0, calibration=0.3, contrast=0.2, content=0.5, dimensions=0.4, axes=0.1)
    _, objective, _ = setup(settings)
    y, x, z = torch.rand(8, 3, 8, 8), torch.rand(8, 3, 32, 32), torch.rand(8, 3, 8, 8)
    mask, amounts = torch.rand(8, 8, 8), 10 * torch.rand(8, 3)
    real = torch.tensor([False, False, True, True, False, False, True, True])
    mask[real], amounts[real] = 0.0, math.nan
    mixed = objective(Batch(y, x, z, mask, 2, amounts, real), 1, 0).losses
    known = ~real
    degraded = objective(Batch(y[known], x[known], z[known], mask[known], 2, amounts[known]), 1, 0).losses
    for name in ("calibration", "contrast", "content", "dimensions", "axes"):
        torch.testing.assert_close(getattr(mixed, name), getattr(degraded, name), msg=name)
    objective.zero_grad()
    alone = objective(Batch(y[real], x[real], z[real], mask[real], 2, amounts[real], real[real]), 1, 0).losses
    (alone.total - alone.sr).backward()
    gradients = [p.grad for p in objective.model.estimator.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_the_content_share_enters_the_loss_with_its_weight_and_trains_the_estimator() -> None:
    for code in ("variational", "deterministic"):
        model, objective, _ = setup(ObjectiveConfig(alpha=0.0, content=0.5), degradation_code=code)
        batch = Batch(torch.rand(6, 3, 8, 8), torch.rand(6, 3, 32, 32), torch.rand(6, 3, 8, 8), images_per_recipe=2)
        losses = objective(batch, 1, 0).losses
        assert losses.content is not None
        torch.testing.assert_close(losses.total - losses.sr, 0.5 * losses.content)
        losses.content.backward()
        assert model.estimator is not None
        assert model.estimator.head.weight.grad is not None
        assert model.estimator.head.weight.grad.any()


@pytest.mark.parametrize("images_per_recipe", [1, 4, 6])
def test_content_needs_several_recipes_of_several_images(images_per_recipe: int) -> None:
    _, objective, _ = setup(ObjectiveConfig(alpha=0.0, content=0.5))
    batch = Batch(
        torch.rand(6, 3, 8, 8), torch.rand(6, 3, 32, 32), torch.rand(6, 3, 8, 8), images_per_recipe=images_per_recipe
    )
    with pytest.raises(
        ValueError,
        match=f"several recipes have several images each, got 6 images, images_per_recipe={images_per_recipe}",
    ):
        objective(batch, 1, 0)
