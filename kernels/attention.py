r"""The Triton kernels of both attentions, with every trait: one family, in which a trait is a compile-time parameter.

The forward pass is here. The gradients of q, k and v are in `attention_backward` and `attention_backward_joint`, and
that of the bias is in `attention_backward_bias`.

For each head, a query pixel i of a window of N pixels and a key pixel j of the N' keys of this window:

    logits_ij = s_i · s_j · similarity(q_i, k_j) + bias_ij     (plus MASK between sides of a shifted image)
    out_i     = Σ_j softmax_j(logits_ij) · v_j

Nothing is rearranged in memory. Pixels are addressed in an arranged image, where the pixels of a window are next to
each other: the image rolled by ``−shift`` along both axes or, where DILATED, the image with every H/h-th row and
W/w-th column brought together. Windows, shifts and dilation are address arithmetic. The traits:

- WINDOW and KEY_WINDOW are pairs (vertical, horizontal). The keys of a window are those of the window at the same place
  of their own image, whose size and shift follow from those of the queries.
- MARGIN > 0, for overlapping windows: the keys are in the image of the queries, and their windows reach MARGIN pixels
  further on each side. Keys outside the image are zeros that take part in the softmax. No such window is shifted.
- BIAS: "table", by offset of the pixels of a pair; "dense", by pair; "none".
- MASK: −∞ or a finite number. With the finite one, pairs from different sides have weights and gradients.
- COSINE: the similarity is scale · (q_i · k_j) / (‖q_i‖ · ‖k_j‖), else (q_i · k_j) / √d. Rows are divided by their
  norms wherever they are loaded, which takes a sum along each row and no memory.
- HAS_SEVERITY: rows of q and k are multiplied by s.

There are five kernels. A program keeps a tile of scores in registers, and no scores are stored in memory:

================  ==========================  ===============================  ==========================
kernel            a program owns              it loops over                    products of d · M · N each
================  ==========================  ===============================  ==========================
`forward`         M query rows, one head      the keys of their window         2 (q k, p v)
`backward_qkv`    a window, one head          its N keys at a time, all        5 (q k, do v, p do, ds k,
                                              queries M at a time              ds q)
`backward_q`      M query rows, one head      the keys of their window         3 (q k, do v, ds k)
`backward_kv`     N key pixels, one head      the windows that see them, M     4 (q k, p do, do v, ds q)
                                              queries at a time
`backward_bias`   M × N pairs of a window     its share of all windows         2 (q k, do v)
================  ==========================  ===============================  ==========================

`backward_qkv` runs in place of `backward_q` and `backward_kv` where `configs.stages_of` says so: where queries and keys
have the same windows, and their gradients fit into registers.

The backward pass recomputes the scores from the log-sum-exp that `forward` writes. `backward_bias` sums the gradients
of the logits over windows, for each pair, which is the gradient of a dense bias; for a table, `fold_bias` sums them
over pairs with the same offset. Without a bias, neither runs. The order of every sum depends on shapes and block sizes
alone, without atomics, so every run gives the same bits.

A program of `forward` with windows of 16×16, d = 24, bfloat16 and M = 128 reads 6 144 bytes of q and 24 576 (16×16
keys) or 55 296 (24×24) of k and v, writes 6 656, and computes 4 · 32 · M · N' = 4.2 or 9.4 MFLOP (d is padded to 32).
The programs of a window share k and v through the L2 cache, so device memory moves 8.2 bytes per channel of a pixel. On
an H100 (3.35 TB/s, 989 TFLOP/s of dense bfloat16, 16 exponentials per cycle and multiprocessor) 512×512 pixels with 6
heads take at least

    16×16 keys    memory  92 µs    tensor cores  52 µs    exponentials 109 µs
    24×24 keys    memory  92 µs    tensor cores 117 µs    exponentials 245 µs

The issue of instructions takes longer: 490 per 64 scores in the loop over keys and 236 around it, and with 24×24 keys
552 and 112, which is 150 and 310 µs. `machine_code` counts them, for sm_90 with Triton 3.9. Three things keep them few:

- The product sums the weights: one of the channels that pad the values is 1, if there is one. So the weights are summed
  after their rounding, as their values are. With float32 tensors, `forward` sums them itself.
- Keys come in blocks of powers of two, such as 8×8, whose place in the window is known at compile time but for one
  addition. Where no such block divides the key window, they come in the order of the window.
- There are two loops: one with the bounds of the image or the masks between its sides, for windows that need them.

A program of 16 warps with all 256 queries reads k and v once and takes 4 % fewer instructions, but its barriers stop
all warps of a multiprocessor. A tile with all 256 keys needs no running maximum, but 860 instructions per 64 scores
instead of 726, and 185 registers instead of 88: 8 warps in place of 16.

Logits are in units of ln 2, so that an exponential is one instruction: ``bias`` is passed multiplied by log₂ e, and the
kernels multiply the queries by it. Scores, sums and statistics are float32 for every dtype. Severity, norms and scale
multiply rows of q and k before the product, which is then rounded once. With float16 tensors, these rows and the
gradients of the logits could overflow. They stay float32 and are multiplied as tf32, which has the mantissa of float16
and the range of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from savl.kernels.tiles import (
    LARGEST_INDEX,
    add_dot,
    bias_of_head,
    bias_of_key,
    bias_of_query,
    image_of_keys,
    image_pixel,
    keys_and_values_at,
    load_rows,
    norms_of,
    place_of_window,
    query_factor,
    scale_of,
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
    MASKED: tl.constexpr,
    CHECK_INSIDE: tl.constexpr,
    SUMS_BY_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the online softmax over the keys of a window; ``size`` and ``shift`` are those of the image of the keys.

    The keys come in tiles of BLOCK_N: in blocks of KEY_BLOCK (height, width) pixels or, where it is None, in the order
    of the window. In a block, powers of two, the place of a key is known at compile time up to one addition. Where
    SUMS_BY_PRODUCT, a padded channel of the values is 1, and the product sums the weights: after their rounding, as
    their values are summed. CHECK_INSIDE is for windows that may have keys outside the image, MASKED for windows with
    pixels from several sides of it.

    Returns the sum of weighted values, the largest logit and the sum of weights of each row. The values are float32
    (BLOCK_M, BLOCK_D) and stay in registers, as does one (BLOCK_M, BLOCK_N) tile of logits.
    """
    KEYS: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    CHECK_KEYS: tl.constexpr = KEYS % BLOCK_N != 0
    CHECK_QUERIES: tl.constexpr = (WINDOW[0] * WINDOW[1]) % BLOCK_M != 0
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, KEYS, BLOCK_N, num_stages=STAGES):
        j = tl.arange(0, BLOCK_N)
        if KEY_BLOCK is None:
            top = 0
            left = 0
            j += start
            in_y = j // KEY_WINDOW[1]
            in_x = j % KEY_WINDOW[1]
        else:
            ACROSS: tl.constexpr = KEY_WINDOW[1] // KEY_BLOCK[1]
            top = start // BLOCK_N // ACROSS * KEY_BLOCK[0]
            left = start // BLOCK_N % ACROSS * KEY_BLOCK[1]
            in_y = j // KEY_BLOCK[1]
            in_x = j % KEY_BLOCK[1]
        keys, values = keys_and_values_at(
            k, v, severity, top + in_y, left + in_x, j < KEYS, place, size, shift, kv_stride,
            HEAD_DIM, BLOCK_D, KEY_WINDOW, MARGIN, HAS_SEVERITY, COSINE, WIDE_FACTORS, SHIFTED, DILATED, FAR,
            CHECK_KEYS or CHECK_INSIDE, SUMS_BY_PRODUCT,
        )  # fmt: skip
        exists = valid[:, None] & (j < KEYS)[None, :]
        visible = exists
        if MASKED:
            key_side = side_of(top + in_y, left + in_x, last, shift, KEY_WINDOW)
            visible = query_side[:, None] == key_side[None, :]
        # The index is not negative. Where the compiler knows it, it adds the columns to the address at compile time.
        row = (query_index - bias_of_key(top, left, WINDOW, KEY_WINDOW, BIAS)) & LARGEST_INDEX
        logits = tile_of_logits(
            q, keys, bias, row[:, None] - bias_of_key(in_y, in_x, WINDOW, KEY_WINDOW, BIAS)[None, :],
            exists, visible, BIAS, CHECK_KEYS or CHECK_QUERIES, MASKED, MASK, PRECISION,
        )  # fmt: skip
        now_largest = tl.maximum(largest, tl.max(logits, 1))
        # All logits of a row may have been −∞ so far, and −∞ − (−∞) is NaN.
        centre = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(logits - centre[:, None])
        shrink = tl.exp2(largest - centre)
        if not SUMS_BY_PRODUCT:
            total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None]
        attended = add_dot(weights.to(values.dtype), values, attended, PRECISION)
        largest = now_largest
    if SUMS_BY_PRODUCT:
        total = tl.sum(tl.where((tl.arange(0, BLOCK_D) == HEAD_DIM)[None, :], attended, 0.0), 1)
    return attended, largest, total


