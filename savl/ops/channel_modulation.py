"""Channel modulation: scale and shift the attended features by vectors read off the degradation field.

    out = residual + (1 + gamma) · attended + beta

The last step of DSCA (SAVL, ICLR 2026): one vector of C factors per pixel, so that channels react to the type of
degradation found there. The 1 + makes gamma = 0 leave the attended features as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, CUDA
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

OP = "channel_modulation"


def channel_modulation(
    attended: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    residual: Tensor,
    *,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Compute ``residual + (1 + gamma) · attended + beta``.

    Args:
        attended: ``(B, H, W, C)`` floating, output of the spatial path.
        gamma: ``(B, H, W, C)``, same dtype.
        beta: ``(B, H, W, C)``, same dtype, or None for no shift.
        residual: ``(B, H, W, C)``, same dtype or float32 (autocast keeps residual streams in float32).
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        ``(B, H, W, C)``, dtype of ``residual``.

    Raises:
        TypeError: An argument is not a floating-point tensor, or dtypes are incompatible.
        ValueError: Shapes or devices differ.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    check_tensor(OP, "attended", attended, "(B, H, W, C)")
    for name, value in (("gamma", gamma), ("beta", beta), ("residual", residual)):
        if name == "beta" and value is None:
            continue
        value = check_tensor(OP, name, value, "(B, H, W, C)")
        check_shape(OP, name, value, tuple(attended.shape), "that of attended")
    check_same_dtype(OP, "attended", attended, gamma=gamma, beta=beta)
    check_same_dtype_or_float32(OP, "attended", attended, residual=residual)
    check_same_device(OP, "attended", attended, gamma=gamma, beta=beta, residual=residual)
    if serves(CHANNEL_MODULATION, kernels, attended, gamma, beta, residual):
        fused: Tensor = torch.ops.savl.channel_modulation(attended, gamma, beta, residual)
        return fused
    return channel_modulation_reference(attended, gamma, beta, residual)


def channel_modulation_reference(attended: Tensor, gamma: Tensor, beta: Tensor | None, residual: Tensor) -> Tensor:
    """Compute `channel_modulation` by operations of torch: the reference."""
    out = residual + (1 + gamma) * attended
    if beta is not None:
        out = out + beta
    return out.to(residual.dtype)  # only float64 on a float32 residual has another dtype before


# The op that fused kernels implement


def _fake(attended: Tensor, gamma: Tensor, beta: Tensor | None, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _fake_backward(grad_out: Tensor, attended: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return attended.new_empty(attended.shape), gamma.new_empty(gamma.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attended, gamma, beta, residual = inputs
    ctx.save_for_backward(attended, gamma)
    ctx.beta_dtype = None if beta is None else beta.dtype


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_attended = grad_gamma = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_attended, grad_gamma = torch.ops.savl.channel_modulation_backward(grad_out, *ctx.saved_tensors)
    grad_beta = None if ctx.beta_dtype is None else grad_out.to(ctx.beta_dtype)
    return grad_attended, grad_gamma, grad_beta, grad_out


# Cases for tests and benchmarks


def channel_modulation_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    height: int = 24,
    width: int = 20,
    channels: int = 144,
    beta: bool = True,
    seed: int = 0,
) -> Case:
    """Return a case of the modulation, with or without its shift."""
    draw = Draw(dtype, seed)
    shape = (batch, height, width, channels)
    arguments = {
        "attended": draw.normal(*shape),
        "gamma": draw.normal(*shape),
        "beta": draw.normal(*shape) if beta else None,
        "residual": draw.normal(*shape),
    }
    return Case(OP, arguments, {}, 4, "with beta" if beta else "without beta")


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """The modulation of savl-base, which has no beta."""
    attended, gamma, residual = (draw.normal(1, side, side, 144) for _ in range(3))
    arguments = {"attended": attended, "gamma": gamma, "beta": None, "residual": residual}
    size, flops = float(attended.nbytes), 3.0 * attended.numel()
    return BenchmarkProblem(arguments, {}, 4 * size, 5 * size, flops, 0.0)


def _limit(attended: Tensor, gamma: Tensor, beta: Tensor | None, residual: Tensor) -> str | None:
    if attended.dtype == torch.float64 and residual.dtype != torch.float64:
        return "attended is float64 and residual is not"
    return None


CHANNEL_MODULATION = register(
    Op(
        name=OP,
        function=channel_modulation,
        reference=channel_modulation_reference,
        backends={CUDA: None, CPP: _limit},
        schema="channel_modulation(Tensor attended, Tensor gamma, Tensor? beta, Tensor residual) -> Tensor",
        backward_schema="channel_modulation_backward(Tensor grad_out, Tensor attended, Tensor gamma) "
        "-> (Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        decomposition=channel_modulation_reference,
        setup_context=_setup_context,
        backward=_backward,
        case=channel_modulation_case,
        full_cases=({}, {"beta": False, "channels": 7}),
        quick_cases=({"height": 12, "width": 10}, {"beta": False, "channels": 7}),
        small_cases=(
            {"height": 5, "width": 7, "channels": 19},
            {"height": 3, "width": 4, "channels": 8, "beta": False},
        ),
        tiny_cases=(
            {"height": 2, "width": 2, "channels": 3},
            {"height": 2, "width": 2, "channels": 3, "beta": False},
        ),
        title="modulation",
        benchmark=_benchmark,
    )
)
