r"""The Gaussian posterior of the degradation field: sample, divergence and severity in one op.

With q(r | y) = N(mu, exp(logvar)) at every pixel u and the prior N(0, I) over R channels:

    sample     r = mu + exp(logvar / 2) · eps                          reparameterized (Kingma & Welling, 2014)
    kl(u)        = ½ Σ_c (mu² + exp(logvar) − 1 − logvar)              nats per pixel
    v(u)         = mean_c exp(logvar_c(u))                             per-pixel variance
    severity s(u) = clamp(1 − (v(u) − mean_u v) / (Var_u[v] + ε), 0, 2)

Mean and (biased) variance over u are those of the whole image. A uniform field has s = 1 everywhere; a pixel
whose degradation is known better than average has s > 1. Source: SAVL (ICLR 2026); the ε and the clamp are ours,
the paper divides by Var[v], which a uniform image makes zero.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, CUDA
from savl.ops.op import Op, register
from savl.ops.philox import standard_normal
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import check_int, check_same_device, check_same_dtype, check_shape, check_tensor

OP = "gaussian_posterior"

SEVERITY_EPS = 0.1
"""ε beside Var[v]. A field whose variances differ by much less than √ε is treated as uniform instead of having its
rounding noise blown up to the clamp; the steepest slope of s against v is 1/ε."""

SEVERITY_MAX = 2.0
"""Upper end of the severity clamp (the lower end is 0)."""


class GaussianPosterior(NamedTuple):
    """The result of `gaussian_posterior`. The sample has the dtype of mu, the rest float32 (float64 for float64)."""

    sample: Tensor
    """``(B, R, H, W)`` reparameterized sample r; mu itself when neither eps nor seed was given."""
    kl: Tensor
    """``(B, H, W)`` divergence from the prior in nats, summed over the R channels."""
    severity: Tensor
    """``(B, H, W)`` in [0, 2], normalised over the whole image."""
    variance: Tensor
    """``(B, H, W)`` per-pixel variance v."""
    variance_mean: Tensor
    """``(B,)`` mean of v over the image."""
    variance_var: Tensor
    """``(B,)`` biased variance of v over the image."""


def gaussian_posterior(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None = None,
    *,
    seed: int | None = None,
    offset: int = 0,
    kernels: KernelSettings | None = None,
) -> GaussianPosterior:
    """Sample the posterior and measure it.

    Args:
        mu: ``(B, R, H, W)`` floating posterior mean.
        logvar: ``(B, R, H, W)``, same dtype: log-variance.
        eps: ``(B, R, H, W)``, same dtype: standard normal noise. Give eps or seed, or neither for r = mu.
        seed: 0 ≤ seed < 2**64: noise from the counter-based generator of `savl.ops.philox`, the same stream on
            every device and any number of threads.
        offset: Where in the stream of ``seed`` to begin, in counters of four numbers each, 0 ≤ offset < 2**62.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        A `GaussianPosterior`.

    Raises:
        TypeError: An argument is not a tensor, not floating, or dtypes differ; seed or offset is not an int.
        ValueError: Shapes or devices differ, there is no channel or no pixel, eps and seed are both given, or seed or
            offset is out of range.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    check_tensor(OP, "mu", mu, "(B, R, H, W)")
    if 0 in mu.shape[1:]:
        raise ValueError(
            f"{OP}: mu must have at least one channel and one pixel (R, H, W >= 1), got shape {tuple(mu.shape)}"
        )
    check_tensor(OP, "logvar", logvar, "(B, R, H, W)")
    check_shape(OP, "logvar", logvar, tuple(mu.shape), "that of mu")
    if eps is not None:
        check_tensor(OP, "eps", eps, "(B, R, H, W)")
        check_shape(OP, "eps", eps, tuple(mu.shape), "that of mu")
        if seed is not None:
            raise ValueError(f"{OP}: give eps or seed, not both")
    if seed is not None:
        check_int(OP, "seed", seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"{OP}: seed must satisfy 0 <= seed < 2**64, got {seed}")
    check_int(OP, "offset", offset)
    if not 0 <= offset < 2**62:
        raise ValueError(f"{OP}: offset must satisfy 0 <= offset < 2**62, got {offset}")
    check_same_dtype(OP, "mu", mu, logvar=logvar, eps=eps)
    check_same_device(OP, "mu", mu, logvar=logvar, eps=eps)
    if serves(GAUSSIAN_POSTERIOR, kernels, mu, logvar, eps):
        signed = seed if seed is None or seed < 2**63 else seed - 2**64  # the same 64 bits
        sample, *measures = torch.ops.savl.gaussian_posterior(
            mu, logvar, eps, signed, offset, SEVERITY_EPS, SEVERITY_MAX
        )
        return GaussianPosterior(mu if eps is None and seed is None else sample, *measures)
    return gaussian_posterior_reference(mu, logvar, eps, seed=seed, offset=offset)


