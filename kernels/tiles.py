"""Functions that the attention kernels are made of: addresses, loads and stores, bias, products, logits, windows."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LARGEST_INDEX: tl.constexpr = tl.constexpr(2**30 - 1)
LEAST_NORM: tl.constexpr = tl.constexpr(1e-12)
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@tl.core.builtin
def has_ptx(_semantic=None):
    """Return, at compile time, whether a kernel is compiled to PTX; not to be called by the interpreter.

    `triton.language.target_info` asks the driver, which is not there when kernels are compiled ahead of time.
    """
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


# Addresses


@triton.jit
def image_pixel(
    y, x, size, shift, WINDOW: tl.constexpr, SHIFTED: tl.constexpr, DILATED: tl.constexpr, FAR: tl.constexpr
):
    """Return the index in the image of pixel (y, x) of the arranged image; 64-bit where FAR.

    The arranged image is the image rolled by ``−shift``, and where DILATED the image with the pixels of each window
    brought together. ``size`` and WINDOW are those of the queries or of the keys.
    """
    if SHIFTED:
        y += shift[0]
        y = tl.where(y >= size[0], y - size[0], y)
        x += shift[1]
        x = tl.where(x >= size[1], x - size[1], x)
    if DILATED:
        y = y % WINDOW[0] * (size[0] // WINDOW[0]) + y // WINDOW[0]
        x = x % WINDOW[1] * (size[1] // WINDOW[1]) + x // WINDOW[1]
    pixel = y * size[1] + x
    return pixel.to(tl.int64) if FAR else pixel


@triton.jit
def load_rows(base, pixels, stride, valid, CHECKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load one head of some pixels, ``(rows, BLOCK_D)``; zeros past HEAD_DIM and, where CHECKED, if not ``valid``."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (pixels * stride)[:, None] + d[None, :]
    if CHECKED:
        return tl.load(pointers, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, pixels, stride, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store one head of some pixels where ``valid``, rounded to the dtype of the tensor."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (pixels * stride)[:, None] + d[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=valid[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def severity_of(severity, pixels, valid, HAS_SEVERITY: tl.constexpr):
    """Load the severity of some pixels, ``(rows,)`` float32, 0 where not ``valid``; unused where not HAS_SEVERITY."""
    if HAS_SEVERITY:
        return tl.load(severity + pixels, mask=valid, other=0.0).to(tl.float32)
    return 0.0 * valid.to(tl.float32)


@triton.jit
def norms_of(rows, COSINE: tl.constexpr):
    """Return the norm of each row, float32 and at least LEAST_NORM; unused where not COSINE."""
    if COSINE:
        numbers = rows.to(tl.float32)
        norms = tl.sqrt_rn(tl.sum(numbers * numbers, 1))
        return tl.where(norms < LEAST_NORM, LEAST_NORM, norms)  # NaN stays
    else:
        return 0.0


@triton.jit
def unit_rows(rows, norms, COSINE: tl.constexpr):
    """Return ``rows`` as float32, where COSINE divided by their norms as `torch.nn.functional.normalize` does.

    The rounding error of a reciprocal is that of a whole row. It does not show in 16 bits.
    """
    numbers = rows.to(tl.float32)
    if COSINE:
        numbers = tl.div_rn(numbers, norms[:, None]) if rows.dtype == tl.float32 else numbers * (1.0 / norms)[:, None]
    return numbers


@triton.jit
def through_norms(gradient, rows, norms):
    """Return the gradient of ``rows``, given that of `unit_rows`."""
    unit = unit_rows(rows, norms, True)
    along = tl.sum(unit * gradient, 1)
    along = tl.where(norms > LEAST_NORM, along, 0.0)  # a smaller norm has been replaced by a constant
    return (gradient - unit * along[:, None]) / norms[:, None]


@triton.jit
def scale_of(scale, head, COSINE: tl.constexpr):
    """Load the scale of a head, float32; unused where not COSINE."""
    if COSINE:
        return tl.load(scale + head).to(tl.float32)
    else:
        return 0.0


@triton.jit
def query_factor(
    q,
    severity,
    norms,
    scale,
    SCALE: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    COSINE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the queries' factor of the logits, times log₂ e: float32 where WIDE, else in the dtype of q.

    It is ``s q / √d``, and with cosine similarity ``s q scale / ‖q‖``, where SCALE is 1. The severity of 16-bit queries
    is scaled first, which saves a multiplication per number; the rounding error does not show.
    """
    if HAS_SEVERITY and q.dtype != tl.float32:
        factor = unit_rows(q, norms, COSINE) * (severity * (SCALE * LOG2E))[:, None]
    else:
        factor = unit_rows(q, norms, COSINE) * (SCALE * LOG2E)
        if HAS_SEVERITY:
            factor = factor * severity[:, None]
    if COSINE:
        factor = factor * scale
    return factor if WIDE else factor.to(q.dtype)


