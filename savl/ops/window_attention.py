r"""Severity-reweighted shifted-window attention.

For a query pixel i and a key pixel j of the same window, each head computes:

    logits_ij = s_i · s_j · (q_i · k_j) / √d + bias[i − j] + shift_mask_ij
    out_i     = Σ_j softmax_j(logits_ij) · v_j

The severity s scales the similarity of each pair of pixels. Where the variance of the degradation field is low
(s > 1), attention becomes sharper; where the variance is high (s < 1), the positional bias dominates. Since
s_i·s_j·(q_i·k_j) = (s_i q_i)·(s_j k_j), a fused kernel only has to scale each query and each key once.

Windows are taken from the image rolled by ``−shift`` along both axes. The rolled image wraps around, so windows at
the far edges hold pixels from both sides of the image; ``shift_mask`` is −∞ between pixels of different sides.

Source: SAVL (ICLR 2026) for the severity; Swin Transformer (Liu et al., 2021) for the shift; HAT (Chen et al.,
2023) for the layout of the bias table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, INTERPRETED, TRITON
from savl.ops.op import Op, register
from savl.ops.relative_position import gather_bias
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import (
    check_heads,
    check_int,
    check_same_device,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
    check_window,
)

OP = "window_attention"


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None = None,
    *,
    window: int,
    shift: int = 0,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Compute attention within windows, optionally shifted, with logits scaled by severity.

    Args:
        qkv: ``(B, H, W, 3C)`` floating: queries, keys and values side by side, each C = heads × d channels with the
            heads outermost. H and W in pixels, positive multiples of ``window``.
        bias_table: ``((2·window − 1)², heads)``, dtype of ``qkv`` or float32. Row
            ``(dy + window − 1)·(2·window − 1) + dx + window − 1`` holds the bias for (dy, dx) = query − key in
            pixels.
        severity: ``(B, H, W)``, dtype of ``qkv`` or float32; None for plain attention (s = 1).
        window: Side of the square window, in pixels.
        shift: Cyclic shift in pixels, 0 ≤ shift < window.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        ``(B, H, W, C)``, dtype of ``qkv``, heads outermost in C.

    Raises:
        TypeError: An argument is not a floating-point tensor, dtypes are incompatible, or window or shift is
            not an int.
        ValueError: Shapes, window, shift or devices are incompatible.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    _validate(qkv, bias_table, severity, window, shift)
    if serves(WINDOW_ATTENTION, kernels, qkv, bias_table, severity):
        fused: Tensor = torch.ops.savl.window_attention(qkv, bias_table, severity, window, shift)[0]
        return fused
    return window_attention_reference(qkv, bias_table, severity, window=window, shift=shift)


def window_attention_reference(
    qkv: Tensor, bias_table: Tensor, severity: Tensor | None, *, window: int, shift: int
) -> Tensor:
    """Compute the reference of `window_attention`, with one PyTorch operation per term of the formula."""
    batch, height, width, channels3 = qkv.shape
    dtype = qkv.dtype
    heads = bias_table.shape[1]
    head_dim = channels3 // 3 // heads

    if shift:
        qkv = torch.roll(qkv, shifts=(-shift, -shift), dims=(1, 2))
    windows = partition_windows(qkv, window)  # (B, windows, N, 3C)
    count, pixels = windows.shape[1:3]
    q, k, v = windows.view(batch, count, pixels, 3, heads, head_dim).permute(3, 0, 1, 4, 2, 5)

    if severity is not None:
        if shift:
            severity = torch.roll(severity, shifts=(-shift, -shift), dims=(1, 2))
        s = partition_windows(severity.to(qkv.dtype).unsqueeze(-1), window).unsqueeze(2)
        q, k = s * q, s * k  # s is (B, windows, 1, N, 1)

    logits = (q * head_dim**-0.5) @ k.transpose(-2, -1)  # (B, windows, heads, N, N)
    logits = logits + gather_bias(bias_table.to(qkv.dtype), window, window)
    if shift:
        logits = logits + shift_mask(height, width, window, shift, logits)[:, None]
    attended = logits.softmax(dim=-1) @ v  # (B, windows, heads, N, d)

    attended = attended.transpose(2, 3).reshape(batch, count, pixels, heads * head_dim)
    out = merge_windows(attended, window, height, width)
    if shift:
        out = torch.roll(out, shifts=(shift, shift), dims=(1, 2))
    return out.to(dtype)  # under autocast, the products are bfloat16


# Parts of the reference


def partition_windows(image: Tensor, window: int) -> Tensor:
    """Cut ``(B, H, W, C)`` into ``(B, windows, window², C)``, windows in row-major order."""
    batch, height, width, channels = image.shape
    rows, columns = height // window, width // window
    image = image.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return image.reshape(batch, rows * columns, window * window, channels)


def merge_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `partition_windows`: ``(B, windows, window², C)`` → ``(B, H, W, C)``."""
    batch, _, _, channels = windows.shape
    rows, columns = height // window, width // window
    image = windows.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    return image.reshape(batch, height, width, channels)


