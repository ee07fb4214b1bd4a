"""``savl::layer_norm`` and its backward pass on the GPU; the mathematics is in savl/ops/layer_norm.py.

A program processes tiles of pixels with all their channels, padded to a power of two. With e bytes per number, the
forward pass moves 2·e and the backward pass 3·e bytes per number of x, and both move 8 bytes per pixel: memory limits
both. Every number is read once. The variance is computed from centred numbers in registers, so that a large mean does
not cancel its digits.

    with x̂ = (x − mean) · inverse, inverse = 1 / √(variance + eps), g = grad_out · weight, and means over channels:
    grad_x      = (g − mean(g) − x̂ · mean(g · x̂)) · inverse
    grad_weight = Σ_pixels grad_out · x̂,  grad_bias = Σ_pixels grad_out

The number of programs that share the sums over pixels depends on the shape alone, and their parts are added in a fixed
order, so every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from savl.kernels import launch as attention_launch
from savl.kernels.launch import device_of, with_even_pixels

OPTIONS = {**attention_launch.OPTIONS, "num_warps": 4}
"""Options of Triton for both kernels."""

FORWARD_TILE, BACKWARD_TILE = 4096, 2048
"""Numbers in a tile: 32 and 16 for each thread of four warps, so that no register is spilled."""
SHARES = 1024
"""Largest number of programs that share the sums over pixels."""


@triton.jit
def normalise_pixels(
    x,
    weight,
    bias,
    out,
    mean,
    inverse,
    pixels,
    x_stride,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Normalise BLOCK_P pixels.

    Owns: BLOCK_P pixels with all channels. Reads: their numbers, weight and bias. Keeps in registers: one tile
    (BLOCK_P, BLOCK_C) in float32. Writes: out, mean and inverse of its pixels. Bytes: 2 · e a number, 8 a pixel.
    FLOPs: about 7 a number.

    Pointers: x with contiguous channels and ``x_stride`` numbers from pixel to pixel; weight and bias (C); out
    (pixels, C); mean and inverse = 1 / √(variance + eps), float32 (pixels).
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    there = first + p < pixels
    real = c < CHANNELS
    tile = there[:, None] & real[None, :]
    numbers = tl.load(x + first * x_stride + p[:, None] * x_stride + c[None, :], mask=tile, other=0.0).to(tl.float32)
    centre = tl.sum(numbers, 1) / CHANNELS
    centred = tl.where(real[None, :], numbers - centre[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
    weights = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    shifts = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * weights[None, :] + shifts[None, :]
    place = out + first * CHANNELS + p[:, None] * CHANNELS + c[None, :]
    tl.store(place, normed.to(out.dtype.element_ty), mask=tile)
    tl.store(mean + first + p, centre, mask=there)
    tl.store(inverse + first + p, scale, mask=there)


@triton.jit
def normalise_pixels_backward(
    grad_out,
    x,
    weight,
    mean,
    inverse,
    grad_x,
    sums,
    pixels,
    x_stride,
    programs,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the gradients of every ``programs``-th tile of BLOCK_P pixels, and a part of the sums over pixels.

    Owns: every ``programs``-th tile of BLOCK_P pixels with all channels. Reads: their numbers, grad_out, mean and
    inverse; the weight. Keeps in registers: two tiles (BLOCK_P, BLOCK_C) in float32, and two sums (BLOCK_C).
    Writes: grad_x of its pixels and its part of the sums. Bytes: 3 · e a number, 8 a pixel, 8 · C for the sums.
    FLOPs: about 14 a number.

    Pointers: as for `normalise_pixels`; grad_out and grad_x (pixels, C); sums float32 (programs, 2, C), of the weight
    and of the bias.
    """
    program = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    weights = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_C], tl.float32)
    of_bias = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.range(0, (pixels - 1) // (BLOCK_P * programs) + 1):
        first = (program.to(tl.int64) + step * programs) * BLOCK_P
        there = first + p < pixels
        tile = there[:, None] & real[None, :]
        numbers = tl.load(x + first * x_stride + p[:, None] * x_stride + c[None, :], mask=tile, other=0.0)
        inner = p[:, None] * CHANNELS + c[None, :]
        given = tl.load(grad_out + first * CHANNELS + inner, mask=tile, other=0.0).to(tl.float32)
        centre = tl.load(mean + first + p, mask=there, other=0.0)
        scale = tl.load(inverse + first + p, mask=there, other=0.0)
        normed = tl.where(tile, (numbers.to(tl.float32) - centre[:, None]) * scale[:, None], 0.0)
        weighted = given * weights[None, :]
        mean_weighted = tl.sum(weighted, 1) / CHANNELS
        mean_along = tl.sum(weighted * normed, 1) / CHANNELS
        change = (weighted - mean_weighted[:, None] - normed * mean_along[:, None]) * scale[:, None]
        tl.store(grad_x + first * CHANNELS + inner, change.to(grad_x.dtype.element_ty), mask=tile)
        of_weight += tl.sum(given * normed, 0)
        of_bias += tl.sum(given, 0)
    share = sums + program * 2 * CHANNELS + c
    tl.store(share, of_weight, mask=real)
    tl.store(share + CHANNELS, of_bias, mask=real)


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel of this module.

    Args:
        kernel: `normalise_pixels` or `normalise_pixels_backward`.
        programs: How many of its programs to run.
        arguments: Its positional arguments.
        constants: Its compile-time arguments.
    """
    kernel[(programs,)](*arguments, **constants, **OPTIONS)


Launch = Callable[..., None]
"""A function with the parameters of `run`."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, wide: bool, launch: Launch = run
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each pixel of ``x`` (B, H, W, C) over its channels.

    Args:
        x: Features.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        wide: Return float32 whatever the dtype of ``x``, as under autocast.
        launch: Function that launches the kernel.

    Returns:
        The result (B, H, W, C), and mean and 1 / √(variance + eps) of each pixel, float32 (B, H, W).
    """
    x = _with_near_pixels(x)
    channels, pixels = x.shape[3], x.shape[:3].numel()
    out = torch.empty(x.shape, dtype=torch.float32 if wide else x.dtype, device=x.device)
    mean, inverse = (torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for _ in range(2))
    if pixels:
        block_c, block_p = tile_of(channels, FORWARD_TILE)
        with device_of(x):
            launch(
                normalise_pixels, triton.cdiv(pixels, block_p),
                x, weight.contiguous(), bias.contiguous(), out, mean, inverse, pixels, x.stride(2), eps,
                CHANNELS=channels, BLOCK_C=block_c, BLOCK_P=block_p,
            )  # fmt: skip
    return out, mean, inverse


def layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    launch: Launch = run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, the weight and the bias; ``mean`` and ``inverse`` are those of `layer_norm`."""
    x, grad_out = _with_near_pixels(x), grad_out.contiguous()
    channels, pixels = x.shape[3], x.shape[:3].numel()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if pixels == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    block_c, block_p = tile_of(channels, BACKWARD_TILE)
    programs = min(triton.cdiv(pixels, block_p), SHARES)
    sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    with device_of(x):
        launch(
            normalise_pixels_backward, programs,
            grad_out, x, weight.contiguous(), mean.contiguous(), inverse.contiguous(), grad_x, sums, pixels,
            x.stride(2), programs,
            CHANNELS=channels, BLOCK_C=block_c, BLOCK_P=block_p,
        )  # fmt: skip
    grad_weight, grad_bias = (sums[:, which].sum(0) for which in range(2))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _with_near_pixels(x: Tensor) -> Tensor:
    """Return x with evenly spaced pixels, those of a tile within 2³¹ numbers: the tensor itself, or a copy."""
    x = with_even_pixels(x)
    _, block_p = tile_of(x.shape[3], FORWARD_TILE)
    return x if block_p * x.stride(2) < 2**31 else x.contiguous()


def tile_of(channels: int, numbers: int) -> tuple[int, int]:
    """Return the padded number of channels and the number of pixels of a tile, both powers of two.

    Args:
        channels: C.
        numbers: Numbers in the tile, approximately.
    """
    padded = triton.next_power_of_2(channels)
    return padded, max(1, numbers // padded)
