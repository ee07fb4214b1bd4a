"""``savl::projection_mlp`` on the GPU; the mathematics is in savl/ops/projection_mlp.py.

The end of a transformer block, from the result of attention to the result of the block, in one kernel. A program owns
a tile of pixels, and the sums of all their channels stay in its registers in float32 throughout: residual, plus the
gated 3×3 convolution, plus the projection; the normalised sums are then an operand of the products of the MLP, whose
hidden features exist for BLOCK_N channels at a time and never leave the multiprocessor. As in `savl.kernels.linear`,
channels are held in two pieces.

With e bytes a number, P pixels, C channels, N hidden channels of the MLP and K of the convolution: (3 · C + K) · e · P
bytes and 2 · C · (C + 2 · N + 9 · K) · P FLOPs. At C = 144, N = 288 and K = 6 in bfloat16 these are 255 FLOPs a byte:
tensor cores and memory are about equally busy. The weights (207 KB then) come from the L2 cache for every tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from savl.kernels.convolution import Launch, near, run
from savl.kernels.launch import architecture_for, device_of, precision
from savl.kernels.linear import (
    activate,
    add_product,
    load_line,
    load_piece,
    normalise,
    part_of,
    pieces_of,
)
from savl.kernels.targets import Architecture
from savl.kernels.tiles import add_dot


@triton.jit
def load_taps(hidden, pixel, p, there, height, width, k, CHANNELS: tl.constexpr):
    """Load terms ``k`` of what a 3×3 convolution multiplies: ``channel · 9 + row · 3 + column``; (pixels, terms).

    ``hidden`` points to the first pixel of the tile, and ``pixel`` counts from the first pixel of the batch. Zeros
    outside the image and beyond the last term.
    """
    down = k % 9 // 3 - 1
    right = k % 3 - 1
    y = (pixel // width % height)[:, None] + down[None, :]
    x = (pixel % width)[:, None] + right[None, :]
    inside = there[:, None] & (k < 9 * CHANNELS)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    step = (p[:, None] + (down * width + right)[None, :]) * CHANNELS + (k // 9)[None, :]
    return tl.load(hidden + step, mask=inside, other=0.0)


@triton.jit
def add_terms(
    piece,
    terms,
    weight,
    k,
    FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the product of terms ``k`` and their columns of a weight (OUTPUTS, TERMS) to a piece of the sums."""
    o = FIRST + tl.arange(0, BLOCK)
    pointers = weight + o[None, :] * TERMS + k[:, None]
    if FIRST + BLOCK <= OUTPUTS and TERMS % BLOCK_K == 0:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(o < OUTPUTS)[None, :] & (k < TERMS)[:, None], other=0.0)
    return add_dot(terms, block.to(terms.dtype), piece, PRECISION)


