"""The gradients of q, k and v of both attentions in Triton. `savl.kernels.attention` describes all kernels together."""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import (
    LOG2E,
    add_dot,
    bias_of_head,
    bias_of_key,
    bias_of_query,
    image_of_keys,
    image_pixel,
    key_factor,
    keys_and_values,
    load_lse,
    load_rows,
    narrow_dot,
    norms_of,
    place_of_window,
    query_factor,
    scale_of,
    severity_of,
    side_of,
    store_rows,
    through_norms,
    unit_rows,
    weights_and_gradient,
)


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
    place,
    last,
    size,
    shift,
    kv_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    MARGIN: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    COSINE: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    DILATED: tl.constexpr,
    FAR: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
    CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the `_weights` of some queries for the keys ``j`` of their window, and the keys' factors of the logits.

    ``size`` and ``shift`` are those of the image of the keys.
    """
    ky = j // KEY_WINDOW[1]
    kx = j % KEY_WINDOW[1]
    keys, values = keys_and_values(
        k, v, severity, j, place, size, shift, kv_stride, HEAD_DIM, BLOCK_D, KEY_WINDOW, MARGIN,
        HAS_SEVERITY, COSINE, WIDE_FACTORS, SHIFTED, DILATED, FAR, CHECK_KEYS,
    )  # fmt: skip
    exists = valid[:, None] & (j < KEY_WINDOW[0] * KEY_WINDOW[1])[None, :]
    visible = exists
    if SHIFTED:
        visible = query_side[:, None] == side_of(ky, kx, last, shift, KEY_WINDOW)[None, :]
    weights, grad_weights = weights_and_gradient(
        queries, keys, rows_grad, values, row_lse[:, None], row_lse_rest[:, None],
        bias, query_index[:, None] - bias_of_key(ky, kx, WINDOW, KEY_WINDOW, BIAS)[None, :],
        exists, visible, BIAS, CHECKED, SHIFTED, MASK, PRECISION,
    )  # fmt: skip
    return weights, grad_weights, keys


@triton.jit
def backward_q(
    q,
    k,
    v,
    bias,
    severity,
    scale,
    out,
    lse,
    grad_out,
    delta,
    grad_q,
    grad_severity,
    grad_scale,
    height,
    width,
    shift_y,
    shift_x,
    q_stride,
    kv_stride,
    grad_stride,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradient of BLOCK_M queries of one window and head, of their severity through q, and of the scale.

    Owns: BLOCK_M of the N queries of a window, for one head.
    Reads: their q, out, grad_out and log-sum-exp, k and v of the N' keys in steps of BLOCK_N, one bias per pair, the
    severity of both, and the scale.
    Keeps in registers: queries, rows of grad_out and the gradient in float32, and tiles of BLOCK_M × BLOCK_N weights
    and of their gradients.
    Writes: grad_q, delta, grad_severity and grad_scale of its queries.
    Bytes, e per number: e · d · (4 · BLOCK_M + 2 · N') for q, out, grad_out, grad_q, k and v; 12 to 16 a query.
    FLOPs: 6 · BLOCK_D · BLOCK_M · N', and 4 more for float32, and an exponential for each pair and loop.

    Pointers besides those of `forward`: out and grad_out contiguous (B, H, W, heads · d); grad_q with strides of its
    own; delta float32 (B, heads, H, W), the weighted mean of the weights' gradients, which `backward_kv` and
    `backward_bias` read too; grad_severity float32 (B, heads, H, W), the share of each head; grad_scale float32
    (B, heads, H, W), the share of each query.

    Delta equals the product of out and grad_out, and is computed so for 16-bit tensors. For float32 tensors a first
    loop over the keys computes it: where one weight is nearly 1, its gradient minus delta is nearly 0, which holds only
    when both come from the same arithmetic.
    """
    QUERIES: tl.constexpr = WINDOW[0] * WINDOW[1]
    KEYS: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    CHECK_KEYS: tl.constexpr = KEYS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    CHECKED: tl.constexpr = CHECK_KEYS or CHECK_QUERIES
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float16
    program = tl.program_id(0)
    head = program // TILES % HEADS
    size = (height, width)
    shift = (shift_y, shift_y if shift_x is None else shift_x)
    key_size, key_shift = image_of_keys(size, shift, WINDOW, KEY_WINDOW, MARGIN)
    place, last, batch = place_of_window(program // (TILES * HEADS), size, WINDOW)
    image = batch * height * width
    key_image = batch * key_size[0] * key_size[1]

    i = program % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    qy = i // WINDOW[1]
    qx = i % WINDOW[1]
    valid = i < QUERIES
    pixels = image_pixel(
        place[0] * WINDOW[0] + qy, place[1] * WINDOW[1] + qx, size, shift, WINDOW, SHIFTED, DILATED, FAR
    )
    plane = image * HEADS + head.to(tl.int64) * height * width
    severity += image
    q += image * q_stride + head * HEAD_DIM
    raw_q = load_rows(q, pixels, q_stride, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
    query_severity = severity_of(severity, pixels, valid, HAS_SEVERITY)
    norms = norms_of(raw_q, COSINE)
    head_scale = scale_of(scale, head, COSINE)
    queries = query_factor(raw_q, query_severity, norms, head_scale, SCALE, HAS_SEVERITY, COSINE, WIDE_FACTORS)
    interleaved = image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    rows_grad = load_rows(grad_out + interleaved, pixels, HEADS * HEAD_DIM, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
    row_lse, row_lse_rest = load_lse(lse + plane + pixels, valid)

    query_index = bias_of_query(qy, qx, WINDOW, KEY_WINDOW, BIAS)
    k += key_image * kv_stride + head * HEAD_DIM
    v += key_image * kv_stride + head * HEAD_DIM
    bias = bias_of_head(bias, head, WINDOW, KEY_WINDOW, BIAS)
    side = side_of(qy, qx, last, shift, WINDOW)
    if q.dtype.element_ty == tl.float32:
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, KEYS, BLOCK_N, num_stages=STAGES):
            weights, grad_weights, _ = _weights_of_keys(
                queries, query_index, side, valid, rows_grad, row_lse, row_lse_rest,
                k, v, bias, severity, start + tl.arange(0, BLOCK_N), place, last, key_size, key_shift, kv_stride,
                HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, MARGIN, BIAS, MASK, HAS_SEVERITY, COSINE, WIDE_FACTORS,
                SHIFTED, DILATED, FAR, CHECK_KEYS, CHECKED, PRECISION,
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
            k, v, bias, severity, start + tl.arange(0, BLOCK_N), place, last, key_size, key_shift, kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, MARGIN, BIAS, MASK, HAS_SEVERITY, COSINE, WIDE_FACTORS,
            SHIFTED, DILATED, FAR, CHECK_KEYS, CHECKED, PRECISION,
        )  # fmt: skip
        grad_logits = weights * (grad_weights - row_delta[:, None])
        gradient = narrow_dot(grad_logits, keys, gradient, WIDE, PRECISION)
    gradient = gradient * SCALE  # of s_i q_i, or with cosine similarity of scale · s_i q_i / ‖q_i‖
    if HAS_SEVERITY or COSINE:
        share = tl.sum(unit_rows(raw_q, norms, COSINE) * gradient, 1)
        if COSINE:
            of_scale = share * query_severity if HAS_SEVERITY else share
            tl.store(grad_scale + plane + pixels, of_scale, mask=valid)
            share = share * head_scale
            gradient = gradient * head_scale
        if HAS_SEVERITY:
            tl.store(grad_severity + plane + pixels, share, mask=valid)
            gradient = gradient * query_severity[:, None]
        if COSINE:
            gradient = through_norms(gradient, raw_q, norms)
    grad_q += image * grad_stride + head * HEAD_DIM
    store_rows(grad_q, pixels, grad_stride, gradient, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_kv(
    q,
    k,
    v,
    bias,
    severity,
    scale,
    lse,
    grad_out,
    delta,
    grad_k,
    grad_v,
    grad_severity,
    height,
    width,
    shift_y,
    shift_x,
    q_stride,
    kv_stride,
    grad_stride,
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
    BLOCK_M: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradients of TILE_HEIGHT × TILE_WIDTH key pixels of one head, from all windows that see them.

    Owns: BLOCK_N = TILE_HEIGHT · TILE_WIDTH key pixels of the arranged image, for one head.
    Reads: their k, v and severity; and of each window that sees them, in steps of BLOCK_M, q, grad_out, log-sum-exp,
    delta and severity of the queries, and one bias per pair; and the scale. Without overlap that is one window where
    tiles divide it.
    Keeps in registers: keys, values and both gradients in float32, and tiles of BLOCK_N × BLOCK_M weights and of their
    gradients.
    Writes: grad_k, grad_v and grad_severity of its pixels.
    Bytes, e per number: e · d · 4 · BLOCK_N for k, v and their gradients, e · d · 2 · N for each window that sees them.
    FLOPs: 8 · BLOCK_D · BLOCK_N · N for each window that sees them, and an exponential for each pair.

    Pointers besides those of `backward_q`: grad_k and grad_v with the same strides; grad_severity float32
    (B, heads, H, W), the share through k of each head.
    """
    QUERIES: tl.constexpr = WINDOW[0] * WINDOW[1]
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    STEP_Y: tl.constexpr = KEY_WINDOW[0] - 2 * MARGIN  # between the key windows
    STEP_X: tl.constexpr = KEY_WINDOW[1] - 2 * MARGIN
    BLOCK_N: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    # Tiles begin at the margin, where the pixels begin that a single window sees.
    BEFORE_Y: tl.constexpr = -MARGIN % TILE_HEIGHT
    BEFORE_X: tl.constexpr = -MARGIN % TILE_WIDTH
    # Whether every window that sees a pixel of a tile sees all its pixels.
    ALIGNED: tl.constexpr = (
        (2 * MARGIN) % TILE_HEIGHT == 0
        and STEP_Y % TILE_HEIGHT == 0
        and (2 * MARGIN) % TILE_WIDTH == 0
        and STEP_X % TILE_WIDTH == 0
    )
    CHECK_KEYS: tl.constexpr = MARGIN > 0 or not ALIGNED
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
    CHECKED: tl.constexpr = CHECK_QUERIES or not ALIGNED
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float16
    program = tl.program_id(0)
    head = program % HEADS
    tile = program // HEADS
    size = (height, width)
    shift = (shift_y, shift_y if shift_x is None else shift_x)
    key_size, key_shift = image_of_keys(size, shift, WINDOW, KEY_WINDOW, MARGIN)
    tile_columns = tl.cdiv(key_size[1] + BEFORE_X, TILE_WIDTH)
    tile_rows = tl.cdiv(key_size[0] + BEFORE_Y, TILE_HEIGHT)
    first_x = tile % tile_columns * TILE_WIDTH - BEFORE_X
    first_y = tile // tile_columns % tile_rows * TILE_HEIGHT - BEFORE_Y
    batch = (tile // (tile_columns * tile_rows)).to(tl.int64)
    image = batch * height * width
    key_image = batch * key_size[0] * key_size[1]

    j = tl.arange(0, BLOCK_N)
    key_y = first_y + j // TILE_WIDTH
    key_x = first_x + j % TILE_WIDTH
    inside = (key_y >= 0) & (key_y < key_size[0]) & (key_x >= 0) & (key_x < key_size[1])
    key_pixels = image_pixel(key_y, key_x, key_size, key_shift, KEY_WINDOW, SHIFTED, DILATED, FAR)
    plane = image * HEADS + head.to(tl.int64) * height * width
    severity += image
    kv_base = key_image * kv_stride + head * HEAD_DIM
    raw_k = load_rows(k + kv_base, key_pixels, kv_stride, inside, CHECK_KEYS, HEAD_DIM, BLOCK_D)
    values = load_rows(v + kv_base, key_pixels, kv_stride, inside, CHECK_KEYS, HEAD_DIM, BLOCK_D)
    key_severity = severity_of(severity, key_pixels, inside, HAS_SEVERITY)
    key_norms = norms_of(raw_k, COSINE)
    keys = key_factor(raw_k, key_severity, key_norms, HAS_SEVERITY, COSINE, WIDE_FACTORS)
    head_scale = scale_of(scale, head, COSINE)

    rows = height // WINDOW[0]
    columns = width // WINDOW[1]
    first_row = tl.maximum(first_y - MARGIN, 0) // STEP_Y
    first_column = tl.maximum(first_x - MARGIN, 0) // STEP_X
    last_row = tl.minimum((first_y + TILE_HEIGHT - 1 + MARGIN) // STEP_Y, rows - 1)
    last_column = tl.minimum((first_x + TILE_WIDTH - 1 + MARGIN) // STEP_X, columns - 1)
    across = last_column - first_column + 1
    steps = (last_row - first_row + 1) * across * TILES

    q += image * q_stride + head * HEAD_DIM
    grad_out += image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    lse += plane
    delta += plane
    bias = bias_of_head(bias, head, WINDOW, KEY_WINDOW, BIAS)
    grad_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = first_row + step // (across * TILES)
        column = first_column + step // TILES % across
        i = step % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        qy = i // WINDOW[1]
        qx = i % WINDOW[1]
        is_query = i < QUERIES
        pixels = image_pixel(row * WINDOW[0] + qy, column * WINDOW[1] + qx, size, shift, WINDOW, SHIFTED, DILATED, FAR)
        raw_q = load_rows(q, pixels, q_stride, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        rows_grad = load_rows(grad_out, pixels, HEADS * HEAD_DIM, is_query, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        query_severity = severity_of(severity, pixels, is_query, HAS_SEVERITY)
        queries = query_factor(
            raw_q, query_severity, norms_of(raw_q, COSINE), head_scale, SCALE,
            HAS_SEVERITY, COSINE, WIDE_FACTORS,
        )  # fmt: skip
        row_lse, row_lse_rest = load_lse(lse + pixels, is_query)
        row_delta = tl.load(delta + pixels, mask=is_query, other=0.0)

        ky = key_y - row * STEP_Y + MARGIN
        kx = key_x - column * STEP_X + MARGIN
        is_key = inside & (ky >= 0) & (ky < KEY_WINDOW[0]) & (kx >= 0) & (kx < KEY_WINDOW[1])
        exists = is_key[:, None] & is_query[None, :]
        visible = exists
        if SHIFTED:
            last = (row == rows - 1, column == columns - 1)
            key_side = side_of(ky, kx, last, key_shift, KEY_WINDOW)
            visible = key_side[:, None] == side_of(qy, qx, last, shift, WINDOW)[None, :]
        bias_index = (
            bias_of_query(qy, qx, WINDOW, KEY_WINDOW, BIAS)[None, :]
            - bias_of_key(ky, kx, WINDOW, KEY_WINDOW, BIAS)[:, None]
        )
        weights, grad_weights = weights_and_gradient(
            keys, queries, values, rows_grad, row_lse[None, :], row_lse_rest[None, :],
            bias, bias_index, exists, visible, BIAS, CHECKED, SHIFTED, MASK, PRECISION,
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
    # Of s_j k_j, or s_j k_j / ‖k_j‖: the factor of the queries has 1/√d or the scale, and log₂ e, in it.
    grad_keys = grad_keys / LOG2E
    if HAS_SEVERITY:
        share = tl.sum(unit_rows(raw_k, key_norms, COSINE) * grad_keys, 1)
        tl.store(grad_severity + plane + key_pixels, share, mask=inside)
        grad_keys = grad_keys * key_severity[:, None]
    if COSINE:
        grad_keys = through_norms(grad_keys, raw_k, key_norms)
    base = key_image * grad_stride + head * HEAD_DIM
    store_rows(grad_k + base, key_pixels, grad_stride, grad_keys, inside, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + base, key_pixels, grad_stride, grad_values, inside, HEAD_DIM, BLOCK_D)
