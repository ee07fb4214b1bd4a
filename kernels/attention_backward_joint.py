"""The gradients of q, k and v of equal windows in one Triton kernel. `savl.kernels.attention` describes all kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import (
    LOG2E,
    bias_of_head,
    bias_of_key,
    bias_of_query,
    dot,
    image_pixel,
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
def _through_keys(
    queries,
    grads,
    lses,
    deltas,
    k,
    v,
    bias,
    severity,
    grad_k,
    grad_v,
    key_share,
    place,
    last,
    size,
    shift,
    kv_stride,
    grad_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SEVERITY: tl.constexpr,
    COSINE: tl.constexpr,
    WIDE_FACTORS: tl.constexpr,
    SHIFTED: tl.constexpr,
    DILATED: tl.constexpr,
    FAR: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of all keys and values of a window; return those of the queries' factors, without SCALE.

    ``queries``, ``grads``, ``lses`` and ``deltas`` are tuples with a tile of BLOCK_M queries in each place, as is the
    result. They are the factors of the logits, the rows of grad_out, the log-sum-exp and the delta.
    """
    PIXELS: tl.constexpr = WINDOW[0] * WINDOW[1]
    TILES: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    CHECK_KEYS: tl.constexpr = PIXELS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = PIXELS % BLOCK_M != 0
    CHECKED: tl.constexpr = CHECK_KEYS or CHECK_QUERIES
    LATER: tl.constexpr = MASKED and float("-inf") != MASK
    AT_ONCE: tl.constexpr = MASKED and float("-inf") == MASK
    WIDE: tl.constexpr = k.dtype.element_ty == tl.float16
    gradients = ()
    for _ in tl.static_range(TILES):
        gradients = gradients + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    for start in tl.range(0, PIXELS, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        ky = j // WINDOW[1]
        kx = j % WINDOW[1]
        keys, values = keys_and_values(
            k, v, severity, j, place, size, shift, kv_stride, HEAD_DIM, BLOCK_D, WINDOW, 0,
            HAS_SEVERITY, COSINE, WIDE_FACTORS, SHIFTED, DILATED, FAR, CHECK_KEYS,
        )  # fmt: skip
        grad_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        now = ()
        for tile in tl.static_range(TILES):
            i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            qy = i // WINDOW[1]
            qx = i % WINDOW[1]
            valid = i < PIXELS
            exists = valid[:, None] & (j < PIXELS)[None, :]
            visible = exists
            if MASKED:
                side = side_of(qy, qx, last, shift, WINDOW)
                visible = side[:, None] == side_of(ky, kx, last, shift, WINDOW)[None, :]
            index = (
                bias_of_query(qy, qx, WINDOW, WINDOW, BIAS)[:, None]
                - bias_of_key(ky, kx, WINDOW, WINDOW, BIAS)[None, :]
            )
            row_lse = lses[tile][:, None]
            # A finite mask is added to the difference of logits and log-sum-exp, which takes fewer registers.
            if LATER:
                row_lse = tl.where(visible, row_lse, row_lse - MASK)
            weights, grad_weights = weights_and_gradient(
                queries[tile], keys, grads[tile], values, row_lse, 0.0,
                bias, index, exists, visible, BIAS, CHECKED, AT_ONCE, MASK, PRECISION,
            )  # fmt: skip
            grad_logits = weights * (grad_weights - deltas[tile][:, None])
            if CHECK_QUERIES:  # a key or value that is NaN makes the weights of rows past the last query NaN
                weights = tl.where(valid[:, None], weights, 0.0)
                grad_logits = tl.where(valid[:, None], grad_logits, 0.0)
            # Not the initial value of the product: the compiler would give that of the next tile another layout, in
            # which half of the warps repeat the work of the others.
            of_values = dot(tl.trans(weights.to(grads[tile].dtype)), grads[tile], PRECISION)
            grad_values = tl.fma(of_values, 1.0, grad_values)
            now = now + (narrow_dot(grad_logits, keys, gradients[tile], WIDE, PRECISION),)
            of_keys = narrow_dot(tl.trans(grad_logits), queries[tile], tl.zeros_like(grad_keys), WIDE, PRECISION)
            grad_keys = tl.fma(of_keys, 1.0, grad_keys)
        gradients = now
        # Of s_j k_j, or s_j k_j / ‖k_j‖: the factor of the queries has 1/√d or the scale, and log₂ e, in it.
        grad_keys = grad_keys / LOG2E
        y = place[0] * WINDOW[0] + ky
        x = place[1] * WINDOW[1] + kx
        inside = j < PIXELS
        pixels = image_pixel(y, x, size, shift, WINDOW, SHIFTED, DILATED, FAR)
        if HAS_SEVERITY or COSINE:
            raw_k = load_rows(k, pixels, kv_stride, inside, CHECK_KEYS, HEAD_DIM, BLOCK_D)
            norms = norms_of(raw_k, COSINE)
            if HAS_SEVERITY:
                share = tl.sum(unit_rows(raw_k, norms, COSINE) * grad_keys, 1)
                tl.store(key_share + pixels, share, mask=inside)
                grad_keys = grad_keys * severity_of(severity, pixels, inside, HAS_SEVERITY)[:, None]
            if COSINE:
                grad_keys = through_norms(grad_keys, raw_k, norms)
        store_rows(grad_k, pixels, grad_stride, grad_keys, inside, HEAD_DIM, BLOCK_D)
        store_rows(grad_v, pixels, grad_stride, grad_values, inside, HEAD_DIM, BLOCK_D)
    return gradients


@triton.jit
def backward_qkv(
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
    grad_k,
    grad_v,
    query_share,
    key_share,
    grad_scale,
    height,
    width,
    shift_y,
    shift_x,
    q_stride,
    kv_stride,
    grad_q_stride,
    grad_kv_stride,
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
    """Compute the gradients of q, k and v of one window and head, where the keys are the pixels of the queries.

    Owns: the N pixels of a window, for one head.
    Reads: q, out, grad_out, log-sum-exp and severity of all queries once, k, v and severity of the keys in steps of
    BLOCK_N, one bias per pair, and the scale.
    Keeps in shared memory: the queries' factors of the logits and grad_out of the window, and BLOCK_M × BLOCK_N weights
    and gradients of logits, which products need transposed.
    Keeps in registers: the gradient of all queries in float32, as ⌈N / BLOCK_M⌉ tiles; the gradients of BLOCK_N keys
    and values; and tiles of BLOCK_M × BLOCK_N weights and of their gradients.
    Writes: grad_q, grad_k, grad_v, delta, and for each pixel the parts of the gradients of severity and scale.
    Bytes, e per number: e · d · 8 · N for q, k, v, out, grad_out and the gradients; 8 to 20 a pixel.
    FLOPs: 10 · BLOCK_D · N², and an exponential for each pair. `backward_q` and `backward_kv` take 14 · BLOCK_D · N²
    and two exponentials for the same, and read q, k, v and grad_out twice.

    Pointers as for `backward_q` and `backward_kv`; query_share and key_share are their ``grad_severity``. Tensors have
    16 bits: float32 gradients need a loop of their own for delta, as in `backward_q`, and products that no tensor core
    computes, for which the tiles are too large.
    """
    tl.static_assert(q.dtype.element_ty != tl.float32)
    PIXELS: tl.constexpr = WINDOW[0] * WINDOW[1]
    TILES: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    CHECK_QUERIES: tl.constexpr = PIXELS % BLOCK_M != 0
    program = tl.program_id(0)
    head = program % HEADS
    size = (height, width)
    shift = (shift_y, shift_y if shift_x is None else shift_x)
    place, last, batch = place_of_window(program // HEADS, size, WINDOW)
    image = batch * height * width
    plane = image * HEADS + head.to(tl.int64) * height * width
    interleaved = image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    severity += image
    q += image * q_stride + head * HEAD_DIM
    head_scale = scale_of(scale, head, COSINE)

    queries = ()
    grads = ()
    lses = ()
    deltas = ()
    for tile in tl.static_range(TILES):
        i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        y = place[0] * WINDOW[0] + i // WINDOW[1]
        x = place[1] * WINDOW[1] + i % WINDOW[1]
        valid = i < PIXELS
        pixels = image_pixel(y, x, size, shift, WINDOW, SHIFTED, DILATED, FAR)
        raw_q = load_rows(q, pixels, q_stride, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        query_severity = severity_of(severity, pixels, valid, HAS_SEVERITY)
        norms = norms_of(raw_q, COSINE)
        factor = query_factor(raw_q, query_severity, norms, head_scale, SCALE, HAS_SEVERITY, COSINE, WIDE_FACTORS)
        rows_grad = load_rows(grad_out + interleaved, pixels, HEADS * HEAD_DIM, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        row_lse, _ = load_lse(lse + plane + pixels, valid)
        rows_out = load_rows(out + interleaved, pixels, HEADS * HEAD_DIM, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
        row_delta = tl.sum(rows_out.to(tl.float32) * rows_grad.to(tl.float32), 1)
        tl.store(delta + plane + pixels, row_delta, mask=valid)
        queries = queries + (factor,)
        grads = grads + (rows_grad,)
        lses = lses + (row_lse,)
        deltas = deltas + (row_delta,)

    k += image * kv_stride + head * HEAD_DIM
    v += image * kv_stride + head * HEAD_DIM
    grad_k += image * grad_kv_stride + head * HEAD_DIM
    grad_v += image * grad_kv_stride + head * HEAD_DIM
    key_share += plane
    bias = bias_of_head(bias, head, WINDOW, WINDOW, BIAS)
    # Only the last windows of a shifted image contain pixels from several sides of the image.
    at_edge = (last[0] | last[1]) if SHIFTED else False
    if at_edge:
        gradients = _through_keys(
            queries, grads, lses, deltas,
            k, v, bias, severity, grad_k, grad_v, key_share, place, last, size, shift, kv_stride, grad_kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, BIAS, MASK, HAS_SEVERITY, COSINE, WIDE_FACTORS,
            SHIFTED, DILATED, FAR, True, BLOCK_M, BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
    else:
        gradients = _through_keys(
            queries, grads, lses, deltas,
            k, v, bias, severity, grad_k, grad_v, key_share, place, last, size, shift, kv_stride, grad_kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, BIAS, MASK, HAS_SEVERITY, COSINE, WIDE_FACTORS,
            SHIFTED, DILATED, FAR, False, BLOCK_M, BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
    grad_q += image * grad_q_stride + head * HEAD_DIM
    for tile in tl.static_range(TILES):
        i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        y = place[0] * WINDOW[0] + i // WINDOW[1]
        x = place[1] * WINDOW[1] + i % WINDOW[1]
        valid = i < PIXELS
        pixels = image_pixel(y, x, size, shift, WINDOW, SHIFTED, DILATED, FAR)
        gradient = gradients[tile] * SCALE  # of s_i q_i, or with cosine similarity of scale · s_i q_i / ‖q_i‖
        if HAS_SEVERITY or COSINE:
            raw_q = load_rows(q, pixels, q_stride, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
            query_severity = severity_of(severity, pixels, valid, HAS_SEVERITY)
            norms = norms_of(raw_q, COSINE)
            share = tl.sum(unit_rows(raw_q, norms, COSINE) * gradient, 1)
            if COSINE:
                of_scale = share * query_severity if HAS_SEVERITY else share
                tl.store(grad_scale + plane + pixels, of_scale, mask=valid)
                share = share * head_scale
                gradient = gradient * head_scale
            if HAS_SEVERITY:
                tl.store(query_share + plane + pixels, share, mask=valid)
                gradient = gradient * query_severity[:, None]
            if COSINE:
                gradient = through_norms(gradient, raw_q, norms)
        store_rows(grad_q, pixels, grad_q_stride, gradient, valid, HEAD_DIM, BLOCK_D)