@triton.jit
def gated_piece(
    piece,
    residual,
    p,
    there,
    bias,
    gate,
    part,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a piece of ``residual + gate · (piece + bias)``; of the residual alone if the gate is None."""
    n = FIRST + tl.arange(0, BLOCK)
    real = n < OUTPUTS
    sums = load_piece(residual, p, there, STRIDE, FIRST, OUTPUTS, BLOCK).to(tl.float32)
    if gate is not None:
        pointers = gate + part[:, None] * OUTPUTS + n[None, :]
        factor = tl.load(pointers, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
        sums += factor * (piece + load_line(bias, n, real)[None, :])
    return sums


@triton.jit
def biased_piece(piece, bias, FIRST: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the bias to a piece of the sums."""
    n = FIRST + tl.arange(0, BLOCK)
    return piece + load_line(bias, n, n < OUTPUTS)[None, :]


@triton.jit
def store_piece(out, p, there, piece, FIRST: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Store a piece of the sums, rounded to the dtype of the tensor."""
    n = FIRST + tl.arange(0, BLOCK)
    pointers = out + p[:, None] * OUTPUTS + n[None, :]
    tl.store(pointers, piece.to(out.dtype.element_ty), mask=there[:, None] & (n < OUTPUTS)[None, :])


@triton.jit
def finish_block(
    x,
    weight,
    bias,
    residual,
    hidden,
    hidden_weight,
    hidden_bias,
    gate,
    norm_weight,
    norm_bias,
    expand_weight,
    expand_bias,
    contract_weight,
    contract_bias,
    out,
    pixels,
    height,
    width,
    rows,
    columns,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    CONVOLVED: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the end of a block for BLOCK_P pixels.

    Owns: BLOCK_P pixels, all channels. Reads: x and residual, and where given hidden and gate, each number once but
    hidden nine times (from a cache); all weights. Keeps: the sums of all channels, float32 (BLOCK_P, HEAD + TAIL), in
    registers; the normalised sums, an operand of products. Writes: out. Bytes and FLOPs: see the module.

    Pointers: x (pixels, CHANNELS) and residual (pixels, OUTPUTS) with contiguous channels and evenly spaced pixels,
    constants apart; hidden (pixels, CONVOLVED), weights and lines contiguous; gate (parts, OUTPUTS). hidden,
    hidden_weight, hidden_bias and gate may be None.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    there = first + p < pixels
    DTYPE: tl.constexpr = x.dtype.element_ty
    residual += first * RESIDUAL_STRIDE
    x += first * X_STRIDE
    sums = tl.zeros([BLOCK_P, HEAD], tl.float32)
    rest = tl.zeros([BLOCK_P, TAIL if TAIL > 0 else HEAD], tl.float32)
    part = p
    if hidden is not None:
        pixel = (first + p).to(tl.int32)
        part = part_of(pixel, height, width, rows, columns)
        hidden += first * CONVOLVED
        for start in tl.range(0, 9 * CONVOLVED, BLOCK_K, num_stages=1):
            k = start + tl.arange(0, BLOCK_K)
            terms = load_taps(hidden, pixel, p, there, height, width, k, CONVOLVED)
            sums = add_terms(sums, terms, hidden_weight, k, 0, OUTPUTS, 9 * CONVOLVED, PRECISION, HEAD, BLOCK_K)
            if TAIL > 0:
                rest = add_terms(rest, terms, hidden_weight, k, HEAD, OUTPUTS, 9 * CONVOLVED, PRECISION, TAIL, BLOCK_K)
    sums = gated_piece(sums, residual, p, there, hidden_bias, gate, part, RESIDUAL_STRIDE, 0, OUTPUTS, HEAD)
    if TAIL > 0:
        rest = gated_piece(rest, residual, p, there, hidden_bias, gate, part, RESIDUAL_STRIDE, HEAD, OUTPUTS, TAIL)
    for start in tl.range(0, CHANNELS, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        terms = tl.load(
            x + p[:, None] * X_STRIDE + k[None, :], mask=there[:, None] & (k < CHANNELS)[None, :], other=0.0
        )
        sums = add_terms(sums, terms, weight, k, 0, OUTPUTS, CHANNELS, PRECISION, HEAD, BLOCK_K)
        if TAIL > 0:
            rest = add_terms(rest, terms, weight, k, HEAD, OUTPUTS, CHANNELS, PRECISION, TAIL, BLOCK_K)
    sums = biased_piece(sums, bias, 0, OUTPUTS, HEAD)
    if TAIL > 0:
        rest = biased_piece(rest, bias, HEAD, OUTPUTS, TAIL)
    head, tail = normalise(sums, rest, norm_weight, norm_bias, eps, OUTPUTS, HEAD, TAIL, DTYPE)
    for start in tl.range(0, HIDDEN, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        real = n < HIDDEN
        y = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        y = add_product(head, tail, expand_weight, n, real, y, OUTPUTS, HEAD, TAIL, PRECISION)
        y += load_line(expand_bias, n, real)[None, :]
        features = activate(y, 0.0, 1).to(DTYPE)
        sums = add_terms(sums, features, contract_weight, n, 0, OUTPUTS, HIDDEN, PRECISION, HEAD, BLOCK_N)
        if TAIL > 0:
            rest = add_terms(rest, features, contract_weight, n, HEAD, OUTPUTS, HIDDEN, PRECISION, TAIL, BLOCK_N)
    out += first * OUTPUTS
    store_piece(out, p, there, biased_piece(sums, contract_bias, 0, OUTPUTS, HEAD), 0, OUTPUTS, HEAD)
    if TAIL > 0:
        store_piece(out, p, there, biased_piece(rest, contract_bias, HEAD, OUTPUTS, TAIL), HEAD, OUTPUTS, TAIL)


def projection_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    hidden: Tensor | None,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor,
    eps: float,
    launch: Launch = run,
    architecture: Architecture | None = None,
) -> Tensor:
    """Launch the kernel; arguments as for `savl.ops.projection_mlp`.

    Args:
        x: ``(B, H, W, K)``.
        weight: ``(C, K)``; its dtype, and that of the other parameters, may be float32.
        bias: ``(C,)``.
        residual: ``(B, H, W, C)``.
        hidden: ``(B, H, W, D)`` or None, as are the next three.
        hidden_weight: ``(C, D, 3, 3)``.
        hidden_bias: ``(C,)``.
        gate: ``(B, rows, columns, C)``.
        norm_weight: ``(C,)``.
        norm_bias: ``(C,)``.
        expand_weight: ``(N, C)``.
        expand_bias: ``(N,)``.
        contract_weight: ``(C, N)``.
        contract_bias: ``(C,)``.
        eps: Added to the variance.
        launch: Function that launches the kernel.
        architecture: Architecture of the GPU to choose block sizes for; None for that of the device of ``x``.

    Returns:
        ``(B, H, W, C)``.
    """
    batch, height, width, channels = x.shape
    outputs, pixels = weight.shape[0], batch * height * width
    out = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    if pixels == 0:
        return out
    parameters: list[Any] = [hidden, hidden_weight, hidden_bias, gate, norm_weight, norm_bias]
    parameters += [expand_weight, expand_bias, contract_weight, contract_bias]
    x, residual = near(x), near(residual)
    rows, columns = (1, 1) if gate is None else gate.shape[1:3]
    convolved = 1 if hidden is None else hidden.shape[3]
    head, tail = pieces_of(outputs)
    converted = weight.dtype.itemsize > x.dtype.itemsize
    block_p, block_n, warps, stages = blocks_of(x.dtype, outputs, converted, architecture or architecture_for(x))
    with device_of(x):
        launch(
            finish_block, triton.cdiv(pixels, block_p),
            x, weight.contiguous(), bias.contiguous(), residual,
            *(None if each is None else each.contiguous() for each in parameters), out,
            pixels, height, width, rows, columns, eps,
            X_STRIDE=x.stride(2), RESIDUAL_STRIDE=residual.stride(2), CHANNELS=channels, OUTPUTS=outputs, HEAD=head,
            TAIL=tail, CONVOLVED=convolved, HIDDEN=expand_weight.shape[0], PRECISION=precision(x.dtype, channels),
            BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_K=16, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    return out


def blocks_of(
    dtype: torch.dtype, channels: int, converted: bool, architecture: Architecture
) -> tuple[int, int, int, int]:
    """Return pixels and hidden channels of a tile, warps, and stages of the pipeline that loads the weights.

    Args:
        dtype: Dtype of the features.
        channels: C.
        converted: Whether weights are wider than the features.
        architecture: Architecture of the GPU.
    """
    if isinstance(architecture, str):
        return (32, 16, 8, 1) if architecture == "gfx1100" and channels > 160 else (32, 32, 4, 1)
    if dtype == torch.float32:
        return 16, 16, 8, 1
    stages = 1 if converted else 2
    if channels > 160:
        return 32, 32, 4, stages
    # With 32 hidden channels, Blackwell for workstations spills 8 bytes.
    return 64, 16 if architecture[0] == 12 else 32, 8, stages
