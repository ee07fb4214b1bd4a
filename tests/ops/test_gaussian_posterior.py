"""Compare sample, KL divergence and severity of the Gaussian posterior with torch.distributions and statistics."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from savl.ops import KernelSettings, gaussian_posterior, normalise_severity, variance_statistics
from savl.ops.gaussian_posterior import SEVERITY_EPS, SEVERITY_MAX
from savl.ops.philox import standard_normal

SHAPE = (2, 5, 4, 7)


def posterior_parameters(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    mu = torch.randn(SHAPE, dtype=torch.float64)
    logvar = torch.randn(SHAPE, dtype=torch.float64)
    return mu.to(dtype), logvar.to(dtype)


def with_variance(variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mu and logvar of a two-channel field with the given variance of each pixel, ``(B, H, W)``."""
    logvar = torch.stack((variance * 0.5, variance * 1.5), dim=1).log()
    return torch.zeros_like(logvar), logvar


# Sample


def test_the_sample_is_reparameterized() -> None:
    mu, logvar = posterior_parameters()
    eps = torch.randn(SHAPE, dtype=torch.float64)
    sample = gaussian_posterior(mu, logvar, eps).sample
    torch.testing.assert_close(sample, mu + torch.sqrt(torch.exp(logvar)) * eps)


def test_without_noise_the_sample_is_the_mean() -> None:
    mu, logvar = posterior_parameters()
    assert torch.equal(gaussian_posterior(mu, logvar).sample, mu)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_seeded_noise_is_that_of_philox(seed: int) -> None:
    mu, logvar = posterior_parameters(torch.float32)
    seeded = gaussian_posterior(mu, logvar, seed=seed)
    assert torch.equal(seeded.sample, gaussian_posterior(mu, logvar, standard_normal(SHAPE, seed)).sample)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("offset", [0, 1, 2**32 - 1, 2**62 - 64])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 5, 3, 90), (3, 4, 1, 6)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels-last"])
def test_the_kernel_draws_the_same_noise_as_philox(
    layout: torch.memory_format, shape: tuple[int, ...], seed: int, offset: int
) -> None:
    zeros = torch.zeros(shape).contiguous(memory_format=layout)
    kernels = KernelSettings.of("cpp")
    sample = gaussian_posterior(zeros, zeros, seed=seed, offset=offset, kernels=kernels).sample
    assert torch.equal(sample, standard_normal(shape, seed, offset=offset)), "mu = logvar = 0: the sample is the noise"


def test_an_offset_skips_random_numbers_of_a_seed() -> None:
    mu, logvar = posterior_parameters(torch.float32)
    shifted = gaussian_posterior(mu, logvar, seed=3, offset=2)
    assert torch.equal(shifted.sample, gaussian_posterior(mu, logvar, standard_normal(SHAPE, 3, offset=2)).sample)
    assert not torch.equal(shifted.sample, gaussian_posterior(mu, logvar, seed=3).sample)