def shift_regions(height: int, width: int, window: int, shift: int, device: torch.device | str) -> Tensor:
    """Number the regions of the rolled image within which the pixels of a window may attend to each other.

    Along each axis, the rolled image has three intervals: all windows but the last; the part of the last window that
    did not wrap around; and the part that wrapped around. Two pixels of a window may attend to each other if they lie
    in the same interval along both axes.

    Args:
        height: Image height in pixels, a multiple of ``window``.
        width: Image width in pixels, a multiple of ``window``.
        window: Window side in pixels.
        shift: Cyclic shift in pixels, 0 < shift < window.
        device: Device of the result.

    Returns:
        ``(windows, window²)`` int64: number of the region of each pixel. Two pixels of a window may attend to each
        other if their numbers are equal.
    """

    def intervals(length: int) -> Tensor:
        position = torch.arange(length, device=device)
        return (position >= length - window).long() + (position >= length - shift).long()

    region = 3 * intervals(height)[:, None] + intervals(width)[None, :]
    return partition_windows(region[None, :, :, None], window)[0, :, :, 0]


def shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Return the mask that prevents attention between the regions of a window (see `shift_regions`).

    Args:
        height: Image height in pixels, a multiple of ``window``.
        width: Image width in pixels, a multiple of ``window``.
        window: Window side in pixels.
        shift: Cyclic shift in pixels, 0 < shift < window.
        like: Tensor that has the dtype and device of the result.

    Returns:
        ``(windows, window², window²)``: 0 where a query (second dimension) may attend to a key (third), −∞ elsewhere.
    """
    region = shift_regions(height, width, window, shift, like.device)
    forbidden = region[:, :, None] != region[:, None, :]
    return torch.zeros_like(forbidden, dtype=like.dtype).masked_fill_(forbidden, float("-inf"))


def _validate(qkv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, shift: int) -> None:
    check_tensor(OP, "qkv", qkv, "(B, H, W, 3C)")
    check_tensor(OP, "bias_table", bias_table, "((2·window − 1)², heads)")
    batch, height, width, channels3 = qkv.shape
    if channels3 == 0 or channels3 % 3 != 0:
        raise ValueError(f"{OP}: the last dimension of qkv must be 3C (q, k and v side by side), got {channels3}")
    check_window(OP, height, width, window)
    check_int(OP, "shift", shift)
    if not 0 <= shift < window:
        raise ValueError(f"{OP}: shift must satisfy 0 <= shift < window={window} pixels, got {shift}")
    rows = (2 * window - 1) ** 2
    check_heads(OP, channels3 // 3, bias_table, rows, f"(2·{window} − 1)² relative positions")
    if severity is not None:
        check_tensor(OP, "severity", severity, "(B, H, W)")
        check_shape(OP, "severity", severity, (batch, height, width), "one value per pixel of qkv")
    check_same_dtype_or_float32(OP, "qkv", qkv, bias_table=bias_table, severity=severity)
    check_same_device(OP, "qkv", qkv, bias_table=bias_table, severity=severity)


# The op that fused kernels implement. Its second result is the log-sum-exp that the Triton backward pass needs.


def empty_log_sum_exp(q: Tensor, heads: int) -> Tensor:
    """Return an uninitialised log-sum-exp: ``(B, heads, H, W)`` if Triton computes the op, else an empty tensor."""
    if q.device.type != "cuda" and not INTERPRETED:
        return q.new_empty(0, dtype=torch.float32)
    from savl.kernels.log_sum_exp import lse_dtype

    return q.new_empty(q.shape[0], heads, q.shape[1], q.shape[2], dtype=lse_dtype(q.dtype))


def kept_outputs(ctx: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return the outputs that the backward pass needs: both of them, or None twice if there is no log-sum-exp."""
    out, lse = output
    ctx.mark_non_differentiable(lse)
    return (out, lse) if lse.dim() == 4 else (None, None)


def _decomposition(
    qkv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, shift: int
) -> tuple[Tensor, Tensor]:
    out = window_attention_reference(qkv, bias_table, severity, window=window, shift=shift)
    return out, empty_log_sum_exp(qkv, bias_table.shape[1])


def _fake(qkv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, shift: int) -> tuple[Tensor, Tensor]:
    batch, height, width, channels3 = qkv.shape
    out = qkv.new_empty(batch, height, width, channels3 // 3)
    return out, empty_log_sum_exp(qkv, bias_table.shape[1])


def _fake_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_severity = qkv.new_empty(0) if severity is None else severity.new_empty(severity.shape)
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape), grad_severity


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias_table, severity, ctx.window, ctx.shift = inputs
    ctx.save_for_backward(qkv, bias_table, severity, *kept_outputs(ctx, output))