@triton.jit
def key_factor(k, severity, norms, HAS_SEVERITY: tl.constexpr, COSINE: tl.constexpr, WIDE: tl.constexpr):
    """Return the keys' factor of the logits, ``s k`` or ``s k / ‖k‖``: float32 where WIDE, else in the dtype of k."""
    if HAS_SEVERITY or COSINE:
        factor = unit_rows(k, norms, COSINE)
        if HAS_SEVERITY:
            factor = factor * severity[:, None]
        return factor if WIDE else factor.to(k.dtype)
    else:
        return k.to(tl.float32) if WIDE else k


@triton.jit
def side_of(y, x, last, shift, WINDOW: tl.constexpr):
    """Return which side of the image a pixel (y, x) of a window is from: 2 for wrapped rows, plus 1 for columns.

    ``last`` says whether the window is in the last row, and in the last column, of windows.
    """
    wrapped_row = last[0] & (y >= WINDOW[0] - shift[0])
    wrapped_column = last[1] & (x >= WINDOW[1] - shift[1])
    return wrapped_row.to(tl.int32) * 2 + wrapped_column.to(tl.int32)


# Bias


@triton.jit
def bias_of_head(bias, head, WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, BIAS: tl.constexpr):
    """Return a pointer to the bias of a head: float32 (heads, span_y · span_x) or, "dense", (heads, queries, keys)."""
    if BIAS == "dense":
        return bias + head * (WINDOW[0] * WINDOW[1] * KEY_WINDOW[0] * KEY_WINDOW[1])
    else:
        return bias + head * ((WINDOW[0] + KEY_WINDOW[0] - 1) * (WINDOW[1] + KEY_WINDOW[1] - 1))


@triton.jit
def bias_of_query(y, x, WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, BIAS: tl.constexpr):
    """Return the index of a query in the bias of a head; that of a pair is this minus `bias_of_key`."""
    if BIAS == "dense":
        return (y * WINDOW[1] + x) * (KEY_WINDOW[0] * KEY_WINDOW[1])
    else:
        SPAN: tl.constexpr = WINDOW[1] + KEY_WINDOW[1] - 1
        return y * SPAN + x + ((KEY_WINDOW[0] - 1) * SPAN + KEY_WINDOW[1] - 1)


@triton.jit
def bias_of_key(y, x, WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, BIAS: tl.constexpr):
    """Return what a key subtracts from the index of a query in the bias of a head."""
    if BIAS == "dense":
        return -(y * KEY_WINDOW[1] + x)
    else:
        return y * (WINDOW[1] + KEY_WINDOW[1] - 1) + x


