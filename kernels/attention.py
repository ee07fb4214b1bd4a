r"""The Triton kernels of both attentions: key windows are as large as the query windows or larger.

The forward pass is here, the backward pass in `attention_backward`.

For each head, a query pixel i of a w×w window and a key pixel j of the o×o window with the same centre:

    logits_ij = s_i · s_j · (q_i · k_j) / √d + bias[i − j]     (−∞ between sides of a shifted image)
    out_i     = Σ_j softmax_j(logits_ij) · v_j

Nothing is rearranged in memory. Pixels are addressed in the image rolled by ``−shift``: pixel (y, x) of the rolled
image is at row (y + shift) mod H and column (x + shift) mod W of the image, so windows and shifts are address
arithmetic. Keys outside the image are zeros that take part in the softmax. No pixel of a shifted window lies outside.

There are four kernels. A program keeps a tile of scores in registers, and no scores are stored in memory:

================  ==========================  ===============================  ==========================
kernel            a program owns              it loops over                    products of d · M · N each
================  ==========================  ===============================  ==========================
`forward`         M query rows, one head      the o² keys of their window      2 (q k, p v)
`backward_q`      M query rows, one head      the o² keys of their window      3 (q k, do v, ds k)
`backward_kv`     N key pixels, one head      the windows that see them, M     4 (q k, p do, do v, ds q)
                                              queries at a time
`backward_bias`   M × N pairs of a window     its share of all windows         2 (q k, do v)
================  ==========================  ===============================  ==========================

The backward pass recomputes the scores from the log-sum-exp that `forward` writes. `backward_bias` sums the gradients
of the logits over windows, for each pair, and `fold_bias` sums them over pairs with the same offset. The order of every
sum depends on shapes and block sizes alone, without atomics, so every run gives the same bits.

A program of `forward` with window 16, d = 24, bfloat16 and M = 128 reads 6 144 bytes of q and 24 576 (o = 16) or 55 296
(o = 24) of k and v, writes 6 656, and computes 4 · 32 · M · o² = 4.2 or 9.4 MFLOP (d is padded to 32). The programs of
a window share k and v through the L2 cache, so device memory moves 8.2 bytes per channel of a pixel. On an H100 (3.35
TB/s, 989 TFLOP/s of dense bfloat16, 16 exponentials per cycle and multiprocessor) 512×512 pixels with 6 heads take at
least

    o = 16    memory  92 µs    tensor cores  52 µs    exponentials 109 µs
    o = 24    memory  92 µs    tensor cores 117 µs    exponentials 245 µs

The exponentials limit both; about five float32 operations and one cached load of the bias per score take nearly as
long.

Logits are in units of ln 2, so that an exponential is one instruction: ``bias`` is passed multiplied by log₂ e, and the
kernels multiply the queries by it. Scores, sums and statistics are float32 for every dtype. Severity multiplies rows of
q and k before the product, as in the reference. With float16 tensors, these rows and the gradients of the logits could
overflow. They stay float32 and are multiplied as tf32, which has the mantissa of float16 and the range of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import (
    add_dot,
    image_pixel,
    keys_and_values,
    load_rows,
    place_of_window,
    query_factor,
    severity_of,
    side_of,
    store_rows,
    tile_of_logits,
)


@triton.jit
def _attend(
    q,
    query_index,
    query_side,
    valid,
    k,
    v,
    bias,
    severity,
    row,
    column,
    last_row,
    last_column,
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
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the online softmax over the keys of a window.

    Returns the sum of weighted values, the largest logit and the sum of weights of each row. The values are float32
    (BLOCK_M, BLOCK_D) and stay in registers, as does one (BLOCK_M, BLOCK_N) tile of logits.
    """
    KEYS: tl.constexpr = KEY_WINDOW * KEY_WINDOW
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    CHECK_KEYS: tl.constexpr = KEYS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = (WINDOW * WINDOW) % BLOCK_M != 0
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, KEYS, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        ky = j // KEY_WINDOW
        kx = j % KEY_WINDOW
        keys, values = keys_and_values(
            k, v, severity, j, row, column, height, width, shift, kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, CHECK_KEYS,
        )  # fmt: skip
        exists = valid[:, None] & (j < KEYS)[None, :]
        visible = exists
        if MASKED:
            visible = query_side[:, None] == side_of(ky, kx, last_row, last_column, shift, WINDOW)[None, :]
        logits = tile_of_logits(
            q, keys, bias, query_index[:, None] - (ky * SPAN + kx)[None, :], exists, visible,
            CHECK_KEYS or CHECK_QUERIES, MASKED, PRECISION,
        )  # fmt: skip
        now_largest = tl.maximum(largest, tl.max(logits, 1))
        # All logits of a row may have been −∞ so far, and −∞ − (−∞) is NaN.
        centre = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(logits - centre[:, None])
        shrink = tl.exp2(largest - centre)
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None]
        attended = add_dot(weights.to(values.dtype), values, attended, PRECISION)
        largest = now_largest
    return attended, largest, total