@triton.jit
def forward(
    q,
    k,
    v,
    bias,
    severity,
    scale,
    out,
    lse,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the output and the log-sum-exp of BLOCK_M queries of one window and head.

    Owns: BLOCK_M of the N queries of a window, for one head.
    Reads: their q, k and v of the N' keys in steps of BLOCK_N, one bias per pair, the severity of both, and the scale.
    Keeps in registers: the queries, the weighted values in float32, the largest logit and the sum of weights of each
    row, and one tile of BLOCK_M × BLOCK_N logits.
    Writes: out and the log-sum-exp of its queries.
    Bytes, e per number: e · d · (2 · BLOCK_M + 2 · N') for q, out, k and v; 4 or 8 a query for the log-sum-exp. k and v
    come from the L2 cache for all but one program of a window.
    FLOPs: 4 · BLOCK_D · BLOCK_M · N', and as many exponentials as pairs.

    Pointers: q, k and v to the first channel of the first head, channels contiguous; bias float32, as `bias_of_head`
    describes; severity (B, H, W); scale (heads,); out (B, H, W, heads · d); lse (B, heads, H, W) in units of ln 2. lse
    is float32, but float64 for float32 tensors, because its rounding error is one of all weights of a row. A pointer
    that no trait needs is any pointer. shift_x is None where it equals shift_y.
    """
    SUMS_BY_PRODUCT: tl.constexpr = HEAD_DIM < BLOCK_D and v.dtype.element_ty != tl.float32
    QUERIES: tl.constexpr = WINDOW[0] * WINDOW[1]
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    CHECK_QUERIES: tl.constexpr = QUERIES % BLOCK_M != 0
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
    severity += image
    q += image * q_stride + head * HEAD_DIM
    raw_q = load_rows(q, pixels, q_stride, valid, CHECK_QUERIES, HEAD_DIM, BLOCK_D)
    query_severity = severity_of(severity, pixels, valid, HAS_SEVERITY)
    queries = query_factor(
        raw_q, query_severity, norms_of(raw_q, COSINE), scale_of(scale, head, COSINE), SCALE,
        HAS_SEVERITY, COSINE, WIDE_FACTORS,
    )  # fmt: skip
    query_index = bias_of_query(qy, qx, WINDOW, KEY_WINDOW, BIAS)
    k += key_image * kv_stride + head * HEAD_DIM
    v += key_image * kv_stride + head * HEAD_DIM
    bias = bias_of_head(bias, head, WINDOW, KEY_WINDOW, BIAS)
    side = side_of(qy, qx, last, shift, WINDOW)
    # Only the last windows of a shifted image contain pixels from several sides of the image, and only windows near its
    # border have keys outside.
    at_edge = (last[0] | last[1]) if SHIFTED else False
    if MARGIN > 0:
        first_y = place[0] * WINDOW[0] - MARGIN
        first_x = place[1] * WINDOW[1] - MARGIN
        past = (first_y + KEY_WINDOW[0] > height) | (first_x + KEY_WINDOW[1] > width)
        at_edge = (first_y < 0) | (first_x < 0) | past
    if at_edge:
        attended, largest, total = _attend(
            queries, query_index, side, valid, k, v, bias, severity, place, last, key_size, key_shift, kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, MARGIN, BIAS, MASK, HAS_SEVERITY, COSINE, WIDE_FACTORS,
            SHIFTED, DILATED, FAR, SHIFTED, MARGIN > 0, SUMS_BY_PRODUCT, BLOCK_M, BLOCK_N, KEY_BLOCK, STAGES, PRECISION,
        )  # fmt: skip
    else:
        attended, largest, total = _attend(
            queries, query_index, side, valid, k, v, bias, severity, place, last, key_size, key_shift, kv_stride,
            HEAD_DIM, BLOCK_D, WINDOW, KEY_WINDOW, MARGIN, BIAS, MASK, HAS_SEVERITY, COSINE, WIDE_FACTORS,
            SHIFTED, DILATED, FAR, False, False, SUMS_BY_PRODUCT, BLOCK_M, BLOCK_N, KEY_BLOCK, STAGES, PRECISION,
        )  # fmt: skip
    plane = image * HEADS + head.to(tl.int64) * height * width
    row_lse = largest.to(lse.dtype.element_ty) + tl.log2(total).to(lse.dtype.element_ty)
    tl.store(lse + plane + pixels, row_lse, mask=valid)
    out += image * (HEADS * HEAD_DIM) + head * HEAD_DIM
    # The rounding error of a reciprocal does not show in 16 bits.
    single = out.dtype.element_ty == tl.float32
    attended = attended / total[:, None] if single else attended * (1.0 / total)[:, None]
    store_rows(out, pixels, HEADS * HEAD_DIM, attended, valid, HEAD_DIM, BLOCK_D)