def _backward(ctx: Any, grad_out: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under non-reentrant checkpointing, saved tensors can be unpacked only once
    gradients = torch.ops.savl.window_attention_backward(grad_out, *saved, ctx.window, ctx.shift)
    grad_qkv, grad_bias_table, grad_severity = gradients
    return grad_qkv, grad_bias_table, None if saved[2] is None else grad_severity, None, None


# Cases for tests and benchmarks


def window_attention_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    rows: int = 2,
    columns: int = 2,
    window: int = 8,
    shift: int = 0,
    heads: int = 2,
    head_dim: int = 24,
    severity: bool = True,
    seed: int = 0,
) -> Case:
    """Return a case with an image of ``rows`` × ``columns`` windows."""
    draw, height, width = Draw(dtype, seed), rows * window, columns * window
    arguments = {
        "qkv": draw.normal(batch, height, width, 3 * heads * head_dim),
        "bias_table": draw.normal((2 * window - 1) ** 2, heads),
        "severity": draw.severity(batch, height, width) if severity else None,
    }
    terms = batch * rows * columns * window**2 + head_dim  # the bias gradient is the longest sum
    label = f"window {window}, shift {shift}, head dim {head_dim}{', severity' if severity else ''}"
    return Case(OP, arguments, {"window": window, "shift": shift}, terms, label)


def attention_benchmark(
    arguments: dict[str, Tensor | None], options: dict[str, Any], pairs: int, channels: int, side: int
) -> BenchmarkProblem:
    """Return a benchmark of an attention op, with the bytes and floating-point operations that the op requires.

    The forward pass needs two products per pair of pixels: q·k, and p·v with the attention weight p. The backward pass
    computes q·k again, and the gradients of p, q, k and v. Products that a kernel recomputes beyond these are not
    counted, so they do not raise its FLOP/s.

    Args:
        arguments: Tensors of the op.
        options: Keyword arguments of the op: its window sizes and, if it has one, its shift.
        pairs: Number of pairs of a query and a key that attend to each other.
        channels: Number of channels C, summed over all heads.
        side: Side of the image, in pixels.
    """
    first = next(value for value in arguments.values() if value is not None)
    size, product = float(first.element_size() * channels * side**2), 2.0 * pairs * channels
    return BenchmarkProblem(arguments, options, 4 * size, 8 * size, 2 * product, 5 * product, bandwidth_bound=False)


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """Return window attention as in savl-base: 16×16 windows, shift 8, 6 heads of 24 channels, with severity."""
    window, shift, heads, channels = 16, 8, 6, 144
    arguments: dict[str, Tensor | None] = {
        "qkv": draw.normal(1, side, side, 3 * channels),
        "bias_table": draw.normal((2 * window - 1) ** 2, heads),
        "severity": draw.severity(1, side, side),
    }
    # Along each axis, the shift divides the last window into two intervals, which do not attend to each other.
    intervals = [window] * (side // window - 1) + [shift, window - shift]
    pairs = sum(length**2 for length in intervals) ** 2
    return attention_benchmark(arguments, {"window": window, "shift": shift}, pairs, channels, side)


WINDOW_ATTENTION = register(
    Op(
        name=OP,
        function=window_attention,
        reference=window_attention_reference,
        backends={TRITON: None, CPP: None},
        schema="window_attention(Tensor qkv, Tensor bias_table, Tensor? severity, int window, int shift) "
        "-> (Tensor, Tensor)",
        backward_schema="window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? severity, "
        "Tensor? out, Tensor? lse, int window, int shift) -> (Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        decomposition=_decomposition,
        setup_context=_setup_context,
        backward=_backward,
        case=window_attention_case,
        full_cases=(
            {"window": 16, "shift": 8, "heads": 3},
            {"window": 16, "heads": 3, "head_dim": 30, "severity": False},
            {"window": 8, "shift": 4},
            {"window": 5, "shift": 2, "rows": 1, "columns": 3, "head_dim": 7},
        ),
        quick_cases=(
            {"window": 16, "shift": 8, "rows": 1, "heads": 1},
            {"window": 16, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
            {"window": 8, "shift": 4},
            {"window": 5, "shift": 2, "rows": 1, "columns": 3, "head_dim": 7},
        ),
        small_cases=(
            {"batch": 2, "window": 4, "head_dim": 5, "columns": 3},
            {"batch": 2, "window": 5, "shift": 2, "head_dim": 8},
            {"window": 4, "shift": 1, "head_dim": 9, "severity": False},
        ),
        tiny_cases=(
            {"window": 2, "head_dim": 2, "rows": 2, "columns": 1},
            {"window": 2, "shift": 1, "head_dim": 2, "rows": 2, "columns": 1},
            {"window": 2, "shift": 1, "head_dim": 3, "rows": 1, "columns": 1, "severity": False},
        ),
        interpreter_cases=(
            {"window": 8, "shift": 4, "heads": 1},
            {"window": 4, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
        ),
        title="window attention",
        benchmark=_benchmark,
    )
)
