"""The GAN stage: losses against closed forms, and a discriminator that is bounded, resumable and able to learn."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from savl.training.adversarial import (
    PatchDiscriminator,
    UNetDiscriminator,
    discriminator_loss,
    generator_loss,
    grid_pattern,
)
from savl.training.objective_config import AdversarialLoss

Discriminator = type[UNetDiscriminator] | type[PatchDiscriminator]
CLASSES = pytest.mark.parametrize("make", [UNetDiscriminator, PatchDiscriminator])
KINDS: tuple[AdversarialLoss, ...] = ("vanilla", "relativistic")


def logits(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_zero_logits_are_log_2(kind: AdversarialLoss) -> None:
    zero = torch.zeros(2, 1, 8, 8)
    assert float(generator_loss(kind, zero, zero)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(kind, zero, zero)) == pytest.approx(math.log(2))


def test_vanilla_is_the_binary_cross_entropy_of_each_image_alone() -> None:
    real, fake = logits(1.5, -0.5, 3.0), logits(-2.0, 0.25)
    cross_entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(generator_loss("vanilla", fake), cross_entropy(fake, torch.ones(2)))
    expected = 0.5 * (cross_entropy(real, torch.ones(3)) + cross_entropy(fake, torch.zeros(2)))
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), expected)


def test_the_vanilla_generator_loss_ignores_real_images() -> None:
    fake = logits(-2.0, 0.25)
    assert torch.equal(generator_loss("vanilla", fake), generator_loss("vanilla", fake, logits(7.0)))


def test_relativistic_is_the_published_formula() -> None:
    real, fake = torch.tensor([1.5, -0.5]), torch.tensor([-2.0, 1.0])  # of means 0.5 and -0.5

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    more_real = [sigmoid(1.5 + 0.5), sigmoid(-0.5 + 0.5)]
    more_fake = [sigmoid(-2.0 - 0.5), sigmoid(1.0 - 0.5)]
    discriminator = -sum(math.log(p) for p in more_real) / 2 - sum(math.log(1 - p) for p in more_fake) / 2
    generator = -sum(math.log(p) for p in more_fake) / 2 - sum(math.log(1 - p) for p in more_real) / 2
    assert float(discriminator_loss("relativistic", real, fake)) == pytest.approx(discriminator / 2)
    assert float(generator_loss("relativistic", fake, real)) == pytest.approx(generator / 2)


def test_relativistic_losses_are_symmetric_in_generator_and_discriminator() -> None:
    real, fake = torch.randn(2, 1, 8, 8) + 1, torch.randn(2, 1, 8, 8)
    generator = generator_loss("relativistic", fake, real)
    torch.testing.assert_close(generator, discriminator_loss("relativistic", fake, real))
    torch.testing.assert_close(generator, generator_loss("relativistic", fake - 3, real - 3))  # only differences count


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_separate_the_logits_for_the_discriminator_and_raise_fake_ones_for_the_generator(
    kind: AdversarialLoss,
) -> None:
    real, fake = logits(0.3, -1.0), logits(0.2, 0.9)
    discriminator_loss(kind, real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert bool((real.grad < 0).all()), "descending must raise the logits of real images"
    assert bool((fake.grad > 0).all())
    real, fake = logits(0.3, -1.0), logits(0.2, 0.9)
    generator_loss(kind, fake, real).backward()
    assert fake.grad is not None
    assert bool((fake.grad < 0).all())
    assert real.grad is None, "the generator cannot change real images"


@pytest.mark.parametrize("kind", KINDS)
def test_losses_stay_finite_and_float32_where_the_logits_are_extreme(kind: AdversarialLoss) -> None:
    real, fake = torch.full((4,), -1e4, dtype=torch.bfloat16), torch.full((4,), 1e4, dtype=torch.bfloat16)
    for loss in (discriminator_loss(kind, real, fake), generator_loss(kind, real, fake)):
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        assert float(loss) > 1e3


def test_losses_refuse_an_unknown_kind_and_missing_real_logits() -> None:
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match="kind must be 'vanilla' or 'relativistic', got 'hinge'"):
        generator_loss("hinge", zero, zero)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind must be 'vanilla' or 'relativistic', got 'hinge'"):
        discriminator_loss("hinge", zero, zero)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="real_logits must be a tensor for the relativistic generator loss, got None"):
        generator_loss("relativistic", zero)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40)])
def test_the_discriminator_has_one_logit_per_pixel(height: int, width: int) -> None:
    assert UNetDiscriminator(2)(torch.rand(2, 3, height, width)).shape == (2, 1, height, width)


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 3, 20, 16), (1, 3, 0, 8), (1, 1, 8, 8), (3, 8, 8)])
def test_the_discriminator_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), H and W multiples of 8, got \(") as caught:
        UNetDiscriminator(2)(torch.rand(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 47), (100, 9)])
def test_the_patch_discriminator_has_one_logit_per_8_by_8_pixels(height: int, width: int) -> None:
    assert PatchDiscriminator(2)(torch.rand(2, 3, height, width)).shape == (2, 1, height // 8, width // 8)


@pytest.mark.parametrize("shape", [(1, 3, 8, 7), (1, 1, 8, 8), (3, 8, 8)])
def test_the_patch_discriminator_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), H and W at least 8, got \(") as caught:
        PatchDiscriminator(2)(torch.rand(shape))
    assert str(shape) in str(caught.value)


def test_a_logit_of_the_patch_discriminator_depends_on_54_by_54_pixels() -> None:
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    PatchDiscriminator(4)(images)[0, 0, 8, 8].backward()
    assert images.grad is not None
    rows, columns = images.grad[0].abs().sum(0).nonzero().T
    assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 53


def test_the_patch_discriminator_reads_every_pixel_equally_often() -> None:
    model = PatchDiscriminator(2).eval()
    with torch.no_grad():
        for conv in (model.enter, *model.down, model.refine, model.leave):
            if parametrize.is_parametrized(conv):
                parametrize.remove_parametrizations(conv, "weight")
            conv.weight.fill_(1e-2)  # positive weights and images: the activation changes nothing
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    model(images).sum().backward()
    assert images.grad is not None
    inside = images.grad[..., 48:-48, 48:-48]
    torch.testing.assert_close(inside, torch.full_like(inside, float(inside.mean())))


def test_the_patch_discriminator_costs_a_small_part_of_the_u_net() -> None:
    costs = []
    for model in (PatchDiscriminator(24), UNetDiscriminator(64)):
        macs = 0

        def count(conv: nn.Module, _: object, output: Tensor) -> None:
            nonlocal macs
            assert isinstance(conv, nn.Conv2d)
            macs += conv.weight[0].numel() * output[0].numel()

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        with torch.no_grad():
            model(torch.rand(1, 3, 32, 32))
        costs.append(macs)
    assert costs[0] < costs[1] / 100


def test_a_pattern_that_repeats_is_measured_whatever_the_images_show() -> None:
    hr = torch.rand(4, 3, 32, 40)
    pattern = torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(16, 20)
    assert float(grid_pattern(hr + pattern, hr, 4)) == pytest.approx(0.1, rel=1e-5)
    assert float(grid_pattern(hr + 0.3, hr, 4)) == pytest.approx(0, abs=1e-6), "a uniform error is no pattern"
    three = torch.tensor([0.1, -0.1, 0.0]).repeat(16)[:40]
    assert float(grid_pattern(hr + three, hr, 4)) < 0.03, "another period"
    signs = torch.ones(32, 40)
    signs[16:] = -1.0
    assert float(grid_pattern(hr + signs * pattern, hr, 4)) == pytest.approx(0.1, rel=1e-5), "another sign elsewhere"
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(8, 3, 128, 128)
    assert float(grid_pattern(noise, torch.zeros(()), 4)) < 0.022
    assert float(grid_pattern(hr[..., :8, :9] + pattern[:8, :9], hr[..., :8, :9], 4)) == pytest.approx(0.1, rel=1e-5)


def test_the_gradient_of_the_pattern_removes_it_alone() -> None:
    hr = torch.rand(2, 3, 16, 16)
    pattern = torch.zeros(4, 4)
    pattern[0, 0], pattern[3, 1] = 0.1, -0.1
    sr = (hr + pattern.repeat(4, 4)).requires_grad_()
    grid_pattern(sr, hr, 4).backward()
    assert sr.grad is not None
    assert bool((sr.grad[..., ::4, ::4] > 0).all())
    assert bool((sr.grad[..., 3::4, 1::4] < 0).all())
    torch.testing.assert_close(sr.grad.mean(), torch.tensor(0.0), atol=1e-8, rtol=0)


@CLASSES
def test_the_discriminator_needs_features(make: Discriminator) -> None:
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        make(0)


def test_the_discriminator_has_the_size_of_the_published_one() -> None:
    # Its convolutions, written out: 3x3 in and out with bias, and without bias three 4x4 down and five 3x3.
    ends = (3 * 64 * 9 + 64) + (64 * 9 + 1)
    down = 16 * (64 * 128 + 128 * 256 + 256 * 512)
    up = 9 * (512 * 256 + 256 * 128 + 128 * 64)
    assert sum(p.numel() for p in UNetDiscriminator().parameters()) == ends + down + up + 2 * 9 * 64 * 64


def test_every_level_and_every_skip_affects_the_logits() -> None:
    model = UNetDiscriminator(2).eval()
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    model(image)[0, 0, 16, 16].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    with torch.no_grad():
        whole = model(image)
        for conv in model.up:  # nothing left of what comes from below, level by level, but the skips
            conv.parametrizations.weight.original.mul_(1e-30)
            parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
            changed = model(image)
            assert not torch.allclose(changed, whole)
            whole = changed
        assert float(whole.std()) > 0, "the skips alone still carry the image"


@pytest.mark.parametrize(("make", "bounds"), [(UNetDiscriminator, 8), (PatchDiscriminator, 3)])
def test_spectral_norms_are_1_whatever_the_weights_are(make: Discriminator, bounds: int) -> None:
    model = make(4).train()
    bounded = [m for m in model.modules() if isinstance(m, nn.Conv2d) and parametrize.is_parametrized(m, "weight")]
    assert len(bounded) == bounds
    with torch.no_grad():
        for conv in bounded:
            conv.parametrizations.weight.original.mul_(20).add_(torch.randn_like(conv.weight))
    image = torch.rand(1, 3, 8, 8)
    for _ in range(60):
        model(image)
    model.eval()
    norms = [float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) for conv in bounded]
    assert all(norm == pytest.approx(1, abs=0.02) for norm in norms), norms
    raw = [torch.linalg.matrix_norm(c.parametrizations.weight.original.detach().flatten(1), 2) for c in bounded]
    assert min(raw) > 3, "the weights themselves must be far from the bound for it to mean anything"


@CLASSES
def test_evaluation_is_repeatable_and_changes_nothing(make: Discriminator) -> None:
    model = make(2).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(model(image), model(image))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, kind: AdversarialLoss) -> None:
    for step in steps:
        real, fake = images(step)
        optimizer.zero_grad()
        discriminator_loss(kind, model(real), model(fake)).backward()
        optimizer.step()


def images(seed: int) -> tuple[Tensor, Tensor]:
    """Smooth images, and noise, as the real and the fake of a toy."""
    random = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(4, 3, 2, 2, generator=random), scale_factor=8, mode="bilinear")
    return smooth, torch.rand(4, 3, 16, 16, generator=random)


@CLASSES
def test_a_discriminator_resumes_exactly_from_its_state(make: Discriminator) -> None:
    unbroken = make(2)
    optimizer = torch.optim.Adam(unbroken.parameters(), 1e-3)
    learn(unbroken, optimizer, range(3), "vanilla")
    file = io.BytesIO()
    torch.save({"model": unbroken.state_dict(), "optimizer": optimizer.state_dict()}, file)
    learn(unbroken, optimizer, range(3, 6), "vanilla")

    torch.manual_seed(7)
    resumed = make(2)
    optimizer = torch.optim.Adam(resumed.parameters(), 1e-3)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    learn(resumed, optimizer, range(3, 6), "vanilla")
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in unbroken.state_dict().items())


@CLASSES
@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminator_learns_to_distinguish_noise_from_smooth_images(
    kind: AdversarialLoss, make: Discriminator
) -> None:
    model = make(16)
    steps = 30 if make is UNetDiscriminator else 90  # four logits per image have a smaller gradient than 256
    learn(model, torch.optim.Adam(model.parameters(), 1e-3), range(steps), kind)
    model.eval()
    real, fake = images(1000)  # never seen
    with torch.no_grad():
        of_real, of_fake = model(real).mean(dim=(1, 2, 3)), model(fake).mean(dim=(1, 2, 3))
        loss = discriminator_loss(kind, model(real), model(fake))
    assert float(of_real.min()) > float(of_fake.max()) + 0.5
    assert float(loss) < 0.5


def test_norms_are_taken_in_full_precision_under_autocast() -> None:
    model = UNetDiscriminator(2)
    autocast: list[bool] = []
    for conv in [*model.down, *model.up, *model.refine]:
        conv.parametrizations.weight[0].register_forward_pre_hook(
            lambda *_: autocast.append(torch.is_autocast_enabled("cpu"))
        )
    with torch.autocast("cpu", torch.bfloat16):
        verdict = model(torch.rand(1, 3, 8, 8))
    assert autocast == [False] * 8
    assert verdict.dtype == torch.bfloat16, "the convolutions themselves are to be fast"
