"""The backward pass of both attentions in Triton. `savl.kernels.attention` describes all kernels together."""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import (
    LOG2E,
    add_dot,
    dot,
    image_pixel,
    key_factor,
    keys_and_values,
    load_lse,
    load_rows,
    narrow_dot,
    place_of_window,
    query_factor,
    severity_of,
    side_of,
    store_rows,
    tile_of_logits,
)


@triton.jit
def _weights(
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
    CHECKED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a tile of softmax weights, recomputed from the log-sum-exp, and its gradient ``left @ rightᵀ``."""
    logits = tile_of_logits(rows, columns, bias, bias_index, exists, visible, CHECKED, MASKED, PRECISION)
    weights = tl.exp2(logits - lse - lse_rest)
    return weights, dot(left, tl.trans(right), PRECISION)


@triton.jit
def _weights_of_keys(
    queries,
    query_index,
    query_side,
    valid,
    rows_grad,
    row_lse,
    row_lse_rest,
    k,
    v,
    bias,
    severity,
    j,
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
    CHECK_KEYS: tl.constexpr,
    CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the `_weights` of some queries for the keys ``j`` of their window, and the keys' factors of the logits."""
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    ky = j // KEY_WINDOW
    kx = j % KEY_WINDOW
    keys, values = keys_and_values(
        k, v, severity, j, row, column, height, width, shift, kv_stride,
        HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, CHECK_KEYS,
    )  # fmt: skip
    exists = valid[:, None] & (j < KEY_WINDOW * KEY_WINDOW)[None, :]
    visible = exists
    if SHIFTED:
        visible = query_side[:, None] == side_of(ky, kx, last_row, last_column, shift, WINDOW)[None, :]
    weights, grad_weights = _weights(
        queries, keys, rows_grad, values, row_lse[:, None], row_lse_rest[:, None],
        bias, query_index[:, None] - (ky * SPAN + kx)[None, :], exists, visible, CHECKED, SHIFTED, PRECISION,
    )  # fmt: skip
    return weights, grad_weights, keys


@triton.jit
def backward_q(
    q,
    k,
    v,
    bias,
    severity,
    out,
    lse,
    grad_out,
    delta,
    grad_q,
    grad_severity,
    height,
    width,
    shift,
    q_stride,
    kv_stride,
    grad_stride,
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
    """Compute the gradient of BLOCK_M queries of one window and head, and of their severity through q.

    Owns: BLOCK_M of the w² queries of a window, for one head.
    Reads: their q, out, grad_out and log-sum-exp, k and v of the o² keys in steps of BLOCK_N, one bias per pair, and
    the severity of both.
    Keeps in registers: queries, rows of grad_out and the gradient in float32, and tiles of BLOCK_M × BLOCK_N weights
    and of their gradients.
    Writes: grad_q, delta and grad_severity of its queries.
    Bytes, e per number: e · d · (4 · BLOCK_M + 2 · o²) for q, out, grad_out, grad_q, k and v; 12 to 16 a query.
    FLOPs: 6 · BLOCK_D · BLOCK_M · o², and 4 more for float32, and an exponential for each pair and loop.

    Pointers besides those of `forward`: out and grad_out contiguous (B, H, W, heads · d); grad_q with strides of its
    own; delta float32 (B, heads, H, W), the weighted mean of the weights' gradients, which `backward_kv` and
    `backward_bias` read too; grad_severity float32 (B, heads, H, W), the share of each head.

    Delta equals the product of out and grad_out, and is computed so for 16-bit tensors. For float32 tensors a first
    loop over the keys computes it: where one weight is nearly 1, its gradient minus delta is nearly 0, which holds only
    when both come from the same arithmetic.
    """
    QUERIES: tl.constexpr = WINDOW * WINDOW
    KEYS: tl.constexpr = KEY_WINDOW * KEY_WINDOW
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    CHECK_KEYS: tl.constexpr = KEYS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    CHECKED: tl.constexpr = CHECK_KEYS or CHECK_QUERIES
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float16
    program = tl.program_id(0)
    head = program // TILES % HEADS
    row, column, last_row, last_column, image = place_of_window(program // (TILES * HEADS), height, width, WINDOW)

    i = program % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    qy = i // WINDOW
    qx = i % WINDOW
    valid = i < QUERIES
    pixels = image_pixel(row * WINDOW + qy, column * WINDOW + qx, height, width, shift, SHIFTED, FAR)
    plane = image * HEADS + head.to(tl.int64) * height * width
    severity += image
    q += image * q_stride + head * HEAD_DIM
    raw_q = load_rows(q, pixels, q_stride, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
    query_severity = severity_of(severity, pixels, valid, HAS_SEVERITY)
    queries = query_factor(raw_q, query_severity, SCALE, HAS_SEVERITY, WIDE_FACTORS)
    interleaved = image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    rows_grad = load_rows(grad_out + interleaved, pixels, HEADS * HEAD_DIM, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
    row_lse, row_lse_rest = load_lse(lse + plane + pixels, valid)

    query_index = qy * SPAN + qx + (KEY_WINDOW - 1) * (SPAN + 1)
    k += image * kv_stride + head * HEAD_DIM
    v += image * kv_stride + head * HEAD_DIM
    bias += head * SPAN * SPAN
    side = side_of(qy, qx, last_row, last_column, shift, WINDOW)
    if q.dtype.element_ty == tl.float32:
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, KEYS, BLOCK_N, num_stages=STAGES):
            weights, grad_weights, _ = _weights_of_keys(
                queries, query_index, side, valid, rows_grad, row_lse, row_lse_rest,
                k, v, bias, severity, start + tl.arange(0, BLOCK_N), row, column, last_row, last_column,
                height, width, shift, kv_stride, HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW,
                HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, CHECK_KEYS, CHECKED, PRECISION,
            )  # fmt: skip
            row_delta += tl.sum(weights * grad_weights, 1)
    else:
        rows_out = load_rows(out + interleaved, pixels, HEADS * HEAD_DIM, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        row_delta = tl.sum(rows_out.to(tl.float32) * rows_grad.to(tl.float32), 1)
    tl.store(delta + plane + pixels, row_delta, mask=valid)

    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, KEYS, BLOCK_N, num_stages=STAGES):
        weights, grad_weights, keys = _weights_of_keys(
            queries, query_index, side, valid, rows_grad, row_lse, row_lse_rest,
            k, v, bias, severity, start + tl.arange(0, BLOCK_N), row, column, last_row, last_column,
            height, width, shift, kv_stride, HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW,
            HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, CHECK_KEYS, CHECKED, PRECISION,
        )  # fmt: skip
        grad_logits = weights * (grad_weights - row_delta[:, None])
        gradient = narrow_dot(grad_logits, keys, gradient, WIDE, PRECISION)
    gradient = gradient * SCALE  # of s_i q_i
    if HAS_SEVERITY:
        share = tl.sum(raw_q.to(tl.float32) * gradient, 1)
        tl.store(grad_severity + plane + pixels, share, mask=valid)
        gradient = gradient * query_severity[:, None]
    grad_q += image * grad_stride + head * HEAD_DIM
    store_rows(grad_q, pixels, grad_stride, gradient, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_kv(
    q,
    k,
    v,
    bias,
    severity,
    lse,
    grad_out,
    delta,
    grad_k,
    grad_v,
    grad_severity,
    height,
    width,
    shift,
    q_stride,
    kv_stride,
    grad_stride,
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
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradients of TILE_HEIGHT × TILE_WIDTH key pixels of one head, from all windows that see them.

    Owns: N = TILE_HEIGHT · TILE_WIDTH key pixels of the rolled image, for one head.
    Reads: their k, v and severity; and of each window that sees them, in steps of BLOCK_M, q, grad_out, log-sum-exp,
    delta and severity of the queries, and one bias per pair. Without overlap that is one window where tiles divide it.
    Keeps in registers: keys, values and both gradients in float32, and tiles of N × BLOCK_M weights and of their
    gradients.
    Writes: grad_k, grad_v and grad_severity of its pixels.
    Bytes, e per number: e · d · 4 · N for k, v and their gradients, e · d · 2 · w² for each window that sees them.
    FLOPs: 8 · BLOCK_D · N · w² for each window that sees them, and an exponential for each pair.

    Pointers besides those of `backward_q`: grad_k and grad_v with the same strides; grad_severity float32
    (B, heads, H, W), the share through k of each head.
    """
    QUERIES: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    MARGIN: tl.constexpr = (KEY_WINDOW - WINDOW) // 2
    BLOCK_N: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    # Whether every pixel of a tile is a key of the one window that contains the tile.
    ALIGNED: tl.constexpr = MARGIN == 0 and WINDOW % TILE_HEIGHT == 0 and WINDOW % TILE_WIDTH == 0
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    CHECKED: tl.constexpr = CHECK_QUERIES or not ALIGNED
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float16
    program = tl.program_id(0)
    head = program % HEADS
    tile = program // HEADS
    tile_columns = tl.cdiv(width, TILE_WIDTH)
    tile_rows = tl.cdiv(height, TILE_HEIGHT)
    first_x = tile % tile_columns * TILE_WIDTH
    first_y = tile // tile_columns % tile_rows * TILE_HEIGHT
    image = (tile // (tile_columns * tile_rows)).to(tl.int64) * height * width

    j = tl.arange(0, BLOCK_N)
    key_y = first_y + j // TILE_WIDTH
    key_x = first_x + j % TILE_WIDTH
    inside = (key_y < height) & (key_x < width)
    key_pixels = image_pixel(key_y, key_x, height, width, shift, SHIFTED, FAR)
    plane = image * HEADS + head.to(tl.int64) * height * width
    severity += image
    kv_base = image * kv_stride + head * HEAD_DIM
    raw_k = load_rows(k + kv_base, key_pixels, kv_stride, inside, not ALIGNED, HEAD_DIM, BLOCK_D)
    values = load_rows(v + kv_base, key_pixels, kv_stride, inside, not ALIGNED, HEAD_DIM, BLOCK_D)
    key_severity = severity_of(severity, key_pixels, inside, HAS_SEVERITY)
    keys = key_factor(raw_k, key_severity, HAS_SEVERITY, WIDE_FACTORS)

    rows = height // WINDOW
    columns = width // WINDOW
    first_row = tl.maximum(first_y - MARGIN, 0) // WINDOW
    first_column = tl.maximum(first_x - MARGIN, 0) // WINDOW
    last_row = tl.minimum((first_y + TILE_HEIGHT - 1 + MARGIN) // WINDOW, rows - 1)
    last_column = tl.minimum((first_x + TILE_WIDTH - 1 + MARGIN) // WINDOW, columns - 1)
    across = last_column - first_column + 1
    steps = (last_row - first_row + 1) * across * TILES

    q += image * q_stride + head * HEAD_DIM
    grad_out += image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    lse += plane
    delta += plane
    bias += head * SPAN * SPAN
    grad_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = first_row + step // (across * TILES)
        column = first_column + step // TILES % across
        i = step % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        qy = i // WINDOW
        qx = i % WINDOW
        is_query = i < QUERIES
        pixels = image_pixel(row * WINDOW + qy, column * WINDOW + qx, height, width, shift, SHIFTED, FAR)
        raw_q = load_rows(q, pixels, q_stride, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        rows_grad = load_rows(grad_out, pixels, HEADS * HEAD_DIM, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        query_severity = severity_of(severity, pixels, is_query, HAS_SEVERITY)
        queries = query_factor(raw_q, query_severity, SCALE, HAS_SEVERITY, WIDE_FACTORS)
        row_lse, row_lse_rest = load_lse(lse + pixels, is_query)
        row_delta = tl.load(delta + pixels, mask=is_query, other=0.0)

        ky = key_y - row * WINDOW + MARGIN
        kx = key_x - column * WINDOW + MARGIN
        is_key = inside & (ky >= 0) & (ky < KEY_WINDOW) & (kx >= 0) & (kx < KEY_WINDOW)
        exists = is_key[:, None] & is_query[None, :]
        visible = exists
        if SHIFTED:
            at_bottom = row == rows - 1
            at_right = column == columns - 1
            key_side = side_of(ky, kx, at_bottom, at_right, shift, WINDOW)
            visible = key_side[:, None] == side_of(qy, qx, at_bottom, at_right, shift, WINDOW)[None, :]
        bias_index = (qy * SPAN + qx + (KEY_WINDOW - 1) * (SPAN + 1))[None, :] - (ky * SPAN + kx)[:, None]
        weights, grad_weights = _weights(
            keys, queries, values, rows_grad, row_lse[None, :], row_lse_rest[None, :],
            bias, bias_index, exists, visible, CHECKED, SHIFTED, PRECISION,
        )  # fmt: skip
        grad_logits = weights * (grad_weights - row_delta[None, :])
        if CHECK_QUERIES:
            weights = tl.where(is_query[None, :], weights, 0.0)
            grad_logits = tl.where(is_query[None, :], grad_logits, 0.0)
        values_now = add_dot(weights.to(rows_grad.dtype), rows_grad, grad_values, PRECISION)
        keys_now = narrow_dot(grad_logits, queries, grad_keys, WIDE, PRECISION)
        if not ALIGNED:
            # A window must not change keys that it does not see: its weights are 0 there, but 0 times NaN is NaN.
            values_now = tl.where(is_key[:, None], values_now, grad_values)
            keys_now = tl.where(is_key[:, None], keys_now, grad_keys)
        grad_values = values_now
        grad_keys = keys_now
    grad_keys = grad_keys / LOG2E  # of s_j k_j: the factor of the queries has 1/√d and log₂ e in it
    if HAS_SEVERITY:
        share = tl.sum(raw_k.to(tl.float32) * grad_keys, 1)
        tl.store(grad_severity + plane + key_pixels, share, mask=inside)
        grad_keys = grad_keys * key_severity[:, None]
    base = image * grad_stride + head * HEAD_DIM
    store_rows(grad_k + base, key_pixels, grad_stride, grad_keys, inside, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + base, key_pixels, grad_stride, grad_values, inside, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_bias(
    q,
    k,
    v,
    bias,
    severity,
    lse,
    grad_out,
    delta,
    grad_logits_sum,
    windows,
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
    Writes: its part of grad_logits_sum, float32 (CHUNKS, heads, w², o²).
    Bytes, e per number: e · d · 2 · (BLOCK_M + BLOCK_N) for each window, then 4 · BLOCK_M · BLOCK_N.
    FLOPs: 4 · BLOCK_D · BLOCK_M · BLOCK_N for each window, and an exponential for each pair.
    """
    QUERIES: tl.constexpr = WINDOW * WINDOW
    KEYS: tl.constexpr = KEY_WINDOW * KEY_WINDOW
    QUERY_TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    KEY_TILES: tl.constexpr = (KEYS + BLOCK_N - 1) // BLOCK_N
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    CHECK_KEYS: tl.constexpr = KEYS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    program = tl.program_id(0)
    key_tile = program % KEY_TILES
    query_tile = program // KEY_TILES % QUERY_TILES
    head = program // (KEY_TILES * QUERY_TILES) % HEADS
    chunk = program // (KEY_TILES * QUERY_TILES * HEADS)

    i = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qy = i // WINDOW
    qx = i % WINDOW
    is_query = i < QUERIES
    j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ky = j // KEY_WINDOW
    kx = j % KEY_WINDOW
    exists = is_query[:, None] & (j < KEYS)[None, :]
    bias_index = (qy * SPAN + qx + (KEY_WINDOW - 1) * (SPAN + 1))[:, None] - (ky * SPAN + kx)[None, :]
    bias += head * SPAN * SPAN
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in tl.range(chunk, windows, CHUNKS, num_stages=STAGES):
        row, column, last_row, last_column, image = place_of_window(window, height, width, WINDOW)
        plane = image * HEADS + head.to(tl.int64) * height * width
        pixels = image_pixel(row * WINDOW + qy, column * WINDOW + qx, height, width, shift, SHIFTED, FAR)
        q_base = q + image * q_stride + head * HEAD_DIM
        raw_q = load_rows(q_base, pixels, q_stride, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        query_severity = severity_of(severity + image, pixels, is_query, HAS_SEVERITY)
        queries = query_factor(raw_q, query_severity, SCALE, HAS_SEVERITY, WIDE_FACTORS)
        grad_base = grad_out + image * (HEADS * HEAD_DIM) + head * HEAD_DIM
        rows_grad = load_rows(grad_base, pixels, HEADS * HEAD_DIM, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        row_lse, row_lse_rest = load_lse(lse + plane + pixels, is_query)
        row_delta = tl.load(delta + plane + pixels, mask=is_query, other=0.0)
        kv_base = image * kv_stride + head * HEAD_DIM
        keys, values = keys_and_values(
            k + kv_base, v + kv_base, severity + image, j, row, column, height, width, shift, kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, HAS_SEVERITY, WIDE_FACTORS, SHIFTED, FAR, CHECK_KEYS,
        )  # fmt: skip
        visible = exists
        if SHIFTED:
            query_side = side_of(qy, qx, last_row, last_column, shift, WINDOW)
            visible = query_side[:, None] == side_of(ky, kx, last_row, last_column, shift, WINDOW)[None, :]
        weights, grad_weights = _weights(
            queries, keys, rows_grad, values, row_lse[:, None], row_lse_rest[:, None],
            bias, bias_index, exists, visible, CHECK_KEYS or CHECK_QUERIES, SHIFTED, PRECISION,
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
    Reads: the pairs with this dy of grad_logits_sum, float32 (heads, w², o²): what `backward_bias` wrote, summed over
    chunks.
    Keeps in registers: the sum, float32 (BLOCK_QUERIES, BLOCK_SPAN); BLOCK_QUERIES ≥ w and BLOCK_SPAN ≥ span are powers
    of two.
    Writes: span numbers of grad_table (span², heads).
    Bytes: at most 4 · w² · o; FLOPs: as many additions as pairs.
    """
    QUERIES: tl.constexpr = WINDOW * WINDOW
    KEYS: tl.constexpr = KEY_WINDOW * KEY_WINDOW
    SPAN: tl.constexpr = WINDOW + KEY_WINDOW - 1
    head = tl.program_id(0) % HEADS
    table_y = tl.program_id(0) // HEADS
    table_x = tl.arange(0, BLOCK_SPAN)
    qx = tl.arange(0, BLOCK_QUERIES)
    kx = qx[:, None] + (KEY_WINDOW - 1) - table_x[None, :]
    valid = (qx < WINDOW)[:, None] & (table_x < SPAN)[None, :] & (kx >= 0) & (kx < KEY_WINDOW)
    grad_logits_sum += head * (QUERIES * KEYS)
    total = tl.zeros([BLOCK_QUERIES, BLOCK_SPAN], tl.float32)
    for qy in range(tl.maximum(table_y - (KEY_WINDOW - 1), 0), tl.minimum(table_y + 1, WINDOW)):
        ky = qy + (KEY_WINDOW - 1) - table_y
        pairs = (qy * WINDOW + qx)[:, None] * KEYS + ky * KEY_WINDOW + kx
        total += tl.load(grad_logits_sum + pairs, mask=valid, other=0.0)
    sums = tl.sum(total, 0).to(grad_table.dtype.element_ty)
    tl.store(grad_table + (table_y * SPAN + table_x) * HEADS + head, sums, mask=table_x < SPAN)
