"""What the attention kernels are made of: addresses of pixels, rows of heads, factors, tiles of logits, windows."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Addresses


@triton.jit
def image_pixel(y, x, height, width, shift, SHIFTED: tl.constexpr, FAR: tl.constexpr):
    """Number in its image of a pixel of the rolled image."""
    if SHIFTED:
        y += shift
        y = tl.where(y >= height, y - height, y)
        x += shift
        x = tl.where(x >= width, x - width, x)
    pixel = y * width + x
    return pixel.to(tl.int64) if FAR else pixel


@triton.jit
def load_rows(base, pixels, stride, valid, CHECKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``(rows, BLOCK_D)``: one head of some pixels, zeros past the head and where not ``valid``."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (pixels * stride)[:, None] + d[None, :]
    if CHECKED:
        return tl.load(pointers, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, pixels, stride, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write one head of some pixels where ``valid``, rounded to the dtype of the tensor."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (pixels * stride)[:, None] + d[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=valid[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def severity_of(severity, pixels, valid, HAS_SEVERITY: tl.constexpr):
    """``(rows,)`` float32: severity of some pixels, 0 where not ``valid``; nothing in particular without severity."""
    if HAS_SEVERITY:
        return tl.load(severity + pixels, mask=valid, other=0.0).to(tl.float32)
    return 0.0 * valid.to(tl.float32)


@triton.jit
def query_factor(q, severity, SCALE: tl.constexpr, HAS_SEVERITY: tl.constexpr, WIDE: tl.constexpr):
    """The queries' factor of the logits, ``s q log₂ e / √d``, rounded to their dtype or, where WIDE, float32."""
    factor = q.to(tl.float32) * (SCALE * LOG2E)
    if HAS_SEVERITY:
        factor = factor * severity[:, None]
    return factor if WIDE else factor.to(q.dtype)


@triton.jit
def key_factor(k, severity, HAS_SEVERITY: tl.constexpr, WIDE: tl.constexpr):
    """The keys' factor of the logits, ``s k``, likewise."""
    if HAS_SEVERITY:
        factor = k.to(tl.float32) * severity[:, None]
        return factor if WIDE else factor.to(k.dtype)
    else:
        return k.to(tl.float32) if WIDE else k


@triton.jit
def side_of(y, x, last_row, last_column, shift, WINDOW: tl.constexpr):
    """Which side of the image a pixel (y, x) of a window comes from: wrapped-around rows and columns count 2 and 1."""
    wrapped_row = last_row & (y >= WINDOW - shift)
    wrapped_column = last_column & (x >= WINDOW - shift)
    return wrapped_row.to(tl.int32) * 2 + wrapped_column.to(tl.int32)


@triton.jit
def load_bias(bias, index, exists, CHECKED: tl.constexpr):
    """Elements of the table, −∞ for pairs that do not exist where CHECKED.

    A plain load takes a layout of its own, and its result goes through shared memory into that of the products. The
    instruction written out is, to the compiler, arithmetic like any other: it is done in the layout of the products,
    with offsets that are constants, and pairs of a thread with the same offset share a load. That is a fifth fewer
    instructions a tile and no barrier, where there were sixteen.
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
    """An operand of a product. A float32 is rounded to the nearest tf32 where PRECISION is "tf32, rounded".

    Tensor cores cut its last bits off otherwise, which always errs to one side, and by twice as much.
    """
    if PRECISION == "tf32, rounded" and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a @ b``, summed up in float32; PRECISION is "ieee", "tf32" or "tf32, rounded"."""
    INPUT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32"
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=INPUT)


@triton.jit
def add_dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``; in float32 proper the product is summed up by itself first, which rounds less.

    The compiler would fold a sum into the product. It leaves a multiply-add alone.
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
    """A tile of logits in units of ln 2.

    −∞ is added instead of the bias to pairs that do not exist (where CHECKED) or are not ``visible`` (where MASKED);
    a product that is NaN stays NaN, as in the reference, but a NaN bias of a pair that is not visible is not looked at.
    The bias is what the product is added to, which costs no instruction on tensor cores.
    """
    start = load_bias(bias, bias_index, exists, CHECKED)
    if MASKED:
        start = tl.where(visible, start, float("-inf"))
    return add_dot(rows, tl.trans(columns), start, PRECISION)


@triton.jit
def load_lse(pointers, valid):
    """Log-sum-exp of some rows as a float32 and what it lacks; that is nothing where the log-sum-exp is float32."""
    lse = tl.load(pointers, mask=valid, other=0.0)
    rounded = lse.to(tl.float32)
    return rounded, (lse - rounded.to(lse.dtype)).to(tl.float32)


@triton.jit
def narrow_dot(a, b, accumulator, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Add ``a @ b`` for float32 gradients of logits ``a``, rounded to the dtype of b; in tf32 where that overflows."""
    if WIDE:
        return add_dot(a, b.to(tl.float32), accumulator, PRECISION)
    return add_dot(a.to(b.dtype), b, accumulator, PRECISION)


# Windows


@triton.jit
def place_of_window(window, height, width, WINDOW: tl.constexpr):
    """Where a window is: row and column among the windows of its image, whether they are the last, pixels before it."""
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
    """Factors of the logits and values of the keys with numbers ``j`` of a window; zeros outside the image."""
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
