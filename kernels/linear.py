"""The 1×1 case of ``savl::convolution`` on the GPU: a linear layer, and what surrounds it; see savl/ops/convolution.py.

A program owns a tile of pixels with all their channels. It reads the tile once, normalises it in registers, and then
goes through the outputs in blocks of BLOCK_N: product, bias, activation, residual, gamma, beta and gate, store. So
features cross memory once in each direction; the weight comes from the L2 cache for every tile.

The number of channels is seldom a power of two, as Triton wants the sides of its tiles. Channels are therefore held in
two pieces of HEAD and TAIL channels, powers of two of at least 16: 144 is 128 + 16 and 288 is 256 + 32, without waste;
180 takes 128 + 64.

With e bytes a number and P pixels: (C + O) · e · P bytes, and O · e · P for each of residual, gamma and beta;
2 · C · O · P FLOPs. At C = 144 and O = 432 in bfloat16 these are 108 FLOPs a byte: memory limits the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import add_dot

HALF_SQRT: tl.constexpr = tl.constexpr(0.7071067811865476)


@triton.jit
def load_piece(base, p, there, STRIDE: tl.constexpr, FIRST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Load channels FIRST to FIRST + BLOCK of some pixels, ``(pixels, BLOCK)``; zeros beyond CHANNELS."""
    c = FIRST + tl.arange(0, BLOCK)
    pointers = base + p[:, None] * STRIDE + c[None, :]
    if FIRST + BLOCK <= CHANNELS:
        return tl.load(pointers, mask=there[:, None], other=0.0)
    return tl.load(pointers, mask=there[:, None] & (c < CHANNELS)[None, :], other=0.0)


