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

from savl.ops import library
from savl.ops.switch import KernelSettings, serves
from savl.ops.transforms import why_transformed
from savl.ops.triton_kernels import INTERPRETED, register_triton
from savl.ops.validation import check_same_device, check_same_dtype_or_float32, check_shape, check_tensor

OP = "layer_norm"
MOST_CHANNELS = 4096
"""That the Triton kernel takes: a program holds all channels of a pixel in registers."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, kernels: KernelSettings | None = None
) -> Tensor:
    """Normalise over channels.

    Args:
        x: ``(B, H, W, C)`` floating, C ≥ 1.
        weight: ``(C,)``, dtype of ``x`` or float32; under CUDA's autocast any floating one.
        bias: ``(C,)``, likewise.
        eps: Added to the variance, ≥ 0.
        kernels: Which kernels serve; None follows `savl.use_fused_kernels`.

    Returns:
        ``(B, H, W, C)``, dtype of ``x``; float32 under CUDA's autocast if ``x`` is narrower, as torch has it.
        Gradients have the dtypes of what they belong to.

    Raises:
        TypeError: An argument is not a tensor or not floating, dtypes do not fit together, or eps is no number.
        ValueError: Shapes or devices do not fit together, or eps is negative or not finite.
        KernelUnavailable: A backend was asked for by name and cannot serve.
    """
    for name, value, shape in (("x", x, "(B, H, W, C)"), ("weight", weight, "(C)"), ("bias", bias, "(C)")):
        check_tensor(OP, name, value, shape)
    wide = x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda")
    if wide:  # CUDA's autocast has all of it in float32
        weight, bias = weight.float(), bias.float()
    _validate(x, weight, bias, eps)
    limit = why_transformed(x, weight, bias)
    if x.shape[-1] > MOST_CHANNELS and (x.is_cuda or INTERPRETED):
        limit = f"x has {x.shape[-1]} channels, more than {MOST_CHANNELS}"
    if serves(OP, x, kernels, limit):
        fused: Tensor = torch.ops.savl.layer_norm(x, weight, bias, float(eps), wide)[0]
        return fused
    return layer_norm_reference(x, weight, bias, eps=float(eps))


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """The definition of the truth, torch's own. Arguments and result as `layer_norm`.

    On a GPU, without autocast, torch takes no parameters of another dtype: there they are rounded to that of ``x``.
    """
    dtype, device = x.dtype, x.device.type
    mixed = device == "cpu" or (device != "meta" and torch.is_autocast_enabled(device))
    if dtype.itemsize == 2 and mixed:
        dtype = torch.promote_types(weight.dtype, bias.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight.to(dtype), bias.to(dtype), eps)


# The op that fused kernels implement. Its second and third result are each pixel's mean and 1 / √(variance + eps): the
# backward pass wants them. With ``wide`` the first is float32 whatever x is.


def _reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(x, weight, bias, mean, inverse)


def _backward(ctx: Any, grad_out: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    return (*torch.ops.savl.layer_norm_backward(grad_out, *ctx.saved_tensors), None, None)


library.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool wide) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
    backward=_backward,
    setup_context=_keep,
)
library.define(
    "layer_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor inverse) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
register_triton(OP)


def _validate(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    channels = x.shape[-1]
    if channels == 0:
        raise ValueError(f"{OP}: x must have one channel or more, got {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        check_shape(OP, name, value, (channels,), "one value per channel of x")
    check_same_dtype_or_float32(OP, "x", x, weight=weight, bias=bias)
    check_same_device(OP, "x", x, weight=weight, bias=bias)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{OP}: eps must be a number, got {eps!r}")
    if not 0 <= eps <= torch.finfo(torch.float64).max:
        raise ValueError(f"{OP}: eps must be finite and at least 0, got {eps!r}")