@triton.jit
def forward(
    q,
    k,
    v,
    bias,
    severity,
    out,
    lse,
    height,
    width,
    shift,
    q_stride,
    kv_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the output and the log-sum-exp of BLOCK_M queries of one window and head.

    Owns: BLOCK_M of the w² queries of a window, for one head.
    Reads: their q, k and v of the o² keys in steps of BLOCK_N, one bias per pair, and the severity of both.
    Keeps in registers: the queries, the weighted values in float32, the largest logit and the sum of weights of each
    row, and one tile of BLOCK_M × BLOCK_N logits.
    Writes: out and the log-sum-exp of its queries.
    Bytes, e per number: e · d · (2 · BLOCK_M + 2 · o²) for q, out, k and v; 4 or 8 a query for the log-sum-exp. k and v
    come from the L2 cache for all but one program of a window.
    FLOPs: 4 · BLOCK_D · BLOCK_M · o², and as many exponentials as pairs.

    Pointers: q, k and v to the first channel of the first head, channels contiguous; bias float32 (heads, span, span);
    severity (B, H, W); out (B, H, W, heads · d); lse (B, heads, H, W) in units of ln 2. lse is float32, but float64 for
    float32 tensors, because its rounding error is one of all weights of a row.
    """
    QUERIES: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    program = tl.program_id(0)
    head = program // TILES % HEADS
    row, column, last_row, last_column, image = place_of_window(program // (TILES * HEADS), height, width, WINDOW)

    i = program % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    qy = i // WINDOW
    qx = i % WINDOW
    valid = i < QUERIES
    pixels = image_pixel(row * WINDOW + qy, column * WINDOW + qx, height, width, shift, SHIFTED, FAR)
    severity += image
    q += image * q_stride + head * HEAD_DIM
    raw_q = load_rows(q, pixels, q_stride, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
    query_severity = severity_of(severity, pixels, valid, HAS_SEVERITY)
    queries = query_factor(raw_q, query_severity, SCALE, HAS_SEVERITY, WIDE_FACTORS)
    query_index = qy * SPAN + qx + (KEY_WINDOW - 1) * (SPAN + 1)
    k += image * kv_stride + head * HEAD_DIM
    v += image * kv_stride + head * HEAD_DIM
    bias += head * SPAN * SPAN
    side = side_of(qy, qx, last_row, last_column, shift, WINDOW)
    # Only the last windows of a shifted image contain pixels from several sides of the image.
    at_edge = (last_row | last_column) if SHIFTED else False
    if at_edge:
        attended, largest, total = _attend(
            queries, query_index, side, valid, k, v, bias, severity, row, column, last_row,
            last_column, height, width, shift, kv_stride, HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW,
            HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, True, BLOCK_M, BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
    else:
        attended, largest, total = _attend(
            queries, query_index, side, valid, k, v, bias, severity, row, column, last_row,
            last_column, height, width, shift, kv_stride, HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW,
            HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, False, BLOCK_M, BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
    plane = image * HEADS + head.to(tl.int64) * height * width
    row_lse = largest.to(lse.dtype.element_ty) + tl.log2(total).to(lse.dtype.element_ty)
    tl.store(lse + plane + pixels, row_lse, mask=valid)
    out += image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    store_rows(out, pixels, HEADS * HEAD_DIM, attended / total[:, None], valid, HEAD_DIM, BLOCK_D)
