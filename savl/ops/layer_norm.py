"""Layer normalisation: every pixel's channels to mean 0 and variance 1, then scaled and shifted channel by channel.

    out = (x − mean) / √(variance + eps) · weight + bias

Before attention, before the MLPs and around the body; HAT and Swin have it as ``torch.nn.LayerNorm``. On a GPU torch
gives a pixel to a block of threads, most of which idle over the few channels of these networks; the Triton kernel
gives it many pixels.

Source: Ba, Kiros and Hinton, "Layer normalization" (2016).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.kernels.gpu import DEVICE
from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, TRITON
from savl.ops.op import Op, register
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import check_eps, check_same_device, check_same_dtype_or_float32, check_shape, check_tensor

OP = "layer_norm"
MOST_CHANNELS = 4096
"""Largest number of channels for the Triton kernel, whose programs keep all channels of a pixel in registers."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, kernels: KernelSettings | None = None
) -> Tensor:
    """Normalise over channels.

    Args:
        x: ``(B, H, W, C)`` floating, C ≥ 1.
        weight: ``(C,)``, dtype of ``x`` or float32; under CUDA's autocast any floating one.
        bias: ``(C,)``, with the same dtypes as ``weight``.
        eps: Added to the variance, ≥ 0.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        ``(B, H, W, C)``, dtype of ``x``; float32 under CUDA's autocast if ``x`` is narrower, as torch has it.
        Gradients have the dtypes of what they belong to.

    Raises:
        TypeError: An argument is not a floating-point tensor, dtypes are incompatible, or eps is not a number.
        ValueError: Shapes or devices are incompatible, or eps is negative or not finite.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    for name, value, shape in (("x", x, "(B, H, W, C)"), ("weight", weight, "(C)"), ("bias", bias, "(C)")):
        check_tensor(OP, name, value, shape)
    wide = x.device.type == DEVICE and x.dtype != torch.float64 and torch.is_autocast_enabled(DEVICE)
    if wide:  # CUDA's autocast has all of it in float32
        weight, bias = weight.float(), bias.float()
    _validate(x, weight, bias, eps)
    if serves(LAYER_NORM, kernels, x, weight, bias):
        fused: Tensor = torch.ops.savl.layer_norm(x, weight, bias, float(eps), wide)[0]
        return fused
    return layer_norm_reference(x, weight, bias, eps=float(eps))


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Compute `layer_norm` by torch's own function: the reference.

    On a GPU without autocast, torch takes no parameters of another dtype: there they are rounded to that of ``x``.
    """
    dtype, device = x.dtype, x.device.type
    mixed = device == "cpu" or (device != "meta" and torch.is_autocast_enabled(device))
    if dtype.itemsize == 2 and mixed:
        dtype = torch.promote_types(weight.dtype, bias.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight.to(dtype), bias.to(dtype), eps)


def _validate(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    channels = x.shape[-1]
    if channels == 0:
        raise ValueError(f"{OP}: x must have one channel or more, got {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        check_shape(OP, name, value, (channels,), "one value per channel of x")
    check_same_dtype_or_float32(OP, "x", x, weight=weight, bias=bias)
    check_same_device(OP, "x", x, weight=weight, bias=bias)
    check_eps(OP, eps)


# The op that fused kernels implement. Its second and third results are each pixel's mean and 1 / √(variance + eps),
# which the backward pass needs. With ``wide`` the first result is float32 whatever the dtype of x.


def _decomposition(x: Tensor, weight: Tensor, bias: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    exact = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(exact, dim=-1, correction=0)
    out = layer_norm_reference(exact if wide else x, weight, bias, eps=eps)
    return out, mean, torch.rsqrt(var + eps)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, inverse = (x.new_empty(x.shape[:-1], dtype=exact) for _ in range(2))
    return x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype), mean, inverse


def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(x, weight, bias, mean, inverse)


def _backward(ctx: Any, grad_out: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    return (*torch.ops.savl.layer_norm_backward(grad_out, *ctx.saved_tensors), None, None)


# Cases for tests and benchmarks


def layer_norm_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    height: int = 24,
    width: int = 20,
    channels: int = 144,
    seed: int = 0,
) -> Case:
    """Return a case of layer normalisation; the mean of a pixel's channels is not zero."""
    draw = Draw(dtype, seed)
    arguments: dict[str, Tensor | None] = {
        "x": draw.normal(batch, height, width, channels) + draw.normal(batch, height, width, 1),
        "weight": draw.normal(channels),
        "bias": draw.normal(channels),
    }
    terms = batch * height * width + channels
    return Case(OP, arguments, {}, terms, f"{channels} channels")


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """The layer normalisation of savl-base."""
    x = draw.normal(1, side, side, 144)
    size, flops = float(x.nbytes), 7.0 * x.numel()
    return BenchmarkProblem(
        {"x": x, "weight": draw.normal(144), "bias": draw.normal(144)}, {}, 2 * size, 3 * size, flops, 0.0
    )


def _triton_limit(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return None if x.shape[-1] <= MOST_CHANNELS else f"x has {x.shape[-1]} channels, more than {MOST_CHANNELS}"


LAYER_NORM = register(
    Op(
        name=OP,
        function=layer_norm,
        reference=layer_norm_reference,
        backends={TRITON: _triton_limit, CPP: None},
        schema="layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool wide) -> (Tensor, Tensor, Tensor)",
        backward_schema="layer_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
        "Tensor inverse) -> (Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        decomposition=_decomposition,
        setup_context=_setup_context,
        backward=_backward,
        case=layer_norm_case,
        full_cases=({}, {"channels": 48}, {"height": 5, "width": 7, "channels": 19}),
        quick_cases=({"height": 12, "width": 10}, {"height": 5, "width": 7, "channels": 19}),
        small_cases=({"height": 5, "width": 7, "channels": 19},),
        tiny_cases=({"batch": 1, "height": 2, "width": 2, "channels": 5},),
        interpreter_cases=(
            {"batch": 1, "height": 9, "channels": 48},
            {"batch": 1, "height": 3, "width": 5, "channels": 19},
        ),
        title="layer norm",
        benchmark=_benchmark,
    )
)