@pytest.mark.parametrize(
    ("offset", "error", "fragments"),
    [(-1, ValueError, ["-1", "2**62"]), (2**62, ValueError, [str(2**62)]), (1.0, TypeError, ["float", "int"])],
    ids=["negative", "too-large", "float"],
)
def test_a_bad_offset_is_reported(offset: Any, error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        gaussian_posterior(*posterior_parameters(), seed=1, offset=offset)
    missing = [f for f in ["gaussian_posterior", "offset", *fragments] if f not in str(caught.value)]
    assert not missing, f"the message does not contain {missing}: {caught.value}"


def test_a_seed_leaves_the_global_generator_unchanged() -> None:
    before = torch.get_rng_state()
    gaussian_posterior(*fixed_posterior_parameters(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def fixed_posterior_parameters() -> tuple[Tensor, Tensor]:
    mu = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)
    return mu, -mu


def test_seeded_samples_have_the_mean_and_the_variance_of_the_posterior() -> None:
    count = 40_000
    mu = torch.full((1, 1, 1, count), 0.7, dtype=torch.float64)
    logvar = torch.full_like(mu, math.log(0.25))
    sample = gaussian_posterior(mu, logvar, seed=11).sample
    # Five standard errors of each estimate.
    assert float(sample.mean()) == pytest.approx(0.7, abs=5 * 0.5 / math.sqrt(count))
    assert float(sample.var()) == pytest.approx(0.25, abs=5 * 0.25 * math.sqrt(2 / count))


def test_noise_changes_the_sample_and_nothing_else() -> None:
    mu, logvar = posterior_parameters()
    quiet, noisy = gaussian_posterior(mu, logvar), gaussian_posterior(mu, logvar, seed=5)
    assert not torch.equal(quiet.sample, noisy.sample)
    for name in ("kl", "severity", "variance", "variance_mean", "variance_var"):
        assert torch.equal(getattr(quiet, name), getattr(noisy, name)), name


# KL divergence


def test_kl_equals_kl_divergence_of_torch_distributions() -> None:
    mu, logvar = posterior_parameters()
    expected = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(gaussian_posterior(mu, logvar).kl, expected)


def test_kl_of_the_prior_is_zero() -> None:
    zeros = torch.zeros(SHAPE)
    assert torch.equal(gaussian_posterior(zeros, zeros).kl, torch.zeros(2, 4, 7))


# Severity


def test_variance_of_a_pixel_is_the_mean_over_channels() -> None:
    mu, logvar = posterior_parameters()
    pixel = gaussian_posterior(mu, logvar).variance[1, 2, 3]
    assert float(pixel) == pytest.approx(statistics.fmean(math.exp(value) for value in logvar[1, :, 2, 3].tolist()))


def test_severity_is_computed_from_the_statistics_of_the_whole_image() -> None:
    mu, logvar = posterior_parameters()
    posterior = gaussian_posterior(mu, logvar)
    for image in range(SHAPE[0]):
        pixels = posterior.variance[image].flatten().tolist()
        mean, variance = statistics.fmean(pixels), statistics.pvariance(pixels)
        assert float(posterior.variance_mean[image]) == pytest.approx(mean)
        assert float(posterior.variance_var[image]) == pytest.approx(variance)
        expected = [min(max(1 - (v - mean) / (variance + SEVERITY_EPS), 0.0), SEVERITY_MAX) for v in pixels]
        assert posterior.severity[image].flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("variance", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_severity_of_a_uniform_field_is_one(variance: float, dtype: torch.dtype) -> None:
    logvar = torch.full((1, 8, 5, 6), math.log(variance), dtype=dtype)
    severity = gaussian_posterior(torch.zeros_like(logvar), logvar).severity
    # The variance of a pixel and its mean have a few rounding errors each. Their difference is divided by at least ε.
    tolerance = 8 * variance * torch.finfo(severity.dtype).eps / SEVERITY_EPS
    torch.testing.assert_close(severity, torch.ones_like(severity), rtol=0, atol=tolerance)


def test_severity_of_a_single_pixel_is_one() -> None:
    mu, logvar = torch.randn(3, 4, 1, 1), torch.randn(3, 4, 1, 1)
    assert torch.equal(gaussian_posterior(mu, logvar).severity, torch.ones(3, 1, 1))


def test_severity_falls_as_variance_rises() -> None:
    mu, logvar = with_variance(torch.tensor([[[0.2, 0.4], [0.6, 0.8]]], dtype=torch.float64))
    severity = gaussian_posterior(mu, logvar).severity.flatten().tolist()
    assert severity == sorted(severity, reverse=True)
    assert len(set(severity)) == 4, f"no value should be clamped: {severity}"


def test_severity_is_clamped_to_its_range() -> None:
    variance = torch.full((1, 10, 10), 1.0, dtype=torch.float64)
    variance[0, 0, 0], variance[0, 9, 9] = 2.0, 1e-6
    severity = gaussian_posterior(*with_variance(variance)).severity
    assert float(severity[0, 0, 0]) == 0.0
    assert float(severity[0, 9, 9]) == SEVERITY_MAX


def test_images_of_a_batch_have_their_own_statistics() -> None:
    mu, logvar = posterior_parameters()
    logvar[1] += 3.0
    both = gaussian_posterior(mu, logvar)
    for image in range(SHAPE[0]):
        alone = gaussian_posterior(mu[image : image + 1], logvar[image : image + 1])
        torch.testing.assert_close(both.severity[image], alone.severity[0], rtol=0, atol=1e-12)


def test_severity_of_a_tile_with_the_statistics_of_the_image_equals_that_part_of_its_severity() -> None:
    posterior = gaussian_posterior(*posterior_parameters())
    mean, var = variance_statistics(posterior.variance)
    tile = normalise_severity(posterior.variance[:, 1:3, 2:6], mean, var)
    assert torch.equal(tile, posterior.severity[:, 1:3, 2:6])
    own = normalise_severity(posterior.variance[:, 1:3, 2:6], *variance_statistics(posterior.variance[:, 1:3, 2:6]))
    assert not torch.allclose(own, tile), "the statistics of the tile and of the image must differ"


# Dtypes, memory layout and gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [None, 3])
def test_the_sample_has_the_dtype_of_mu_and_other_outputs_have_at_least_float32(
    dtype: torch.dtype, seed: int | None
) -> None:
    posterior = gaussian_posterior(*posterior_parameters(dtype), seed=seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in posterior._asdict().items():
        assert value.dtype == (dtype if name == "sample" else wide), name
        assert torch.isfinite(value).all(), name


def test_kl_near_the_prior_is_accurate() -> None:
    # mu² + exp(logvar) − 1 − logvar is about 1e-8 here. Adding its terms in float32 would lose all significant digits.
    small = torch.full((1, 4, 1, 1), 1e-4)
    exact = 4 * 0.5 * (1e-8 + math.expm1(1e-4) - 1e-4)
    assert float(gaussian_posterior(small, small).kl) == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_differs_from_float64_by_rounding_errors_only(dtype: torch.dtype) -> None:
    mu, logvar = posterior_parameters(dtype)
    exact = gaussian_posterior(mu.double(), logvar.double(), seed=3)
    rounded = gaussian_posterior(mu, logvar, seed=3)
    # The sample is rounded four times in its dtype, at values of at most |mu| + exp(logvar/2)·|eps|. The others are
    # float32 sums over the channels, with two roundings per channel, of values no larger than the largest term.
    channels = SHAPE[1]
    largest_noise = float(standard_normal(SHAPE, 3).abs().max())
    largest_sample = float(mu.abs().max()) + float((logvar / 2).exp().max()) * largest_noise
    largest_term = float(mu.double().square().max() + logvar.double().exp().max() + logvar.double().abs().max())
    bounds = {
        "sample": 4 * torch.finfo(dtype).eps * largest_sample,
        "kl": (channels + 4) * channels * torch.finfo(torch.float32).eps * largest_term,
        "variance": (channels + 4) * torch.finfo(torch.float32).eps * largest_term,
    }
    for name, bound in bounds.items():
        error = float((getattr(rounded, name).double() - getattr(exact, name)).abs().max())
        assert error <= bound, f"the error of {name}, {error:.3g}, exceeds the bound on rounding errors {bound:.3g}"


def test_inputs_in_any_memory_layout_give_the_same_output() -> None:
    mu, logvar = posterior_parameters()
    both = torch.stack((mu, logvar), dim=-1)
    channels_last = logvar.contiguous(memory_format=torch.channels_last)
    expected = gaussian_posterior(mu, logvar, seed=1)
    strided = gaussian_posterior(both[..., 0], channels_last, seed=1)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(strided, name), value, rtol=0, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch warns that the variance of an empty tensor is undefined
def test_an_empty_batch_gives_empty_outputs() -> None:
    empty = torch.zeros(0, 5, 4, 7, requires_grad=True)
    posterior = gaussian_posterior(empty, empty, seed=0)
    assert posterior.sample.shape == (0, 5, 4, 7)
    assert posterior.severity.shape == posterior.kl.shape == posterior.variance.shape == (0, 4, 7)
    assert posterior.variance_mean.shape == posterior.variance_var.shape == (0,)
    posterior.kl.sum().backward()
    assert empty.grad is not None


def test_gradients_equal_finite_differences() -> None:
    variance = 0.5 + 0.3 * torch.rand(2, 2, 3, dtype=torch.float64)  # severity is not clamped
    mu, logvar = with_variance(variance)
    eps = torch.randn_like(mu)
    severity = gaussian_posterior(mu, logvar).severity
    assert 0 < float(severity.min()) < float(severity.max()) < SEVERITY_MAX
    tensors = [value.requires_grad_() for value in (mu, logvar, eps)]
    assert torch.autograd.gradcheck(lambda *t: tuple(gaussian_posterior(*t)), tensors)


def test_gradients_reach_both_parameters_through_a_seeded_sample() -> None:
    mu, logvar = (value.requires_grad_() for value in posterior_parameters())
    gaussian_posterior(mu, logvar, seed=4).sample.sum().backward()
    noise = standard_normal(SHAPE, 4).double()
    torch.testing.assert_close(mu.grad, torch.ones_like(mu))
    torch.testing.assert_close(logvar.grad, 0.5 * torch.exp(logvar.detach() / 2) * noise)


# Error messages name the argument, its value, and the accepted values


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        pytest.param({"mu": 1.0}, TypeError, ["mu", "float", "(B, R, H, W)"], id="mu-no-tensor"),
        pytest.param({"mu": torch.zeros(5, 4, 7)}, ValueError, ["mu", "(5, 4, 7)", "4 dimensions"], id="mu-3d"),
        pytest.param({"mu": torch.zeros(SHAPE, dtype=torch.int32)}, TypeError, ["mu", "int32", "float32"], id="mu-int"),
        pytest.param({"mu": torch.zeros(2, 0, 4, 7)}, ValueError, ["mu", "(2, 0, 4, 7)", "channel"], id="no-channel"),
        pytest.param({"mu": torch.zeros(2, 5, 0, 7)}, ValueError, ["mu", "(2, 5, 0, 7)", "pixel"], id="no-row"),
        pytest.param({"mu": torch.zeros(2, 5, 4, 0)}, ValueError, ["mu", "(2, 5, 4, 0)", "pixel"], id="no-column"),
        pytest.param({"logvar": None}, TypeError, ["logvar", "NoneType", "(B, R, H, W)"], id="logvar-none"),
        pytest.param(
            {"logvar": torch.zeros(2, 5, 4, 6)}, ValueError, ["logvar", "(2, 5, 4, 6)", str(SHAPE)], id="logvar-shape"
        ),
        pytest.param(
            {"logvar": torch.zeros(SHAPE, dtype=torch.bfloat16)},
            TypeError,
            ["logvar", "bfloat16", "float32"],
            id="logvar-dtype",
        ),
        pytest.param(
            {"logvar": torch.zeros(SHAPE, device="meta")}, ValueError, ["logvar", "meta", "cpu"], id="logvar-device"
        ),
        pytest.param({"eps": torch.zeros(SHAPE[1:])}, ValueError, ["eps", "(5, 4, 7)", "4 dimensions"], id="eps-3d"),
        pytest.param({"eps": torch.zeros(1, 5, 4, 7)}, ValueError, ["eps", "(1, 5, 4, 7)", str(SHAPE)], id="eps-shape"),
        pytest.param(
            {"eps": torch.zeros(SHAPE, dtype=torch.float64)}, TypeError, ["eps", "float64", "float32"], id="eps-dtype"
        ),
        pytest.param({"eps": torch.zeros(SHAPE), "seed": 1}, ValueError, ["eps or seed", "not both"], id="both"),
        pytest.param({"seed": 1.0}, TypeError, ["seed", "float", "int"], id="seed-float"),
        pytest.param({"seed": True}, TypeError, ["seed", "bool", "int"], id="seed-bool"),
        pytest.param({"seed": -1}, ValueError, ["seed", "got -1", "0 <= seed < 2**64"], id="seed-negative"),
        pytest.param({"seed": 2**64}, ValueError, ["seed", str(2**64), "0 <= seed < 2**64"], id="seed-too-large"),
    ],
)
def test_a_bad_argument_is_reported(changes: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    valid: dict[str, Any] = {"mu": torch.zeros(SHAPE), "logvar": torch.zeros(SHAPE)}
    with pytest.raises(error) as caught:
        gaussian_posterior(**{**valid, **changes})
    missing = [f for f in ["gaussian_posterior", *fragments] if f not in str(caught.value)]
    assert not missing, f"the message does not contain {missing}: {caught.value}"