@triton.jit
def load_bias(bias, index, exists, BIAS: tl.constexpr, CHECKED: tl.constexpr):
    """Load elements of the bias, zeros where BIAS is "none"; −∞ for pairs that do not exist, where CHECKED.

    The compiler gives `tl.load` a layout of its own and moves the result through shared memory into the layout of the
    products. It treats inline assembly as arithmetic instead: the loads happen in the layout of the products, with
    constant offsets, and pairs of a thread with the same offset share a load. On NVIDIA GPUs, that saves a fifth of the
    instructions of a tile and all of its sixteen barriers; other GPUs have no PTX.
    """
    if BIAS == "none":
        found = tl.zeros(exists.shape, tl.float32)
    elif INTERPRETED:
        return tl.load(bias + index, mask=exists, other=float("-inf"))
    elif not has_ptx():
        found = tl.load(bias + index, mask=exists, other=0.0) if CHECKED else tl.load(bias + index)
    else:
        if CHECKED:
            index = tl.where(exists, index, 0)
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [(bias + index).to(tl.uint64, bitcast=True)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.where(exists, found, float("-inf")) if CHECKED else found


# Products


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Return an operand of a product: float32 rounded to the nearest tf32 where PRECISION is "tf32, rounded".

    Without rounding, tensor cores truncate the last bits. That error has twice the size, and always the same sign.
    """
    if PRECISION == "tf32, rounded" and not INTERPRETED and has_ptx():
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return ``a @ b``, accumulated in float32; PRECISION is "ieee", "tf32" or "tf32, rounded".

    GPUs without tf32 multiply float32 operands exactly: None stands for tf32 where the compiler has it.
    """
    INPUT: tl.constexpr = "ieee" if PRECISION == "ieee" else None
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=INPUT)


@triton.jit
def add_dot(a, b, accumulator, PRECISION: tl.constexpr):
    """Return ``accumulator + a @ b``. With PRECISION "ieee" the product is summed by itself first, which rounds less.

    The compiler would fold an addition into the product, but not a multiply-add.
    """
    if PRECISION == "ieee":
        return tl.fma(dot(a, b, PRECISION), 1.0, accumulator)
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), accumulator)


