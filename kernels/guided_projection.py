"""``savl::guided_projection`` on the GPU; the mathematics is in savl/ops/guided_projection.py.

A program owns a tile of pixels with all their channels of ``x`` and ``mu``, held as in `savl.kernels.linear`, and goes
through the outputs in blocks: three products (projection, gamma and, where there is one, beta), whose results meet in
registers. With e bytes a number, P pixels, C channels and R channels of mu: (3 · C + R) · e · P bytes and
2 · C · (C + R) · P FLOPs, without beta. At C = 144 and R = 64 in bfloat16 these are 60 FLOPs a byte: memory limits it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from savl.kernels.convolution import Launch, blocks_of, near, run
from savl.kernels.launch import architecture_for, device_of, precision
from savl.kernels.linear import add_product, load_line, load_pieces, pieces_of
from savl.kernels.targets import Architecture


@triton.jit
def project_guided(
    x,
    weight,
    bias,
    residual,
    mu,
    guidance_weight,
    guidance_bias,
    out,
    pixels,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    MU_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_HEAD: tl.constexpr,
    LATENT_TAIL: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute all outputs of BLOCK_P pixels.

    Owns: BLOCK_P pixels, all outputs. Reads: their x, mu and residual once, and the parameters. Keeps: x and mu,
    operands of all products; two tiles (BLOCK_P, BLOCK_N) in float32. Writes: out. Bytes and FLOPs: see the module.

    Pointers: x (pixels, CHANNELS), mu (pixels, LATENT) and residual (pixels, OUTPUTS) with contiguous channels and
    evenly spaced pixels, constants apart; guidance_weight (OUTPUTS or, where SHIFTED, 2 · OUTPUTS, LATENT) and the
    other parameters contiguous.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    there = first + p < pixels
    head, tail = load_pieces(x + first * X_STRIDE, p, there, X_STRIDE, CHANNELS, HEAD, TAIL)
    guide, guide_tail = load_pieces(mu + first * MU_STRIDE, p, there, MU_STRIDE, LATENT, LATENT_HEAD, LATENT_TAIL)
    residual += first * RESIDUAL_STRIDE
    out += first * OUTPUTS
    for start in tl.range(0, OUTPUTS, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        real = n < OUTPUTS
        tile = there[:, None] & real[None, :]
        zero = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        y = add_product(head, tail, weight, n, real, zero, CHANNELS, HEAD, TAIL, PRECISION)
        y += load_line(bias, n, real)[None, :]
        gamma = add_product(
            guide, guide_tail, guidance_weight, n, real, zero, LATENT, LATENT_HEAD, LATENT_TAIL, PRECISION
        )
        y += y * (gamma + load_line(guidance_bias, n, real)[None, :])
        if SHIFTED:
            n_beta = OUTPUTS + n
            beta = add_product(
                guide, guide_tail, guidance_weight, n_beta, real, zero, LATENT, LATENT_HEAD, LATENT_TAIL, PRECISION
            )
            y += beta + load_line(guidance_bias, n_beta, real)[None, :]
        y += tl.load(residual + p[:, None] * RESIDUAL_STRIDE + n[None, :], mask=tile, other=0.0).to(tl.float32)
        tl.store(out + p[:, None] * OUTPUTS + n[None, :], y.to(out.dtype.element_ty), mask=tile)


def guided_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    mu: Tensor,
    guidance_weight: Tensor,
    guidance_bias: Tensor,
    launch: Launch = run,
    architecture: Architecture | None = None,
) -> Tensor:
    """Launch the kernel; arguments as for `savl.ops.guided_projection`.

    Args:
        x: ``(B, H, W, K)``.
        weight: ``(C, K)``; its dtype, and that of the other parameters, may be float32.
        bias: ``(C,)``.
        residual: ``(B, H, W, C)``.
        mu: ``(B, H, W, R)``.
        guidance_weight: ``(C, R)`` or ``(2 · C, R)``.
        guidance_bias: ``(C,)`` or ``(2 · C,)``.
        launch: Function that launches the kernel.
        architecture: Architecture of the GPU to choose block sizes for; None for that of the device of ``x``.

    Returns:
        ``(B, H, W, C)``.
    """
    channels, latent, outputs, pixels = x.shape[3], mu.shape[3], weight.shape[0], x.shape[:3].numel()
    out = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    if pixels == 0:
        return out
    x, residual, mu = near(x), near(residual), near(mu)
    (head, tail), (latent_head, latent_tail) = pieces_of(channels), pieces_of(latent)
    converted = max(weight.dtype.itemsize, guidance_weight.dtype.itemsize) > x.dtype.itemsize
    architecture = architecture or architecture_for(x)
    block_p, block_n, warps, stages = blocks_of(x.dtype, channels, outputs, True, converted, architecture)
    # Two products need more registers than the one for which these are the largest tiles.
    if x.dtype == torch.float32:
        block_n = 16
    elif architecture == "gfx1100":
        block_p, block_n = 32, 32
    with device_of(x):
        launch(
            project_guided, triton.cdiv(pixels, block_p),
            x, weight.contiguous(), bias.contiguous(), residual, mu, guidance_weight.contiguous(),
            guidance_bias.contiguous(), out, pixels,
            X_STRIDE=x.stride(2), RESIDUAL_STRIDE=residual.stride(2), MU_STRIDE=mu.stride(2), CHANNELS=channels,
            HEAD=head, TAIL=tail, LATENT=latent, LATENT_HEAD=latent_head, LATENT_TAIL=latent_tail, OUTPUTS=outputs,
            SHIFTED=guidance_weight.shape[0] > outputs, PRECISION=precision(x.dtype, channels), BLOCK_P=block_p,
            BLOCK_N=block_n, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    return out
