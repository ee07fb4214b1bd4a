"""Launches of ``savl::convolution`` on the GPU; the mathematics is in savl/ops/convolution.py.

1×1 kernels are those of `savl.kernels.linear`, 3×3 kernels those of `savl.kernels.convolution_3x3`. The gradients are
computed by operations of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from savl.kernels import launch as attention_launch
from savl.kernels.convolution_3x3 import convolution_3x3
from savl.kernels.launch import architecture_for, device_of, precision, with_even_pixels
from savl.kernels.linear import linear, pieces_of
from savl.kernels.targets import Architecture

MOST_PIXELS = 128
"""Largest number of pixels in a tile."""

Launch = Callable[..., None]
"""A function with the parameters of `run`."""


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: A kernel of `savl.kernels.linear` or `savl.kernels.convolution_3x3`.
        programs: How many of its programs to run.
        arguments: Its positional arguments.
        constants: Its compile-time arguments, and options of Triton.
    """
    kernel[(programs,)](*arguments, **constants, **attention_launch.OPTIONS)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    dilation: int,
    activation: int,
    slope: float,
    eps: float,
    keep: bool,
    narrow: bool,
    launch: Launch = run,
    architecture: Architecture | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels of `savl.ops.convolution`.

    Args:
        x: ``(B, H, W, C)``.
        weight: ``(O, C)``, ``(O, C, 1, 1)`` or ``(O, C, 3, 3)``; its dtype, and that of the other parameters, may be
            float32.
        bias: ``(O,)`` or None.
        norm_weight: ``(C,)`` or None.
        norm_bias: ``(C,)``; given if ``norm_weight`` is.
        residual: ``(B, H, W, O)`` or None. Its dtype is that of the result.
        gamma: ``(B, H, W, O)`` or None.
        beta: ``(B, H, W, O)`` or None.
        gate: ``(B, rows, columns, O)`` or None.
        dilation: Pixels between the taps of a 3×3 kernel.
        activation: Index in `savl.ops.convolution.ACTIVATIONS`.
        slope: Slope of the leaky ReLU.
        eps: Added to the variance.
        keep: Return the sum before the activation too.
        narrow: Multiply a float32 ``x`` in bfloat16.
        launch: Function that launches the kernel.
        architecture: Architecture of the GPU to choose block sizes for; None for that of the device of ``x``.

    Returns:
        The result ``(B, H, W, O)``, and the sum before the activation, in the dtype of the product; empty without
        ``keep``.
    """
    architecture = architecture or architecture_for(x)
    if weight.dim() == 4 and weight.shape[-1] == 3:
        tensors = (x, weight, bias, norm_weight, norm_bias, residual, gamma, beta, gate)
        return convolution_3x3(*tensors, dilation, activation, slope, eps, keep, narrow, launch, architecture)
    batch, height, width, channels = x.shape
    outputs, pixels = weight.shape[0], batch * height * width
    dtype = torch.bfloat16 if narrow else x.dtype
    shape = (batch, height, width, outputs)
    out = torch.empty(shape, dtype=dtype if residual is None else residual.dtype, device=x.device)
    kept = torch.empty(shape if keep else 0, dtype=dtype, device=x.device)
    if pixels == 0:
        return out, kept
    x, features = near(x), [None if each is None else near(each) for each in (residual, gamma, beta)]
    parameters = (weight, bias, norm_weight, norm_bias)
    head, tail = pieces_of(channels)
    block_p, block_n, warps, stages = blocks_of(
        dtype, channels, outputs, norm_weight is not None, weight.dtype.itemsize > dtype.itemsize, architecture
    )
    rows, columns = (1, 1) if gate is None else gate.shape[1:3]
    strides = [0 if each is None else each.stride(2) for each in features]
    with device_of(x):
        launch(
            linear, triton.cdiv(pixels, block_p),
            x, *(None if each is None else each.contiguous() for each in parameters), *features,
            None if gate is None else gate.contiguous(), out, kept if keep else None,
            pixels, height, width, rows, columns, slope, eps,
            X_STRIDE=x.stride(2), RESIDUAL_STRIDE=strides[0], GAMMA_STRIDE=strides[1], BETA_STRIDE=strides[2],
            CHANNELS=channels, OUTPUTS=outputs, HEAD=head, TAIL=tail, ACTIVATION=activation, NARROW=narrow,
            PRECISION=precision(dtype, channels), BLOCK_P=block_p, BLOCK_N=block_n, STAGES=stages,
            CHUNK=chunk_of(dtype, channels, architecture), num_warps=warps,
        )  # fmt: skip
    return out, kept


def near(x: Tensor) -> Tensor:
    """Return features with evenly spaced pixels, those of a tile within 2³¹ numbers: the tensor itself, or a copy."""
    x = with_even_pixels(x)
    return x if MOST_PIXELS * x.stride(2) < 2**31 else x.contiguous()


def blocks_of(
    dtype: torch.dtype,
    channels: int,
    outputs: int,
    normalised: bool,
    converted: bool,
    architecture: Architecture = (9, 0),
) -> tuple[int, int, int, int]:
    """Return pixels and outputs of a tile, warps, and stages of the pipeline that loads the weight.

    Args:
        dtype: Dtype of the product.
        channels: C.
        outputs: O.
        normalised: Whether the pixels are normalised, for which they are held in registers in float32.
        converted: Whether the weight is wider than the product; it is then converted on its way to shared memory.
        architecture: Architecture of the GPU.
    """
    padded, stages = sum(pieces_of(channels)), 1 if converted else 2
    if isinstance(architecture, str):
        if chunk_of(dtype, channels, architecture) > 0:
            return (32, 32, 4, 1) if dtype == torch.float32 else (64, 64, 4, 1)
        return 32 if dtype == torch.float32 or padded > 288 else 64, 32, 4, 1
    if dtype == torch.float32:
        return 32, 32, 8, 1
    wide = 8 * triton.cdiv(outputs, 64) * 64 <= 9 * triton.cdiv(outputs, 32) * 32  # at most an eighth more products
    block_n = 64 if wide and padded <= 192 and not (normalised and converted) else 32
    if padded <= 192:
        return (64 if normalised or padded > 160 else 128), block_n, 8, stages
    if padded > 384 or normalised:
        return 32, 32, 8, stages
    # Two programs share the 100 KiB of shared memory that Ada, Ampere and Blackwell for workstations have.
    return (32, 32, 4, 1) if architecture in ((8, 6), (8, 9)) or architecture[0] == 12 else (64, 32, 4, stages)


def chunk_of(dtype: torch.dtype, channels: int, architecture: Architecture) -> int:
    """Return how many channels a program keeps at a time; 0 for all.

    Args:
        dtype: Dtype of the product.
        channels: C.
        architecture: Architecture of the GPU. Only CDNA multiplies float32 exactly with matrix instructions; elsewhere
            each thread has whole rows and columns of the operands in its registers. RDNA holds other operands twice.
    """
    if dtype == torch.float32:
        return 16 if architecture == "gfx1100" else 32 if architecture != "gfx942" or channels > 192 else 0
    return 32 if architecture == "gfx1100" else 0
