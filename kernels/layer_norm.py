"""``savl::layer_norm`` and its backward pass on the GPU; the mathematics is in savl/ops/layer_norm.py.

A program takes a tile of pixels with all their channels, padded to a power of two. With e bytes a number the forward
pass moves 2·e and the backward pass 3·e bytes per number of x, and eight a pixel: memory is the limit of both. Every
number is read once, and mean and variance are two sums over registers, so that no large mean cancels.

    with x̂ = (x − mean) · inverse, inverse = 1 / √(variance + eps), g = grad_out · weight, and means over channels:
    grad_x      = (g − mean(g) − x̂ · mean(g · x̂)) · inverse
    grad_weight = Σ_pixels grad_out · x̂,  grad_bias = Σ_pixels grad_out

The sums over pixels are shared by a number of programs that depends on the shape alone, and added in a fixed order: the
same bits at every run.
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
"""Of Triton, for both kernels."""

FORWARD_TILE, BACKWARD_TILE = 4096, 2048
"""Numbers of a tile: 32 and 16 a thread of four warps, so that no register is spilled."""
SHARES = 1024
"""Most programs that share the sums over pixels."""


@triton.jit
def forward(
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

    Pointers: x with channels side by side and ``x_stride`` numbers from pixel to pixel; weight and bias (C); out
    (pixels, C); mean and inverse float32 (pixels).
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
def backward(
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
    """Gradients of every ``programs``-th tile of BLOCK_P pixels, and a share of the sums over pixels.

    Pointers: as for `forward`; grad_out and grad_x (pixels, C); sums float32 (programs, 2, C), of the weight and of the
    bias.
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
        kernel: `forward` or `backward`.
        programs: How many of its programs to run.
        arguments: Its first arguments.
        constants: Its other arguments.
    """
    kernel[(programs,)](*arguments, **constants, **OPTIONS)


Launch = Callable[..., None]
"""As `run`."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, wide: bool, launch: Launch = run
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise; also returns each pixel's mean and 1 / √(variance + eps), float32 ``(B, H, W)``."""
    x = with_near_pixels(x)
    channels, pixels = x.shape[3], x.shape[:3].numel()
    out = torch.empty(x.shape, dtype=torch.float32 if wide else x.dtype, device=x.device)
    mean, inverse = (torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for _ in range(2))
    if pixels:
        block_c, block_p = tile_of(channels, FORWARD_TILE)
        with device_of(x):
            launch(
                forward, triton.cdiv(pixels, block_p),
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
    """Gradients of x, the weight and the bias."""
    x, grad_out = with_near_pixels(x), grad_out.contiguous()
    channels, pixels = x.shape[3], x.shape[:3].numel()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if pixels == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    block_c, block_p = tile_of(channels, BACKWARD_TILE)
    programs = min(triton.cdiv(pixels, block_p), SHARES)
    sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    with device_of(x):
        launch(
            backward, programs,
            grad_out, x, weight.contiguous(), mean.contiguous(), inverse.contiguous(), grad_x, sums, pixels,
            x.stride(2), programs,
            CHANNELS=channels, BLOCK_C=block_c, BLOCK_P=block_p,
        )  # fmt: skip
    grad_weight, grad_bias = (sums[:, which].sum(0) for which in range(2))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def with_near_pixels(x: Tensor) -> Tensor:
    """With even pixels, those of a tile within 2³¹ numbers: the tensor itself, or a copy."""
    x = with_even_pixels(x)
    _, block_p = tile_of(x.shape[3], FORWARD_TILE)
    return x if block_p * x.stride(2) < 2**31 else x.contiguous()


def tile_of(channels: int, numbers: int) -> tuple[int, int]:
    """Channels as a program pads them, and the pixels that it takes at a time; both powers of two.

    Args:
        channels: C.
        numbers: Of the tile, more or less.
    """
    padded = triton.next_power_of_2(channels)
    return padded, max(1, numbers // padded)
