"""Projection with the channel modulation of DSCA, whose factors are computed where they are used.

    gamma, beta = guidance(mu)
    out = residual + (1 + gamma) · linear(x) + beta

``x`` is the result of attention and ``mu`` the posterior mean of the degradation field; ``guidance`` is a linear layer
with C or 2 · C outputs, in the first case without beta. A GPU computes gamma and beta in the registers that apply
them, so they take no memory. On a CPU the kernels of `savl.ops.convolution` do one layer after the other. The backward
pass computes gamma, beta and the projection again.

Source: the channel path of SAVL's degradation-guided attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from savl import ops
from savl.kernels.gpu import COMPILER
from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.convolution import autocasts
from savl.ops.library import CPP, TRITON
from savl.ops.op import Op, register
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import (
    check_same_device,
    check_same_dtype,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
)

OP = "guided_projection"
MOST_CHANNELS = 256
"""Largest number of channels of ``x`` and of ``mu`` for the Triton kernel, which holds both."""


def guided_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
    *,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Project features, and modulate the result channel by channel, guided by another map.

    Computes ``residual + (1 + gamma) · linear(x) + beta``, where gamma and beta are the outputs of a linear layer of
    ``mu``.

    Args:
        x: ``(B, H, W, K)`` floating, K ≥ 1.
        weight: ``(C, K)``, dtype of ``x`` or float32; under autocast any floating one. The same holds for the other
            parameters.
        bias: ``(C,)``.
        residual: ``(B, H, W, C)``, dtype of ``x``; under autocast any floating one.
        mu: ``(B, H, W, R)``, dtypes as for ``residual``.
        guidance_weight: ``(2 · C, R)``, for gamma and beta; or ``(C, R)`` for gamma alone.
        guidance_bias: ``(2 · C,)`` or ``(C,)``.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`. Where no fused kernel
            serves, and under autocast, those of `savl.ops.convolution` may.

    Returns:
        ``(B, H, W, C)``, dtype of ``residual``.

    Raises:
        TypeError: An argument is not a floating-point tensor, or dtypes are incompatible.
        ValueError: Shapes or devices are incompatible.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    tensors = (x, weight, bias, residual, mu, guidance_weight, guidance_bias)
    _validate(*tensors)
    if not autocasts(x) and serves(GUIDED_PROJECTION, kernels, *tensors):
        fused: Tensor = torch.ops.savl.guided_projection(*tensors)
        return fused
    return _compose(*tensors, kernels)


def guided_projection_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
) -> Tensor:
    """Compute `guided_projection` by operations of torch: the reference."""
    return _compose(x, weight, bias, residual, mu, guidance_weight, guidance_bias, KernelSettings.of(False))


def _compose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
    kernels: KernelSettings | None,
) -> Tensor:
    gamma, beta = _halves(ops.convolution(mu, guidance_weight, guidance_bias, kernels=kernels), weight.shape[0])
    return ops.convolution(x, weight, bias, residual=residual, gamma=gamma, beta=beta, kernels=kernels)


def _halves(guidance: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return gamma, and beta if there is one."""
    if guidance.shape[-1] == channels:
        return guidance, None
    gamma, beta = guidance.chunk(2, dim=-1)
    return gamma, beta


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
) -> None:
    check_tensor(OP, "x", x, "(B, H, W, K)")
    check_tensor(OP, "weight", weight, "(C, K)")
    check_tensor(OP, "mu", mu, "(B, H, W, R)")
    check_tensor(OP, "guidance_weight", guidance_weight, "(outputs, R)")
    image, (channels, inner), outputs = tuple(x.shape[:3]), weight.shape, guidance_weight.shape[0]
    if 0 in (channels, inner, mu.shape[3]):
        raise ValueError(f"{OP}: x, weight and mu must have one channel or more")
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"{OP}: guidance_weight must have {channels} or {2 * channels} outputs, got {outputs}")
    parameters = {
        "weight": (weight, (channels, x.shape[3])),
        "bias": (bias, (channels,)),
        "guidance_weight": (guidance_weight, (outputs, mu.shape[3])),
        "guidance_bias": (guidance_bias, (outputs,)),
    }
    features = {"residual": (residual, (*image, channels)), "mu": (mu, (*image, mu.shape[3]))}
    for name, (value, shape) in (parameters | features).items():
        check_tensor(OP, name, value, f"({', '.join(map(str, shape))})")
        check_shape(OP, name, value, shape, "channels of its neighbours")
    if not autocasts(x):
        check_same_dtype(OP, "x", x, **{name: value for name, (value, _) in features.items()})
        check_same_dtype_or_float32(OP, "x", x, **{name: value for name, (value, _) in parameters.items()})
    check_same_device(OP, "x", x, **{name: value for name, (value, _) in (parameters | features).items()})


# The op that the fused kernels implement.


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *others: Tensor) -> Tensor:
    return x.new_empty(residual.shape)