@triton.jit
def load_pieces(base, p, there, STRIDE: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Load all channels of some pixels as a piece of HEAD and one of TAIL channels; the latter is unused if TAIL is 0.

    ``base`` points to pixel 0 of ``p``, whose channels are contiguous.
    """
    head = load_piece(base, p, there, STRIDE, 0, CHANNELS, HEAD)
    tail = head
    if TAIL > 0:
        tail = load_piece(base, p, there, STRIDE, HEAD, CHANNELS, TAIL)
    return head, tail


@triton.jit
def centred_piece(piece, centre, FIRST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Subtract the mean of each pixel; zeros beyond CHANNELS."""
    centred = piece - centre[:, None]
    if FIRST + BLOCK <= CHANNELS:
        return centred
    return tl.where((FIRST + tl.arange(0, BLOCK) < CHANNELS)[None, :], centred, 0.0)


@triton.jit
def scaled_piece(
    centred,
    inverse,
    weight,
    bias,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scale and shift a centred piece, and round it to DTYPE."""
    c = FIRST + tl.arange(0, BLOCK)
    weights = tl.load(weight + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    shifts = tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    return (centred * inverse[:, None] * weights[None, :] + shifts[None, :]).to(DTYPE)


@triton.jit
def centre_pieces(head, tail, eps, CHANNELS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Return the pieces minus the mean of each pixel, the mean, and 1 / √(variance + eps), all in float32."""
    head = head.to(tl.float32)
    tail = tail.to(tl.float32)
    total = tl.sum(head, 1)
    if TAIL > 0:
        total += tl.sum(tail, 1)
    centre = total / CHANNELS
    head = centred_piece(head, centre, 0, CHANNELS, HEAD)
    square = tl.sum(head * head, 1)
    if TAIL > 0:
        tail = centred_piece(tail, centre, HEAD, CHANNELS, TAIL)
        square += tl.sum(tail * tail, 1)
    return head, tail, centre, 1 / tl.sqrt(square / CHANNELS + eps)


@triton.jit
def normalise(
    head,
    tail,
    weight,
    bias,
    eps,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Normalise each pixel over its channels, in float32; return the pieces in DTYPE. See kernels/layer_norm.py."""
    head, tail, _, inverse = centre_pieces(head, tail, eps, CHANNELS, HEAD, TAIL)
    head = scaled_piece(head, inverse, weight, bias, 0, CHANNELS, HEAD, DTYPE)
    if TAIL > 0:
        return head, scaled_piece(tail, inverse, weight, bias, HEAD, CHANNELS, TAIL, DTYPE)
    else:
        return head, head


@triton.jit
def add_product_of_piece(
    piece,
    weight,
    n,
    real,
    accumulator,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``accumulator + piece @ weight[n, FIRST : FIRST + BLOCK]ᵀ``."""
    k = FIRST + tl.arange(0, BLOCK)
    pointers = weight + n[None, :] * STRIDE + k[:, None]
    if FIRST + BLOCK <= CHANNELS:
        block = tl.load(pointers, mask=real[None, :], other=0.0)
    else:
        block = tl.load(pointers, mask=real[None, :] & (k < CHANNELS)[:, None], other=0.0)
    return add_dot(piece, block.to(piece.dtype), accumulator, PRECISION)


@triton.jit
def add_product(
    head,
    tail,
    weight,
    n,
    real,
    accumulator,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``accumulator + x @ weight[n]ᵀ``, float32 ``(pixels, outputs)``.

    ``weight`` points to ``(outputs, CHANNELS)``, contiguous, of any dtype; outputs that are not ``real`` get zeros.
    """
    found = add_product_of_piece(head, weight, n, real, accumulator, 0, CHANNELS, CHANNELS, HEAD, PRECISION)
    if TAIL > 0:
        found = add_product_of_piece(tail, weight, n, real, found, HEAD, CHANNELS, CHANNELS, TAIL, PRECISION)
    return found


@triton.jit
def add_product_in_chunks(
    x,
    p,
    there,
    norm_weight,
    norm_bias,
    centre,
    inverse,
    weight,
    n,
    real,
    accumulator,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``accumulator + x @ weight[n]ᵀ`` as `add_product`, loading CHUNK channels of some pixels at a time.

    ``x`` points to pixel 0 of ``p``. Where there is a ``norm_weight`` the channels are normalised with ``centre`` and
    ``inverse``, and in any case rounded to DTYPE.
    """
    for first in tl.range(0, CHANNELS, CHUNK, num_stages=1):
        k = first + tl.arange(0, CHUNK)
        exists = k < CHANNELS
        tile = there[:, None] & exists[None, :]
        chunk = tl.load(x + p[:, None] * X_STRIDE + k[None, :], mask=tile, other=0.0)
        if norm_weight is not None:
            scaled = (chunk.to(tl.float32) - centre[:, None]) * inverse[:, None]
            chunk = scaled * load_line(norm_weight, k, exists)[None, :] + load_line(norm_bias, k, exists)[None, :]
            chunk = tl.where(tile, chunk, 0.0)
        block = tl.load(weight + n[None, :] * CHANNELS + k[:, None], mask=real[None, :] & exists[:, None], other=0.0)
        accumulator = add_dot(chunk.to(DTYPE), block.to(DTYPE), accumulator, PRECISION)
    return accumulator


@triton.jit
def activate(y, slope, ACTIVATION: tl.constexpr):
    """Apply an activation, a number as in `savl.ops.convolution.ACTIVATIONS`: 1 is GELU, 2 leaky ReLU."""
    if ACTIVATION == 1:
        return 0.5 * y * (1 + tl.erf(y * HALF_SQRT))
    elif ACTIVATION == 2:
        return tl.where(y > 0, y, y * slope)
    else:
        return y


@triton.jit
def load_line(line, n, real):
    """Load one number for each output, float32; zeros where it is absent (None) or the output is not ``real``."""
    if line is None:
        return tl.zeros([n.shape[0]], tl.float32)
    else:
        return tl.load(line + n, mask=real, other=0.0).to(tl.float32)


@triton.jit
def part_of(pixel, height, width, rows, columns):
    """Return which part of the grid of a gate a pixel is in; parts count on through the images of the batch."""
    x = pixel % width
    y = pixel // width % height
    return (pixel // (width * height) * rows + y // (height // rows)) * columns + x // (width // columns)


@triton.jit
def linear(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    residual,
    gamma,
    beta,
    gate,
    out,
    kept,
    pixels,
    height,
    width,
    rows,
    columns,
    slope,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    GAMMA_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute all outputs of BLOCK_P pixels.

    Owns: BLOCK_P pixels, all outputs. Reads: their channels, the parameters, and where given residual, gamma, beta and
    gate, each number once. Keeps: the normalised channels, an operand of all products; a tile (BLOCK_P, BLOCK_N) in
    float32. With CHUNK, which is 0 or a number of channels, it keeps CHUNK channels at a time instead, and reads all of
    them again (from a cache) for each BLOCK_N outputs: for GPUs whose registers hold no operand of all channels.
    Writes: out, and where given kept, the sum before the activation. Bytes and FLOPs: see the module.

    Pointers: x, residual, gamma and beta with contiguous channels and evenly spaced pixels, constants apart; weight
    (O, C), bias (O), norm_weight and norm_bias (C) and gate (parts, O), contiguous; out and kept (pixels, O). All but
    x, weight and out may be None. NARROW rounds a float32 x to bfloat16 for the product.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    there = first + p < pixels
    DTYPE: tl.constexpr = tl.bfloat16 if NARROW else x.dtype.element_ty
    head, tail = load_pieces(x + first * X_STRIDE, p, there, X_STRIDE, CHANNELS, HEAD, TAIL)
    centre, inverse = 0.0, 0.0
    if CHUNK > 0:
        if norm_weight is not None:
            _, _, centre, inverse = centre_pieces(head, tail, eps, CHANNELS, HEAD, TAIL)
    elif norm_weight is not None:
        head, tail = normalise(head, tail, norm_weight, norm_bias, eps, CHANNELS, HEAD, TAIL, DTYPE)
    else:
        head, tail = head.to(DTYPE), tail.to(DTYPE)
    if gate is not None:
        gate += part_of((first + p).to(tl.int32), height, width, rows, columns)[:, None] * OUTPUTS
    for start in tl.range(0, OUTPUTS, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        real = n < OUTPUTS
        tile = there[:, None] & real[None, :]
        y = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        if CHUNK > 0:
            y = add_product_in_chunks(
                x + first * X_STRIDE, p, there, norm_weight, norm_bias, centre, inverse, weight, n, real, y,
                X_STRIDE, CHANNELS, CHUNK, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            y = add_product(head, tail, weight, n, real, y, CHANNELS, HEAD, TAIL, PRECISION)
        y += load_line(bias, n, real)[None, :]
        place = p[:, None] * OUTPUTS + n[None, :]
        if kept is not None:
            tl.store(kept + first * OUTPUTS + place, y.to(kept.dtype.element_ty), mask=tile)
        y = activate(y, slope, ACTIVATION)
        if gamma is not None:
            inner = p[:, None] * GAMMA_STRIDE + n[None, :]
            y += y * tl.load(gamma + first * GAMMA_STRIDE + inner, mask=tile, other=0.0).to(tl.float32)
        if beta is not None:
            inner = p[:, None] * BETA_STRIDE + n[None, :]
            y += tl.load(beta + first * BETA_STRIDE + inner, mask=tile, other=0.0).to(tl.float32)
        if gate is not None:
            y *= tl.load(gate + n[None, :], mask=tile, other=0.0).to(tl.float32)
        if residual is not None:
            inner = p[:, None] * RESIDUAL_STRIDE + n[None, :]
            y += tl.load(residual + first * RESIDUAL_STRIDE + inner, mask=tile, other=0.0).to(tl.float32)
        tl.store(out + first * OUTPUTS + place, y.to(out.dtype.element_ty), mask=tile)


def pieces_of(channels: int) -> tuple[int, int]:
    """Return the sizes of the two pieces that channels are held in: powers of two of at least 16, or 0 for the second.

    Args:
        channels: C.
    """
    head = max(16, 1 << (channels.bit_length() - 1))
    rest = channels - head
    return head, 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))
