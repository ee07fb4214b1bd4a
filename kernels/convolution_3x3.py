"""3×3 convolutions of ``savl::convolution`` with few channels on one side; the mathematics is in its file in savl/ops.

Two kernels, both bound by the bytes of the side with many channels:

- `contract`, for few outputs. A program normalises each pixel of a tile once and multiplies it with the weights of all
  nine taps. This gives nine numbers for each output of a pixel, which belong to nine different pixels: they are
  gathered from the other rows of the tile. A convolution that gathered its inputs instead would read and normalise each
  pixel nine times.
- `expand`, for few inputs. The 9 · C operands of a pixel are one row of a single product.

A dilated convolution is an ordinary one on each of the d × d images that consist of every d-th row and column, so a
tile consists of pixels that are ``dilation`` apart.

The same shapes give the same bits in every run: no sum is shared between programs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from savl.kernels.launch import device_of, with_even_pixels
from savl.kernels.targets import Architecture

FEW_OUTPUTS = 16
"""Largest number of outputs for `contract`. `expand` computes more of them, if there are few inputs (see the limit of
the backend in savl/ops/convolution.py)."""


# Parts that the kernels share


@triton.jit
def load_channels(values, o, real):
    """Load one value per output channel as float32."""
    return tl.load(values + o, mask=real, other=0.0).to(tl.float32)


@triton.jit
def activated(y, slope, ACTIVATION: tl.constexpr):
    """Return the activation of ``y``, float32: 0 for none, 1 for GELU, 2 for leaky ReLU."""
    if ACTIVATION == 1:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 2:
        y = tl.where(y > 0.0, y, y * slope)
    return y


@triton.jit
def store_outputs(
    y,
    out,
    kept,
    bias,
    residual,
    gamma,
    beta,
    gate,
    slope,
    start,
    pixels,
    parts,
    there,
    o,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Apply what follows a product, ``residual + (1 + gamma) · gate · activation(y + bias) + beta``, and store it.

    Absent parts are None. ``y`` is the product (P, O) in float32, of the output channels ``o``. ``start`` is the index
    among all pixels, 64-bit, of the first pixel of the tile, and ``pixels`` (P) are those of the tile's pixels relative
    to it; ``there`` says which of them to store. ``parts`` (P) are the indices of their parts in the grid of the gate,
    unused without one.
    """
    real = o < OUTPUTS
    tile = there[:, None] & real[None, :]
    place = start * OUTPUTS + (pixels * OUTPUTS)[:, None] + o[None, :]
    if bias is not None:
        y += load_channels(bias, o, real)[None, :]
    if kept is not None:
        tl.store(kept + place, y.to(kept.dtype.element_ty), mask=tile)
    y = activated(y, slope, ACTIVATION)
    if gate is not None:
        y *= tl.load(gate + (parts * OUTPUTS)[:, None] + o[None, :], mask=tile, other=0.0).to(tl.float32)
    if gamma is not None:
        y *= 1.0 + tl.load(gamma + place, mask=tile, other=0.0).to(tl.float32)
    if beta is not None:
        y += tl.load(beta + place, mask=tile, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + place, mask=tile, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=tile)


