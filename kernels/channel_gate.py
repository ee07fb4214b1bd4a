"""``savl::channel_gate`` on the GPU; the mathematics is in savl/ops/channel_gate.py.

Two launches: `sums` adds up the small map over windows that are shifted by −1, 0 and 1 pixels, and `gates` computes
from these sums the averages over neighbourhoods, the two linear layers and the sigmoid. The map has few channels, so
that both together move a few megabytes where the convolution that they replace would write a hundred.

The number of programs that share the sum over a window depends on the shape alone, and their parts are added in a fixed
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

SUMS_TILE, GATES_TILE = 2048, 4096
"""Numbers in a tile: 16 for each of three sums and 32 for each thread of four warps."""
PROGRAMS = 512
"""Approximate number of programs that share the sums over windows, if there are fewer windows."""


@triton.jit
def sums(
    x,
    out,
    size_y,
    size_x,
    tall,
    wide,
    parts,
    rows_of_part,
    x_stride,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add up the pixels of one part of a window, shifted by ``dy`` rows and by −1, 0 and 1 columns.

    Owns: consecutive rows of a window, of which there are ``parts`` parts, and one of three vertical shifts. Reads: the
    pixels of its rows and of one column on either side; pixels outside the image are zeros. Keeps in registers: three
    sums (BLOCK_P, BLOCK_C) in float32. Writes: 3 · C sums. Bytes: three times e a number of x, most of them from the
    L2 cache, and 36 · C a part. FLOPs: 9 a number of x.

    Pointers: x with contiguous channels and ``x_stride`` numbers from pixel to pixel; out float32 (windows, parts, C,
    3, 3), the last two axes being the vertical and the horizontal shift.
    """
    part = tl.program_id(0) % parts
    window = tl.program_id(0) // parts
    dy = tl.program_id(1)
    columns = size_x // wide
    rows = size_y // tall
    left = window % columns * wide
    top = window // columns % rows * tall + part * rows_of_part
    height = tl.minimum(rows_of_part, tall - part * rows_of_part)
    image = (window // (columns * rows)).to(tl.int64) * size_y * size_x
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    to_left = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    middle = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    to_right = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    across = wide + 2
    for first in tl.range(0, height * across, BLOCK_P):
        row = (first + p) // across
        column = (first + p) % across - 1
        y = top + row + dy - 1
        x_ = left + column
        inside = (row < height) & (y >= 0) & (y < size_y) & (x_ >= 0) & (x_ < size_x)
        pixels = image + y.to(tl.int64) * size_x + x_
        numbers = tl.load(
            x + (pixels * x_stride)[:, None] + c[None, :], mask=inside[:, None] & (c < CHANNELS)[None, :], other=0.0
        ).to(tl.float32)
        to_left += tl.where((column < wide - 1)[:, None], numbers, 0.0)
        middle += tl.where(((column >= 0) & (column < wide))[:, None], numbers, 0.0)
        to_right += tl.where((column > 0)[:, None], numbers, 0.0)
    place = out + tl.program_id(0).to(tl.int64) * (9 * CHANNELS) + c * 9 + dy * 3
    tl.store(place, tl.sum(to_left, 0), mask=c < CHANNELS)
    tl.store(place + 1, tl.sum(middle, 0), mask=c < CHANNELS)
    tl.store(place + 2, tl.sum(to_right, 0), mask=c < CHANNELS)


@triton.jit
def gates(
    sums,
    weight,
    bias,
    squeeze_weight,
    squeeze_bias,
    excite_weight,
    excite_bias,
    out,
    rows,
    columns,
    parts,
    pixels,
    neighbourhood,
    squeezed,
    scale,
    OPERANDS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the gate of one window.

    Owns: a window. Reads: the sums of the ``neighbourhood``² windows around it, and all parameters. Keeps in registers:
    a tile of sums (BLOCK_N, BLOCK_K) or of the weight (BLOCK_O, BLOCK_K). Writes: O numbers. Bytes: the parameters,
    from the L2 cache. FLOPs: 2 · O · (9 · C + 2 · S).

    Pointers: sums float32 (windows, parts, 9 · C); weight (O, 9 · C); bias (O); squeeze_weight (S, O); squeeze_bias
    (S); excite_weight (O, S); excite_bias (O); out (windows, O). ``pixels`` is their number in a window, ``squeezed``
    is S.
    """
    window = tl.program_id(0)
    column = window % columns
    row = window // columns % rows
    reach = neighbourhood // 2
    around_y = tl.minimum(row + reach, rows - 1) - tl.maximum(row - reach, 0) + 1
    around_x = tl.minimum(column + reach, columns - 1) - tl.maximum(column - reach, 0) + 1
    share = 1.0 / (around_y.to(tl.float32) * around_x * pixels)
    o = tl.arange(0, BLOCK_O)
    real = o < OUTPUTS
    j = tl.arange(0, BLOCK_N)
    pooled = tl.load(bias + o, mask=real, other=0.0).to(tl.float32)
    for first in range(0, OPERANDS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, neighbourhood * neighbourhood * parts, BLOCK_N):
            number = start + j
            part = number % parts
            other = number // parts
            down = other // neighbourhood - reach
            along = other % neighbourhood - reach
            there = (other < neighbourhood * neighbourhood) & (row + down >= 0) & (row + down < rows)
            there = there & (column + along >= 0) & (column + along < columns)
            place = ((window + down * columns + along).to(tl.int64) * parts + part) * OPERANDS
            found = tl.load(
                sums + place[:, None] + k[None, :], mask=there[:, None] & (k < OPERANDS)[None, :], other=0.0
            )
            total += tl.sum(found, 0)
        weights = tl.load(
            weight + o[:, None] * OPERANDS + k[None, :], mask=real[:, None] & (k < OPERANDS)[None, :], other=0.0
        )
        pooled += tl.sum(weights.to(tl.float32) * (total * share)[None, :], 1)
    excited = tl.load(excite_bias + o, mask=real, other=0.0).to(tl.float32)
    for s in tl.range(0, squeezed):
        weights = tl.load(squeeze_weight + s * OUTPUTS + o, mask=real, other=0.0).to(tl.float32)
        given = tl.sum(weights * pooled, 0) + tl.load(squeeze_bias + s).to(tl.float32)
        given = tl.where(given < 0.0, 0.0, given)  # NaN stays
        excited += tl.load(excite_weight + o * squeezed + s, mask=real, other=0.0).to(tl.float32) * given
    found = scale * tl.sigmoid(excited)
    tl.store(out + window.to(tl.int64) * OUTPUTS + o, found.to(out.dtype.element_ty), mask=real)


def run(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel of this module.

    Args:
        kernel: `sums` or `gates`.
        programs: How many of its programs to run, by axis.
        arguments: Its positional arguments.
        constants: Its compile-time arguments.
    """
    kernel[programs](*arguments, **constants, **OPTIONS)


Launch = Callable[..., None]
"""A function with the parameters of `run`."""


def channel_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    rows: int,
    columns: int,
    neighbourhood: int,
    scale: float,
    launch: Launch = run,
) -> Tensor:
    """Return the gates of all windows of ``x`` (B, H, W, C): (B, rows, columns, O); arguments as for the op.

    Args:
        x: Features.
        weight: (O, C, 3, 3).
        bias: (O,).
        squeeze_weight: (S, O).
        squeeze_bias: (S,).
        excite_weight: (O, S).
        excite_bias: (O,).
        rows: Rows of windows.
        columns: Columns of windows.
        neighbourhood: Side of the neighbourhoods, in windows.
        scale: Factor of the gate.
        launch: Function that launches the kernels.
    """
    x = with_even_pixels(x)
    batch, height, width, channels = x.shape
    outputs = weight.shape[0]
    out = torch.empty(batch, rows, columns, outputs, dtype=x.dtype, device=x.device)
    windows, tall, wide = batch * rows * columns, height // rows, width // columns
    if out.numel() == 0:
        return out
    rows_of_part = triton.cdiv(tall, min(tall, triton.cdiv(PROGRAMS, windows)))
    parts = triton.cdiv(tall, rows_of_part)
    found = torch.empty(windows, parts, 9 * channels, dtype=torch.float32, device=x.device)
    parameters = (weight, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias)
    block_c, block_o = triton.next_power_of_2(channels), triton.next_power_of_2(outputs)
    block_k = min(triton.next_power_of_2(9 * channels), max(1, GATES_TILE // block_o))
    block_n = min(triton.next_power_of_2(neighbourhood**2 * parts), max(1, GATES_TILE // block_k))
    with device_of(x):
        launch(
            sums, (windows * parts, 3),
            x, found, height, width, tall, wide, parts, rows_of_part, x.stride(2),
            CHANNELS=channels, BLOCK_C=block_c, BLOCK_P=max(1, SUMS_TILE // block_c),
        )  # fmt: skip
        launch(
            gates, (windows,),
            found, *(each.contiguous() for each in parameters), out, rows, columns, parts, tall * wide, neighbourhood,
            squeeze_weight.shape[0], scale,
            OPERANDS=9 * channels, OUTPUTS=outputs, BLOCK_O=block_o, BLOCK_K=block_k, BLOCK_N=block_n,
        )  # fmt: skip
    return out