@triton.jit
def tile_of_logits(
    rows,
    columns,
    bias,
    bias_index,
    exists,
    visible,
    BIAS: tl.constexpr,
    CHECKED: tl.constexpr,
    MASKED: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a tile of logits in units of ln 2.

    Pairs that do not exist (where CHECKED) get −∞ in place of the bias, and pairs that are not ``visible`` (where
    MASKED) get −∞ or, if MASK is finite, the bias plus MASK. A product that is NaN stays NaN, as in the reference; a
    bias that −∞ replaces has no effect, even if it is NaN. The bias is the initial value of the accumulator, which
    costs no instruction on tensor cores.
    """
    start = load_bias(bias, bias_index, exists, BIAS, CHECKED)
    if MASKED:
        if float("-inf") == MASK:
            start = tl.where(visible, start, MASK)
        else:  # not a choice of two sums, both of which the compiler would keep where the bias is that of every window
            start += tl.where(visible, 0.0, MASK)
    return add_dot(rows, tl.trans(columns), start, PRECISION)


@triton.jit
def weights_and_gradient(
    rows,
    columns,
    left,
    right,
    lse,
    lse_rest,
    bias,
    bias_index,
    exists,
    visible,
    BIAS: tl.constexpr,
    CHECKED: tl.constexpr,
    MASKED: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a tile of softmax weights, recomputed from the log-sum-exp, and its gradient ``left @ rightᵀ``."""
    logits = tile_of_logits(rows, columns, bias, bias_index, exists, visible, BIAS, CHECKED, MASKED, MASK, PRECISION)
    weights = tl.exp2(logits - lse - lse_rest)
    return weights, dot(left, tl.trans(right), PRECISION)


@triton.jit
def load_lse(pointers, valid):
    """Load the log-sum-exp of some rows: as float32, and its rounding error, 0 where it is stored as float32."""
    lse = tl.load(pointers, mask=valid, other=0.0)
    rounded = lse.to(tl.float32)
    return rounded, (lse - rounded.to(lse.dtype)).to(tl.float32)


@triton.jit
def narrow_dot(a, b, accumulator, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``accumulator + a @ b``, the gradients of logits ``a`` rounded to the dtype of b; as tf32 where WIDE."""
    if WIDE:
        return add_dot(a, b.to(tl.float32), accumulator, PRECISION)
    return add_dot(a.to(b.dtype), b, accumulator, PRECISION)


# Windows


@triton.jit
def place_of_window(window, size, WINDOW: tl.constexpr):
    """Return row and column of a window in its image, whether each is the last, and the number of the image."""
    columns = size[1] // WINDOW[1]
    rows = size[0] // WINDOW[0]
    column = window % columns
    row = window // columns % rows
    return (row, column), (row == rows - 1, column == columns - 1), (window // columns // rows).to(tl.int64)


@triton.jit
def image_of_keys(size, shift, WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, MARGIN: tl.constexpr):
    """Return size and shift of the image of the keys, which has a window for each window of the queries."""
    step_y: tl.constexpr = KEY_WINDOW[0] - 2 * MARGIN
    step_x: tl.constexpr = KEY_WINDOW[1] - 2 * MARGIN
    if step_y == WINDOW[0] and step_x == WINDOW[1]:
        return size, shift
    else:
        key_size = (size[0] // WINDOW[0] * step_y, size[1] // WINDOW[1] * step_x)
        return key_size, (shift[0] * step_y // WINDOW[0], shift[1] * step_x // WINDOW[1])


@triton.jit
def keys_and_values(
    k,
    v,
    severity,
    j,
    place,
    size,
    shift,
    kv_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    MARGIN: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    COSINE: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    DILATED: tl.constexpr,
    FAR: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
):
    """Load the factors of the logits and the values of keys ``j`` of the window at ``place``; zeros outside the image.

    ``size`` and ``shift`` are those of the image of the keys.
    """
    return keys_and_values_at(
        k, v, severity, j // KEY_WINDOW[1], j % KEY_WINDOW[1], j < KEY_WINDOW[0] * KEY_WINDOW[1], place, size, shift,
        kv_stride, HEAD_DIM, BLOCK_D, KEY_WINDOW, MARGIN, HAS_SEVERITY, COSINE, WIDE_FACTORS,
        SHIFTED, DILATED, FAR, CHECK_KEYS or MARGIN > 0, False,
    )  # fmt: skip


@triton.jit
def keys_and_values_at(
    k,
    v,
    severity,
    ky,
    kx,
    exists,
    place,
    size,
    shift,
    kv_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    MARGIN: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    COSINE: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    DILATED: tl.constexpr,
    FAR: tl.constexpr,
    CHECKED: tl.constexpr,
    WITH_ONE: tl.constexpr,
):
    """Load the factors of the logits and the values of the keys (ky, kx) of the window at ``place``.

    Where CHECKED, keys that do not exist or are outside the image are zeros; else all keys must be inside. Where
    WITH_ONE, channel HEAD_DIM of all values is 1, so that a product with weights also gives the sum of the weights.
    """
    y = place[0] * (KEY_WINDOW[0] - 2 * MARGIN) - MARGIN + ky
    x = place[1] * (KEY_WINDOW[1] - 2 * MARGIN) - MARGIN + kx
    inside = exists & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    if not CHECKED:
        inside = tl.full(ky.shape, True, tl.int1)
    pixels = image_pixel(y, x, size, shift, KEY_WINDOW, SHIFTED, DILATED, FAR)
    keys = load_rows(k, pixels, kv_stride, inside, CHECKED, HEAD_DIM, BLOCK_D)
    values = load_rows(v, pixels, kv_stride, inside, CHECKED, HEAD_DIM, BLOCK_D)
    if WITH_ONE:
        values = tl.where((tl.arange(0, BLOCK_D) == HEAD_DIM)[None, :], 1.0, values).to(values.dtype)
    key_severity = severity_of(severity, pixels, inside, HAS_SEVERITY)
    return key_factor(keys, key_severity, norms_of(keys, COSINE), HAS_SEVERITY, COSINE, WIDE_FACTORS), values