@triton.jit
def tile_of_image(program, size_y, size_x, dilation, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Return the number of the image of a program, 64-bit, and row and column of the first of its pixels.

    The tile consists of BLOCK_Y × BLOCK_X pixels that are ``dilation`` apart. Images with fewer rows or columns than
    ``dilation`` have fewer tiles.
    """
    phases_y = tl.minimum(dilation, size_y)
    phases_x = tl.minimum(dilation, size_x)
    columns = tl.cdiv(tl.cdiv(size_x, dilation), BLOCK_X)
    rows = tl.cdiv(tl.cdiv(size_y, dilation), BLOCK_Y)
    phase_x = program % phases_x
    column = program // phases_x % columns
    phase_y = program // (phases_x * columns) % phases_y
    row = program // (phases_x * columns * phases_y) % rows
    image = program // (phases_x * columns * phases_y * rows)
    return image.to(tl.int64), row * BLOCK_Y * dilation + phase_y, column * BLOCK_X * dilation + phase_x


@triton.jit
def part_of_gate(image, y, x_, size_y, size_x, gate_rows, gate_columns):
    """Return the index of the part that pixels are in, in a gate (B, gate_rows, gate_columns, O)."""
    row = image.to(tl.int32) * gate_rows + y // (size_y // gate_rows)
    return row * gate_columns + x_ // (size_x // gate_columns)


# Few outputs


@triton.jit
def pack(weight, out, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """Arrange BLOCK_K input channels of one row of a 3×3 weight for `contract`.

    Owns: BLOCK_K channels and a row of the kernel. Reads: their weights. Writes: (BLOCK_K, 4, BLOCK_O) numbers in the
    dtype of the product, zeros for the fourth column and for the outputs and channels that do not exist.

    Pointers: weight (O, C, 3, 3); out (3, channels, 4, BLOCK_O) with a multiple of BLOCK_K channels.
    """
    ROWS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    row = tl.program_id(0) % 3
    c = tl.program_id(0) // 3 * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, 4 * BLOCK_O)
    o = n % BLOCK_O
    column = n // BLOCK_O
    real = (c < CHANNELS)[:, None] & ((o < OUTPUTS) & (column < 3))[None, :]
    numbers = tl.load(weight + c[:, None] * 9 + (o * (CHANNELS * 9) + row * 3 + column)[None, :], mask=real, other=0.0)
    tl.store(out + (row * ROWS + c)[:, None] * (4 * BLOCK_O) + n[None, :], numbers.to(out.dtype.element_ty))


@triton.jit
def gather_row(products, row: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """Sum the products (BLOCK_P, 4 · BLOCK_O) of a row of the kernel over its columns, for the pixels they belong to.

    Wrong at the border of the tile, whose neighbours are not in the tile.
    """
    p = tl.arange(0, BLOCK_P)
    column = tl.arange(0, 4 * BLOCK_O) // BLOCK_O
    source = p[:, None] + ((row - 1) * BLOCK_X - 1) + column[None, :]
    source = tl.minimum(tl.maximum(source, 0), BLOCK_P - 1)
    gathered = tl.where((column < 3)[None, :], tl.gather(products, source, 0), 0.0)
    return tl.sum(tl.reshape(gathered, [BLOCK_P, 4, BLOCK_O]), 1)


@triton.jit
def contract(
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
    size_y,
    size_x,
    dilation,
    gate_rows,
    gate_columns,
    slope,
    eps,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    FAR: tl.constexpr,
):
    """Convolve the inner pixels of a tile, for few outputs.

    Owns: the (BLOCK_Y − 2) × (BLOCK_X − 2) inner pixels of a tile. Reads: all pixels of the tile with all channels,
    twice with normalisation (the second time from a cache); the packed weight, from the L2 cache. Keeps in registers:
    three products (BLOCK_Y · BLOCK_X, 4 · BLOCK_O) in float32, one for each row of the kernel. Writes: its pixels.
    Bytes: e a number of x, O numbers a pixel. FLOPs: 24 · C · BLOCK_O and, for the normalisation, 9 · C for each pixel
    of the tile.

    Pointers: x with contiguous channels and ``X_STRIDE`` numbers from pixel to pixel; weight as `pack` arranges it; the
    other ones as for the op, contiguous, or None.
    """
    BLOCK_P: tl.constexpr = BLOCK_Y * BLOCK_X
    ROWS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    image, top, left = tile_of_image(tl.program_id(0), size_y, size_x, dilation, BLOCK_Y - 2, BLOCK_X - 2)
    p = tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    down = p // BLOCK_X - 1
    along = p % BLOCK_X - 1
    y = top + down * dilation
    x_ = left + along * dilation
    inside = (y >= 0) & (y < size_y) & (x_ >= 0) & (x_ < size_x)
    start = image * size_y * size_x + top.to(tl.int64) * size_x + left
    pixels = ((down * dilation).to(tl.int64) if FAR else down * dilation) * size_x + along * dilation
    pointers = x + start * X_STRIDE + (pixels * X_STRIDE)[:, None] + k[None, :]
    mean = tl.zeros([BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_P], tl.float32)
    if norm_weight is not None:
        for first in range(0, CHANNELS, BLOCK_K):  # mean and squared deviations of one block after another
            tile = inside[:, None] & (first + k < CHANNELS)[None, :]
            numbers = tl.load(pointers + first, mask=tile, other=0.0).to(tl.float32)
            count = tl.minimum(CHANNELS - first, BLOCK_K).to(tl.float32)
            centre = tl.sum(numbers, 1) / count
            centred = tl.where(tile, numbers - centre[:, None], 0.0)
            step = centre - mean
            mean += step * (count / (first + count))
            squares += tl.sum(centred * centred, 1) + step * step * (first * (count / (first + count)))
    scale = 1.0 / tl.sqrt(squares / CHANNELS + eps)
    above = tl.zeros([BLOCK_P, 4 * BLOCK_O], tl.float32)
    level = tl.zeros([BLOCK_P, 4 * BLOCK_O], tl.float32)
    below = tl.zeros([BLOCK_P, 4 * BLOCK_O], tl.float32)
    weights = weight + k[:, None] * (4 * BLOCK_O) + tl.arange(0, 4 * BLOCK_O)[None, :]
    for first in range(0, CHANNELS, BLOCK_K):
        tile = inside[:, None] & (first + k < CHANNELS)[None, :]
        numbers = tl.load(pointers + first, mask=tile, other=0.0)
        if norm_weight is not None:
            factors = load_channels(norm_weight + first, k, first + k < CHANNELS)
            shifts = load_channels(norm_bias + first, k, first + k < CHANNELS)
            normed = (numbers.to(tl.float32) - mean[:, None]) * scale[:, None] * factors[None, :] + shifts[None, :]
            numbers = tl.where(tile, normed, 0.0)
        numbers = numbers.to(weight.dtype.element_ty)
        here = weights + first * (4 * BLOCK_O)
        above = tl.dot(numbers, tl.load(here), above, input_precision="ieee")
        level = tl.dot(numbers, tl.load(here + ROWS * 4 * BLOCK_O), level, input_precision="ieee")
        below = tl.dot(numbers, tl.load(here + 2 * ROWS * 4 * BLOCK_O), below, input_precision="ieee")
    found = gather_row(above, 0, BLOCK_O, BLOCK_P, BLOCK_X)
    found += gather_row(level, 1, BLOCK_O, BLOCK_P, BLOCK_X)
    found += gather_row(below, 2, BLOCK_O, BLOCK_P, BLOCK_X)
    inner = inside & (down >= 0) & (down < BLOCK_Y - 2) & (along >= 0) & (along < BLOCK_X - 2)
    parts = y * 0
    if gate is not None:
        parts = part_of_gate(image, y, x_, size_y, size_x, gate_rows, gate_columns)
    store_outputs(
        found, out, kept, bias, residual, gamma, beta, gate, slope, start, pixels, parts, inner,
        tl.arange(0, BLOCK_O), OUTPUTS, ACTIVATION,
    )  # fmt: skip


# Few inputs


@triton.jit
def operands_of(
    x,
    start,
    top,
    left,
    down,
    along,
    there,
    size_y,
    size_x,
    dilation,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FAR: tl.constexpr,
):
    """Load the 9 · CHANNELS operands of some pixels, (P, BLOCK_K): zeros outside the image, and beyond the operands.

    Operand k is channel ``k // 9`` at tap ``k % 9``, as in the rows of a weight (O, C, 3, 3). x has contiguous channels
    and ``X_STRIDE`` numbers from pixel to pixel. ``start`` is the index among all pixels, 64-bit, of pixel (top, left)
    of an image of size_y × size_x pixels. The pixels are ``down`` (P) rows below that one and ``along`` (P) columns to
    its right; ``there`` says which of them exist. FAR: some operands are 2³¹ numbers or more from pixel (top, left).
    """
    k = tl.arange(0, BLOCK_K)
    rows = down[:, None] + ((k % 9 // 3 - 1) * dilation)[None, :]
    columns = along[:, None] + ((k % 3 - 1) * dilation)[None, :]
    inside = there[:, None] & (top + rows >= 0) & (top + rows < size_y)
    inside = inside & (left + columns >= 0) & (left + columns < size_x) & (k < 9 * CHANNELS)[None, :]
    pixels = (rows.to(tl.int64) if FAR else rows) * size_x + columns
    return tl.load(x + start * X_STRIDE + (pixels * X_STRIDE + (k // 9)[None, :]), mask=inside, other=0.0)


@triton.jit
def product_of(
    operands, weight, first, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Multiply operands with BLOCK_O rows of a weight (O, C, 3, 3), from ``first`` on: (P, BLOCK_O) in float32."""
    k = tl.arange(0, BLOCK_K)
    o = first + tl.arange(0, BLOCK_O)
    real = (o < OUTPUTS)[None, :] & (k < 9 * CHANNELS)[:, None]
    weights = tl.load(weight + (o * (9 * CHANNELS))[None, :] + k[:, None], mask=real, other=0.0)
    return tl.dot(operands, weights.to(operands.dtype), input_precision="ieee")


@triton.jit
def expand(
    x,
    weight,
    bias,
    residual,
    gamma,
    beta,
    gate,
    out,
    kept,
    size_y,
    size_x,
    dilation,
    gate_rows,
    gate_columns,
    slope,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    FAR: tl.constexpr,
):
    """Convolve the pixels of a tile, for few inputs.

    Owns: BLOCK_Y × BLOCK_X pixels with all outputs. Reads: their 9 · C operands, most of them from a cache; the weight,
    from the L2 cache; the residual and the other features. Keeps in registers: the operands (BLOCK_Y · BLOCK_X,
    BLOCK_K), and one product (BLOCK_Y · BLOCK_X, BLOCK_O) in float32. Writes: its pixels. Bytes: C numbers a pixel, and
    O numbers for the result and for each of residual, gamma and beta. FLOPs: 2 · BLOCK_K · O a pixel.

    Pointers: x with contiguous channels and ``X_STRIDE`` numbers from pixel to pixel; the other ones as for the op,
    contiguous, or None. NARROW: multiply in bfloat16.
    """
    image, top, left = tile_of_image(tl.program_id(0), size_y, size_x, dilation, BLOCK_Y, BLOCK_X)
    p = tl.arange(0, BLOCK_Y * BLOCK_X)
    down = p // BLOCK_X * dilation
    along = p % BLOCK_X * dilation
    y = top + down
    x_ = left + along
    there = (y < size_y) & (x_ < size_x)
    start = image * size_y * size_x + top.to(tl.int64) * size_x + left
    operands = operands_of(
        x, start, top, left, down, along, there, size_y, size_x, dilation, X_STRIDE, CHANNELS, BLOCK_K, FAR
    )
    if NARROW:
        operands = operands.to(tl.bfloat16)
    pixels = (down.to(tl.int64) if FAR else down) * size_x + along
    parts = y * 0
    if gate is not None:
        parts = part_of_gate(image, y, x_, size_y, size_x, gate_rows, gate_columns)
    for first in tl.range(0, OUTPUTS, BLOCK_O):
        found = product_of(operands, weight, first, CHANNELS, OUTPUTS, BLOCK_O, BLOCK_K)
        store_outputs(
            found, out, kept, bias, residual, gamma, beta, gate, slope, start, pixels, parts, there,
            first + tl.arange(0, BLOCK_O), OUTPUTS, ACTIVATION,
        )  # fmt: skip


# Launches


Launch = Callable[..., None]
"""A function with the parameters of `savl.kernels.convolution.run`."""


def convolution_3x3(
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
    launch: Launch,
    architecture: Architecture,
) -> tuple[Tensor, Tensor]:
    """Convolve with a 3×3 kernel that has few channels on one side.

    Args:
        x: ``(B, H, W, C)``.
        weight: ``(O, C, 3, 3)``; its dtype, and that of the other parameters, may be float32.
        bias: ``(O,)`` or None.
        norm_weight: ``(C,)`` or None.
        norm_bias: ``(C,)``; given if ``norm_weight`` is.
        residual: ``(B, H, W, O)`` or None. Its dtype is that of the result.
        gamma: ``(B, H, W, O)`` or None.
        beta: ``(B, H, W, O)`` or None.
        gate: ``(B, rows, columns, O)`` or None.
        dilation: Pixels between the taps.
        activation: Index in `savl.ops.convolution.ACTIVATIONS`.
        slope: Slope of the leaky ReLU.
        eps: Added to the variance.
        keep: Return the sum before the activation too.
        narrow: Multiply a float32 ``x`` in bfloat16.
        launch: Function that launches the kernels.
        architecture: Architecture of the GPU to choose block sizes for.

    Returns:
        The result ``(B, H, W, O)``, and the sum before the activation, in the dtype of the product; empty without
        ``keep``.
    """
    x = with_even_pixels(x)
    batch, height, width, channels = x.shape
    outputs = weight.shape[0]
    dtype = torch.bfloat16 if narrow else x.dtype
    shape = (batch, height, width, outputs)
    out = torch.empty(shape, dtype=dtype if residual is None else residual.dtype, device=x.device)
    kept = torch.empty(shape if keep else (0,), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out, kept
    weight = weight.contiguous()
    norms = [None if each is None else each.contiguous() for each in (norm_weight, norm_bias)]
    bias, *features = (None if each is None else each.contiguous() for each in (bias, residual, gamma, beta, gate))
    rows, columns = (1, 1) if gate is None else gate.shape[1:3]
    dilation = min(dilation, max(height, width))  # farther taps are outside the image as well
    results = (out, kept if keep else None)
    geometry = (height, width, dilation, rows, columns, slope)
    contracts = outputs <= FEW_OUTPUTS
    tile = (contract_tile if contracts else expand_tile)(channels, outputs, dtype, architecture)
    block_y, block_x = tile["BLOCK_Y"], tile["BLOCK_X"]
    reach = (block_y + 1) * dilation * width * max(x.stride(2), outputs)
    constants = {
        "X_STRIDE": x.stride(2),
        "CHANNELS": channels,
        "OUTPUTS": outputs,
        "ACTIVATION": activation,
        "FAR": reach >= 2**31,
        **tile,
    }
    margin = 2 if contracts else 0
    programs = batch
    for size, block in ((height, block_y - margin), (width, block_x - margin)):
        programs *= min(dilation, size) * triton.cdiv(triton.cdiv(size, dilation), block)
    with device_of(x):
        if contracts:
            block_o, block_k = tile["BLOCK_O"], tile["BLOCK_K"]
            blocks = triton.cdiv(channels, block_k)
            packed = torch.empty(3, blocks * block_k, 4, block_o, dtype=dtype, device=x.device)
            sizes = {"CHANNELS": channels, "OUTPUTS": outputs, "BLOCK_O": block_o, "BLOCK_K": block_k}
            launch(pack, 3 * blocks, weight, packed, **sizes, num_warps=4)
            launch(contract, programs, x, packed, bias, *norms, *features, *results, *geometry, eps, **constants)
        else:
            launch(expand, programs, x, weight, bias, *features, *results, *geometry, **constants, NARROW=narrow)
    return out, kept


def contract_tile(channels: int, outputs: int, dtype: torch.dtype, architecture: Architecture) -> dict[str, int]:
    """Return the block sizes and the number of warps of `contract`.

    Args:
        channels: C.
        outputs: O.
        dtype: Dtype of the product.
        architecture: Architecture of the GPU.
    """
    block_o = max(4, triton.next_power_of_2(outputs))
    # 16 channels are what tensor cores multiply at once. Tiles of 32, and three stages of the pipeline that loads them,
    # need more than the 128 registers with which two programs of 8 warps fit on a multiprocessor of NVIDIA.
    tile = {"BLOCK_O": block_o, "BLOCK_K": 16, "BLOCK_Y": 8, "BLOCK_X": 8 if block_o == 16 else 16}
    # On data-centre Blackwell, float16 spills with two stages, and float32 with one.
    single = isinstance(architecture, tuple) and architecture[0] == 10 and dtype != torch.float32
    tile["num_stages"] = 1 if single else 2
    # A warp of CDNA has 64 threads.
    return {**tile, "num_warps": 4 if architecture == "gfx942" or block_o == 16 else 8}


def expand_tile(channels: int, outputs: int, dtype: torch.dtype, architecture: Architecture) -> dict[str, int]:
    """Return the block sizes and the number of warps of `expand`; arguments as for `contract_tile`."""
    block_k = max(16, triton.next_power_of_2(9 * channels))
    block_y = 8 if block_k <= 64 and dtype != torch.float32 else 4
    # Without matrix instructions for float32, each thread has whole rows and columns of the operands in its registers.
    exact = dtype == torch.float32 and architecture != "gfx942"
    block_o = 32 if not exact else 8 if architecture == "gfx1100" else 16
    return {
        "BLOCK_O": min(block_o, triton.next_power_of_2(outputs)),
        "BLOCK_K": block_k,
        "BLOCK_Y": block_y,
        "BLOCK_X": 16,
        "num_warps": 4,
    }
