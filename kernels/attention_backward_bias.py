"""The gradient of the bias of both attentions in Triton. `savl.kernels.attention` describes all kernels together."""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import (
    bias_of_head,
    bias_of_key,
    bias_of_query,
    image_of_keys,
    image_pixel,
    keys_and_values,
    load_lse,
    load_rows,
    norms_of,
    place_of_window,
    query_factor,
    scale_of,
    severity_of,
    side_of,
    weights_and_gradient,
)


@triton.jit
def backward_bias(
    q,
    k,
    v,
    bias,
    severity,
    scale,
    lse,
    grad_out,
    delta,
    grad_logits_sum,
    windows,
    height,
    width,
    shift_y,
    shift_x,
    q_stride,
    kv_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    MARGIN: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    COSINE: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    DILATED: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum the gradients of the logits of BLOCK_M × BLOCK_N pairs of one head over every CHUNKS-th window.

    Owns: BLOCK_M queries × BLOCK_N keys of a window, for one head and one chunk of the windows.
    Reads: q, grad_out, log-sum-exp, delta and severity of the queries, k, v and severity of the keys, in one window
    after the other; the bias of the pairs.
    Keeps in registers: the sum, float32 (BLOCK_M, BLOCK_N), and tiles of weights and of their gradients.
    Writes: its part of grad_logits_sum, float32 (CHUNKS, heads, N, N').
    Bytes, e per number: e · d · 2 · (BLOCK_M + BLOCK_N) for each window, then 4 · BLOCK_M · BLOCK_N.
    FLOPs: 4 · BLOCK_D · BLOCK_M · BLOCK_N for each window, and an exponential for each pair.
    """
    QUERIES: tl.constexpr = WINDOW[0] * WINDOW[1]
    KEYS: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    QUERY_TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    KEY_TILES: tl.constexpr = (KEYS + BLOCK_N - 1) // BLOCK_N
    CHECK_KEYS: tl.constexpr = KEYS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    program = tl.program_id(0)
    key_tile = program % KEY_TILES
    query_tile = program // KEY_TILES % QUERY_TILES
    head = program // (KEY_TILES * QUERY_TILES) % HEADS
    chunk = program // (KEY_TILES * QUERY_TILES * HEADS)

    i = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qy = i // WINDOW[1]
    qx = i % WINDOW[1]
    is_query = i < QUERIES
    j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ky = j // KEY_WINDOW[1]
    kx = j % KEY_WINDOW[1]
    exists = is_query[:, None] & (j < KEYS)[None, :]
    bias_index = (
        bias_of_query(qy, qx, WINDOW, KEY_WINDOW, BIAS)[:, None]
        - bias_of_key(ky, kx, WINDOW, KEY_WINDOW, BIAS)[None, :]
    )
    bias = bias_of_head(bias, head, WINDOW, KEY_WINDOW, BIAS)
    head_scale = scale_of(scale, head, COSINE)
    size = (height, width)
    shift = (shift_y, shift_y if shift_x is None else shift_x)
    key_size, key_shift = image_of_keys(size, shift, WINDOW, KEY_WINDOW, MARGIN)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in tl.range(chunk, windows, CHUNKS, num_stages=STAGES):
        place, last, batch = place_of_window(window, size, WINDOW)
        image = batch * height * width
        key_image = batch * key_size[0] * key_size[1]
        plane = image * HEADS + head.to(tl.int64) * height * width
        pixels = image_pixel(
            place[0] * WINDOW[0] + qy, place[1] * WINDOW[1] + qx, size, shift, WINDOW, SHIFTED, DILATED, FAR
        )
        q_base = q + image * q_stride + head * HEAD_DIM
        raw_q = load_rows(q_base, pixels, q_stride, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        query_severity = severity_of(severity + image, pixels, is_query, HAS_SEVERITY)
        queries = query_factor(
            raw_q, query_severity, norms_of(raw_q, COSINE), head_scale, SCALE,
            HAS_SEVERITY, COSINE, WIDE_FACTORS,
        )  # fmt: skip
        grad_base = grad_out + image * (HEADS * HEAD_DIM) + head * HEAD_DIM
        rows_grad = load_rows(grad_base, pixels, HEADS * HEAD_DIM, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        row_lse, row_lse_rest = load_lse(lse + plane + pixels, is_query)
        row_delta = tl.load(delta + plane + pixels, mask=is_query, other=0.0)
        kv_base = key_image * kv_stride + head * HEAD_DIM
        keys, values = keys_and_values(
            k + kv_base, v + kv_base, severity + image, j, place, key_size, key_shift, kv_stride,
            HEAD_DIM, BLOCK_D, KEY_WINDOW, MARGIN, HAS_SEVERITY, COSINE, WIDE_FACTORS,
            SHIFTED, DILATED, FAR, CHECK_KEYS,
        )  # fmt: skip
        visible = exists
        if SHIFTED:
            query_side = side_of(qy, qx, last, shift, WINDOW)
            visible = query_side[:, None] == side_of(ky, kx, last, key_shift, KEY_WINDOW)[None, :]
        weights, grad_weights = weights_and_gradient(
            queries, keys, rows_grad, values, row_lse[:, None], row_lse_rest[:, None],
            bias, bias_index, exists, visible, BIAS, CHECK_KEYS or CHECK_QUERIES, SHIFTED, MASK, PRECISION,
        )  # fmt: skip
        total += weights * (grad_weights - row_delta[:, None])
    base = grad_logits_sum + (chunk * HEADS + head).to(tl.int64) * (QUERIES * KEYS)
    tl.store(base + i[:, None] * KEYS + j[None, :], total, mask=exists)


@triton.jit
def fold_bias(
    grad_logits_sum,
    grad_table,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr,
):
    """Sum the gradients of the logits over all pairs with the same offset: the gradient of the bias table.

    Owns: one row of the table, the offsets with the same dy, for one head.
    Reads: the pairs with this dy of grad_logits_sum, float32 (heads, N, N'): what `backward_bias` wrote, summed over
    chunks.
    Keeps in registers: the sum, float32 (BLOCK_QUERIES, BLOCK_SPAN), powers of two of at least the width of a window
    and the number of offsets along a row.
    Writes: a row of grad_table (span_y · span_x, heads), span_x numbers.
    Bytes: at most 4 · N times the width of a key window; FLOPs: as many additions as pairs.
    """
    QUERIES: tl.constexpr = WINDOW[0] * WINDOW[1]
    KEYS: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    SPAN: tl.constexpr = WINDOW[1] + KEY_WINDOW[1] - 1
    head = tl.program_id(0) % HEADS
    table_y = tl.program_id(0) // HEADS
    table_x = tl.arange(0, BLOCK_SPAN)
    qx = tl.arange(0, BLOCK_QUERIES)
    kx = qx[:, None] + (KEY_WINDOW[1] - 1) - table_x[None, :]
    valid = (qx < WINDOW[1])[:, None] & (table_x < SPAN)[None, :] & (kx >= 0) & (kx < KEY_WINDOW[1])
    grad_logits_sum += head * (QUERIES * KEYS)
    total = tl.zeros([BLOCK_QUERIES, BLOCK_SPAN], tl.float32)
    for qy in range(tl.maximum(table_y - (KEY_WINDOW[0] - 1), 0), tl.minimum(table_y + 1, WINDOW[0])):
        ky = qy + (KEY_WINDOW[0] - 1) - table_y
        pairs = (qy * WINDOW[1] + qx)[:, None] * KEYS + ky * KEY_WINDOW[1] + kx
        total += tl.load(grad_logits_sum + pairs, mask=valid, other=0.0)
    sums = tl.sum(total, 0).to(grad_table.dtype.element_ty)
    tl.store(grad_table + (table_y * SPAN + table_x) * HEADS + head, sums, mask=table_x < SPAN)