def gaussian_posterior_reference(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, *, seed: int | None, offset: int = 0
) -> GaussianPosterior:
    """Compute `gaussian_posterior` by operations of torch: the reference."""
    if seed is not None:
        eps = standard_normal(tuple(mu.shape), seed, offset=offset, device=mu.device).to(mu.dtype)
    sample = mu if eps is None else mu + torch.exp(0.5 * logvar) * eps
    # Near the prior the terms of the divergence cancel: below float32 their rounding would drown the result.
    mu, logvar = _widen(mu), _widen(logvar)
    channel_variance = logvar.exp()
    kl = 0.5 * (mu.square() + torch.expm1(logvar) - logvar).sum(dim=1)
    variance = channel_variance.mean(dim=1)
    mean, var = variance_statistics(variance)
    severity = normalise_severity(variance, mean, var)
    return GaussianPosterior(sample, kl, severity, variance, mean, var)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def variance_statistics(variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the per-pixel variance over the whole image.

    Args:
        variance: ``(B, H, W)``.

    Returns:
        Two ``(B,)`` tensors, float32 (float64 for float64 input).
    """
    var, mean = torch.var_mean(_widen(variance), dim=(1, 2), correction=0)
    return mean, var


def normalise_severity(variance: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Turn per-pixel variance into severity with the statistics of the whole image.

    Args:
        variance: ``(B, H, W)``, the whole image or a part of it.
        mean: ``(B,)`` mean over the whole image.
        var: ``(B,)`` biased variance over the whole image.

    Returns:
        ``(B, H, W)`` in [0, 2], dtype of ``variance``.
    """
    centred = variance.to(mean.dtype) - mean[:, None, None]
    severity = 1 - centred / (var[:, None, None] + SEVERITY_EPS)
    return severity.clamp(0.0, SEVERITY_MAX).to(variance.dtype)


# The op that fused kernels implement. Its sample is empty where there is neither eps nor seed: an op may not return its
# input.


def _decomposition(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    seed: int | None,
    offset: int,
    severity_eps: float,
    severity_max: float,
) -> tuple[Tensor, ...]:
    assert (severity_eps, severity_max) == (SEVERITY_EPS, SEVERITY_MAX)
    unsigned = None if seed is None else seed % 2**64
    sample, *measures = gaussian_posterior_reference(mu, logvar, eps, seed=unsigned, offset=offset)
    return mu.new_empty(0) if eps is None and seed is None else sample, *measures


def _empty_field(mu: Tensor) -> Tensor:
    """Return an empty sample: in channels-last layout if mu has it, as in the kernel."""
    interleaved = mu.stride(1) == 1 and mu.stride(3) != 1
    return torch.empty(
        mu.shape,
        dtype=mu.dtype,
        device=mu.device,
        memory_format=torch.channels_last if interleaved else torch.contiguous_format,
    )


def _fake(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    seed: int | None,
    offset: int,
    severity_eps: float,
    severity_max: float,
) -> tuple[Tensor, ...]:
    batch, _, height, width = mu.shape
    wide = torch.float64 if mu.dtype == torch.float64 else torch.float32
    sample = mu.new_empty(0) if eps is None and seed is None else _empty_field(mu)
    maps = [mu.new_empty(batch, height, width, dtype=wide) for _ in range(3)]
    return sample, *maps, mu.new_empty(batch, dtype=wide), mu.new_empty(batch, dtype=wide)


def _fake_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    grad_variance: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    seed: int | None,
    offset: int,
    wants_grad_eps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_eps = _empty_field(mu) if wants_grad_eps and grad_sample is not None else mu.new_empty(0)
    return _empty_field(mu), _empty_field(mu), grad_eps


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mu, logvar, eps, ctx.seed, ctx.offset, ctx.severity_eps, ctx.severity_max = inputs
    _, _, _, variance, mean, var = output
    ctx.save_for_backward(mu, logvar, eps, variance, mean, var)
    ctx.set_materialize_grads(False)


def _sum(so_far: Tensor | None, term: Tensor) -> Tensor:
    return term if so_far is None else so_far + term


def _backward(
    ctx: Any,
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    grad_severity: Tensor | None,
    grad_variance: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
) -> tuple[Tensor | None, ...]:
    mu, logvar, eps, variance, mean, var = ctx.saved_tensors
    if eps is None and ctx.seed is None:
        grad_sample = None  # the sample is an empty tensor
    # The maps are small beside the field: plain tensor arithmetic takes their gradients back to the variance.
    pixels = variance.shape[1] * variance.shape[2]
    centred = variance - mean[:, None, None]
    scale = (var + ctx.severity_eps)[:, None, None]
    # An output without a gradient adds nothing, not 0 times its value: for an infinite variance that would be NaN.
    total, to_mean, to_var = grad_variance, grad_mean, grad_var
    if grad_severity is not None:
        severity = 1 - centred / scale
        inside = (severity >= 0) & (severity <= ctx.severity_max)
        slope = torch.where(inside, grad_severity, 0) / scale
        total = _sum(total, -slope)
        to_mean = _sum(to_mean, slope.sum(dim=(1, 2)))
        to_var = _sum(to_var, (slope * centred / scale).sum(dim=(1, 2)))
    if to_mean is not None:
        total = _sum(total, (to_mean[:, None, None] / pixels).expand_as(variance))
    if to_var is not None:
        total = _sum(total, 2 * centred * to_var[:, None, None] / pixels)
    grad_mu, grad_logvar, grad_eps = torch.ops.savl.gaussian_posterior_backward(
        grad_sample, grad_kl, total, mu, logvar, eps, ctx.seed, ctx.offset, ctx.needs_input_grad[2]
    )
    wants_eps = ctx.needs_input_grad[2] and grad_sample is not None
    return grad_mu, grad_logvar, grad_eps if wants_eps else None, None, None, None, None


# Cases for tests and benchmarks


def gaussian_posterior_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    channels: int = 64,
    height: int = 24,
    width: int = 20,
    noise: str = "eps",
    seed: int = 0,
) -> Case:
    """Return a case of the posterior; ``noise`` is ``"eps"``, ``"seed"`` or ``"none"``.

    logvar is small, so that no severity comes near the ends of the clamp, where it has no derivative.
    """
    draw = Draw(dtype, seed)
    shape = (batch, channels, height, width)
    arguments: dict[str, Tensor | None] = {"mu": draw.normal(*shape), "logvar": 0.2 * draw.normal(*shape)}
    if noise == "eps":
        arguments["eps"] = draw.normal(*shape)
    options = {"seed": 5, "offset": 3} if noise == "seed" else {}
    terms = math.ceil((channels + height * width) / SEVERITY_EPS)  # severity is up to 1 / ε times as steep as variance
    return Case(OP, arguments, options, terms, f"noise: {noise}", GaussianPosterior._fields)