def _layers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute layer by layer; return the result, gamma, and with ``keep`` the projection before the modulation."""
    plain = (1, 0, 0.0, 0.0)  # dilation, activation, slope and eps
    guidance, _ = torch.ops.savl.convolution(mu, guidance_weight, guidance_bias, *[None] * 6, *plain, False, False)
    gamma, beta = _halves(guidance, weight.shape[0])
    modulation = (residual, gamma, beta, None)
    out, kept = torch.ops.savl.convolution(x, weight, bias, None, None, *modulation, *plain, keep, False)
    return out, gamma, kept


def _compute(*tensors: Tensor) -> Tensor:
    """Compute the op on a CPU with the kernels of ``savl::convolution``."""
    return _layers(*tensors, keep=False)[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return (*torch.ops.savl.guided_projection_backward(grad, *ctx.saved_tensors),)


def _fake_backward(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in tensors)


def _compute_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
) -> tuple[Tensor, ...]:
    """Compute the gradients layer by layer, after computing the layers again."""
    given = (x, weight, bias, residual, mu, guidance_weight, guidance_bias)
    _, gamma, kept = _layers(*given, keep=True)
    plain = (1, 0, 0.0, 0.0, False)
    three = [True, True, True, *[False] * 6]
    found = torch.ops.savl.convolution_backward(
        grad, x, weight, None, None, gamma, None, kept, *plain, [*three[:6], True, False, False]
    )
    grad_guidance = found[5]
    if guidance_weight.shape[0] > weight.shape[0]:
        grad_guidance = torch.cat((grad_guidance, grad), -1)
    of_guidance = torch.ops.savl.convolution_backward(
        grad_guidance, mu, guidance_weight, None, None, None, None, grad.new_empty(0), *plain, three
    )
    gradients = (*found[:3], grad.clone(), *of_guidance[:3])
    return tuple(each.to(to.dtype).contiguous() for each, to in zip(gradients, given, strict=True))


# Cases for tests and benchmarks


def guided_projection_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    height: int = 8,
    width: int = 12,
    inner: int = 48,
    channels: int = 48,
    latent: int = 64,
    shift: bool = False,
    seed: int = 0,
) -> Case:
    """Return a case; ``shift`` says whether there is a beta."""
    draw = Draw(dtype, seed)
    image, outputs = (batch, height, width), 2 * channels if shift else channels
    arguments: dict[str, Tensor | None] = {
        "x": draw.normal(*image, inner),
        "weight": draw.normal(channels, inner) / inner**0.5,
        "bias": draw.normal(channels),
        "residual": draw.normal(*image, channels),
        "mu": draw.normal(*image, latent),
        "guidance_weight": draw.normal(outputs, latent) / latent**0.5,
        "guidance_bias": draw.normal(outputs),
    }
    terms = max(inner + latent, batch * height * width) + channels
    return Case(OP, arguments, {}, terms, f"{channels} channels, {latent} guide{', shift' if shift else ''}")


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """The end of a DSCA of savl-base."""
    made = guided_projection_case(draw.dtype, height=side, width=side, inner=144, channels=144, seed=draw.seed)
    pixels = float(side * side)
    moved, flops = pixels * (3 * 144 + 64) * draw.dtype.itemsize, 2 * pixels * 144 * (144 + 64)
    return BenchmarkProblem(made.arguments, {}, moved, 2 * moved, flops, 3 * flops)


def _triton_limit(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, mu: Tensor, *others: Tensor) -> str | None:
    for name, channels in (("x", x.shape[3]), ("mu", mu.shape[3])):
        if channels > MOST_CHANNELS:
            return f"{name} has {channels} channels, more than {MOST_CHANNELS}"
    if x.dtype == torch.float32 and COMPILER == "hip":
        return "float32 does not fit into the registers of all AMD GPUs"
    return None


_SMALL = {"height": 4, "width": 5, "inner": 19, "channels": 21, "latent": 7}
GUIDED_PROJECTION = register(
    Op(
        name=OP,
        function=guided_projection,
        reference=guided_projection_reference,
        backends={TRITON: _triton_limit, CPP: None},
        schema="guided_projection(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor mu, "
        "Tensor guidance_weight, Tensor guidance_bias) -> Tensor",
        backward_schema="guided_projection_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, "
        "Tensor residual, Tensor mu, Tensor guidance_weight, Tensor guidance_bias) -> "
        f"({', '.join(['Tensor'] * 7)})",
        fake=_fake,
        fake_backward=_fake_backward,
        forward_on_cpu=_compute,
        calls=("convolution",),
        backward_in_torch=_compute_backward,
        decomposition=guided_projection_reference,
        setup_context=_setup_context,
        backward=_backward,
        case=guided_projection_case,
        full_cases=({"inner": 144, "channels": 144}, {"inner": 48, "channels": 48, "shift": True}),
        quick_cases=({**_SMALL, "shift": True}, {}),
        small_cases=(_SMALL, {**_SMALL, "shift": True}),
        tiny_cases=({"height": 2, "width": 2, "inner": 2, "channels": 2, "latent": 3, "shift": True},),
        interpreter_cases=({**_SMALL, "shift": True}, {"height": 3, "width": 5}),
        title="guided projection",
        benchmark=_benchmark,
    )
)
