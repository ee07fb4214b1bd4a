"""Functions that the attention kernels are made of: addresses, loads and stores, products, tiles of logits, windows."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Addresses


@triton.jit
def image_pixel(y, x, height, width, shift, SHIFTED: tl.constexpr, FAR: tl.constexpr):
    """Return the index in the image of pixel (y, x) of the rolled image; 64-bit where FAR."""
    if SHIFTED:
        y += shift
        y = tl.where(y >= height, y - height, y)
        x += shift
        x = tl.where(x >= width, x - width, x)
    pixel = y * width + x
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
def query_factor(q, severity, SCALE: tl.constexpr, HAS_SEVERITY: tl.constexpr, WIDE: tl.constexpr):
    """Return the queries' factor of the logits, ``s q log₂ e / √d``: float32 where WIDE, else in the dtype of q."""
    factor = q.to(tl.float32) * (SCALE * LOG2E)
    if HAS_SEVERITY:
        factor = factor * severity[:, None]
    return factor if WIDE else factor.to(q.dtype)


@triton.jit
def key_factor(k, severity, HAS_SEVERITY: tl.constexpr, WIDE: tl.constexpr):
    """Return the keys' factor of the logits, ``s k``: float32 where WIDE, else in the dtype of k."""
    if HAS_SEVERITY:
        factor = k.to(tl.float32) * severity[:, None]
        return factor if WIDE else factor.to(k.dtype)
    else:
        return k.to(tl.float32) if WIDE else k


@triton.jit
def side_of(y, x, last_row, last_column, shift, WINDOW: tl.constexpr):
    """Return which side of the image a pixel (y, x) of a window is from: 2 for wrapped rows, plus 1 for columns."""
    wrapped_row = last_row & (y >= WINDOW - shift)
    wrapped_column = last_column & (x >= WINDOW - shift)
    return wrapped_row.to(tl.int32) * 2 + wrapped_column.to(tl.int32)


@triton.jit
def load_bias(bias, index, exists, CHECKED: tl.constexpr):
    """Load elements of the bias table; −∞ for pairs that do not exist, where CHECKED.

    The compiler gives `tl.load` a layout of its own and moves the result through shared memory into the layout of the
    products. It treats inline assembly as arithmetic instead: the loads happen in the layout of the products, with
    constant offsets, and pairs of a thread with the same offset share a load. That saves a fifth of the instructions of
    a tile and all of its sixteen barriers.
    """
    if INTERPRETED:
        return tl.load(bias + index, mask=exists, other=float("-inf"))
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


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Return an operand of a product: float32 rounded to the nearest tf32 where PRECISION is "tf32, rounded".

    Without rounding, tensor cores truncate the last bits. That error has twice the size, and always the same sign.
    """
    if PRECISION == "tf32, rounded" and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return ``a @ b``, accumulated in float32; PRECISION is "ieee", "tf32" or "tf32, rounded"."""
    INPUT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32"
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=INPUT)


@triton.jit
def add_dot(a, b, accumulator, PRECISION: tl.constexpr):
    """Return ``accumulator + a @ b``. With PRECISION "ieee" the product is summed by itself first, which rounds less.

    The compiler would fold an addition into the product, but not a multiply-add.
    """
    if PRECISION == "ieee":
        return tl.fma(dot(a, b, PRECISION), 1.0, accumulator)
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), accumulator, input_precision="tf32")


@triton.jit
def tile_of_logits(
    rows,
    columns,
    bias,
    bias_index,
    exists,
    visible,
    CHECKED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a tile of logits in units of ln 2.

    Pairs that do not exist (where CHECKED) or are not ``visible`` (where MASKED) get −∞ in place of the bias. A product
    that is NaN stays NaN, as in the reference; the bias of a pair that is not visible has no effect, even if it is NaN.
    The bias is the initial value of the accumulator, which costs no instruction on tensor cores.
    """
    start = load_bias(bias, bias_index, exists, CHECKED)
    if MASKED:
        start = tl.where(visible, start, float("-inf"))
    return add_dot(rows, tl.trans(columns), start, PRECISION)


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
def place_of_window(window, height, width, WINDOW: tl.constexpr):
    """Return row and column of a window in its image, whether each is the last, and the pixels before the image."""
    columns = width // WINDOW
    rows = height // WINDOW
    column = window % columns
    row = window // columns % rows
    batch = (window // (columns * rows)).to(tl.int64)
    return row, column, row == rows - 1, column == columns - 1, batch * height * width


@triton.jit
def keys_and_values(
    k,
    v,
    severity,
    j,
    row,
    column,
    height,
    width,
    shift,
    kv_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    FAR: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
):
    """Load the factors of the logits and the values of keys ``j`` of a window; zeros outside the image."""
    MARGIN: tl.constexpr = (KEY_WINDOW - WINDOW) // 2
    CHECKED: tl.constexpr = CHECK_KEYS or MARGIN > 0
    y = row * WINDOW - MARGIN + j // KEY_WINDOW
    x = column * WINDOW - MARGIN + j % KEY_WINDOW
    inside = (j < KEY_WINDOW * KEY_WINDOW) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixels = image_pixel(y, x, height, width, shift, SHIFTED, FAR)
    keys = load_rows(k, pixels, kv_stride, inside, CHECKED, HEAD_DIM, BLOCK_D)
    values = load_rows(v, pixels, kv_stride, inside, CHECKED, HEAD_DIM, BLOCK_D)
    key_severity = severity_of(severity, pixels, inside, HAS_SEVERITY)
    return key_factor(keys, key_severity, HAS_SEVERITY, WIDE_FACTORS), values