def _benchmark(draw: Draw, side: int, noise: bool = True) -> BenchmarkProblem:
    """The posterior of a field of 64 channels, with given noise, or with the mean as its sample."""
    names = ("mu", "logvar", "eps") if noise else ("mu", "logvar")
    arguments: dict[str, Tensor | None] = {name: 0.3 * draw.normal(1, 64, side, side) for name in names}
    mu = arguments["mu"]
    assert mu is not None
    size, maps = float(mu.nbytes), 4.0 * 3 * side**2
    # Backward reads mu, logvar, eps and the sample's gradient again, and writes the gradients of the arguments.
    moved, moved_backward = (4 * size, 7 * size) if noise else (2 * size, 4 * size)
    flops = 25.0 * mu.numel()
    return BenchmarkProblem(arguments, {}, moved + maps, moved_backward + maps, flops, 0.0, outputs=4)  # the maps


GAUSSIAN_POSTERIOR = register(
    Op(
        name=OP,
        function=gaussian_posterior,
        reference=gaussian_posterior_reference,
        backends={CUDA: None, CPP: None},
        schema="gaussian_posterior(Tensor mu, Tensor logvar, Tensor? eps, SymInt? seed, SymInt offset, "
        "float severity_eps, float severity_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward_schema="gaussian_posterior_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor? grad_variance, "
        "Tensor mu, Tensor logvar, Tensor? eps, SymInt? seed, SymInt offset, bool wants_grad_eps) "
        "-> (Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        decomposition=_decomposition,
        setup_context=_setup_context,
        backward=_backward,
        case=gaussian_posterior_case,
        full_cases=({"noise": "eps"}, {"noise": "seed"}, {"noise": "none", "channels": 5}),
        quick_cases=(
            {"height": 12, "width": 10},
            {"height": 12, "width": 10, "noise": "seed"},
            {"height": 12, "width": 10, "noise": "none", "channels": 5},
        ),
        small_cases=(
            {"channels": 9, "height": 3, "width": 7, "noise": "seed"},
            {"channels": 5, "height": 7, "width": 9},
            {"channels": 4, "height": 18, "width": 17, "noise": "none"},
        ),
        tiny_cases=tuple({"channels": 3, "height": 2, "width": 3, "noise": noise} for noise in ("eps", "seed", "none")),
        title="posterior",
        benchmark=_benchmark,
        benchmark_options=({"title": "posterior without noise", "noise": False},),
    )
)
