r"""Overlapping cross-window attention: queries of a w×w window, keys and values of the o×o window around it.

For a query pixel i of a window and a key pixel j of the o×o window with the same centre, each head computes:

    logits_ij = s_i · s_j · (q_i · k_j) / √d + bias[i − j]
    out_i     = Σ_j softmax_j(logits_ij) · v_j

Keys and values outside the image are zeros that are *not* masked: their logits are the bias alone and they take their
share of the softmax mass, exactly as in the published HAT (Chen et al., 2023), whose unfold pads with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, TRITON
from savl.ops.op import Op, register
from savl.ops.relative_position import gather_bias
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import (
    check_heads,
    check_int,
    check_same_device,
    check_same_dtype,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
    check_window,
)
from savl.ops.window_attention import (
    attention_benchmark,
    empty_log_sum_exp,
    kept_outputs,
    merge_windows,
    partition_windows,
)

OP = "overlapping_window_attention"


def overlapping_window_attention(
    q: Tensor,
    kv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None = None,
    *,
    window: int,
    key_window: int,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Compute attention from the queries of each window to the keys of the larger window around it.

    Args:
        q: ``(B, H, W, C)`` floating queries, C = heads × d with the heads outermost. H and W in pixels, positive
            multiples of ``window``.
        kv: ``(B, H, W, 2C)``, same dtype: keys and values side by side.
        bias_table: ``((window + key_window − 1)², heads)``, dtype of ``q`` or float32. Row
            ``(dy + half)·(window + key_window − 1) + dx + half`` with half = (window + key_window)/2 − 1 holds the
            bias for (dy, dx) = query − key in pixels.
        severity: ``(B, H, W)``, dtype of ``q`` or float32; None for plain attention (s = 1).
        window: Side w of the query windows, in pixels.
        key_window: Side o of the key windows, in pixels; o ≥ w and o − w even.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        ``(B, H, W, C)``, dtype of ``q``, heads outermost in C.

    Raises:
        TypeError: An argument is not a floating-point tensor, dtypes are incompatible, or a window is not an
            int.
        ValueError: Shapes, windows or devices are incompatible.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    _validate(q, kv, bias_table, severity, window, key_window)
    if serves(OVERLAPPING_WINDOW_ATTENTION, kernels, q, kv, bias_table, severity):
        fused: Tensor = torch.ops.savl.overlapping_window_attention(q, kv, bias_table, severity, window, key_window)[0]
        return fused
    return overlapping_window_attention_reference(q, kv, bias_table, severity, window=window, key_window=key_window)


def overlapping_window_attention_reference(
    q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, *, window: int, key_window: int
) -> Tensor:
    """Compute the reference of `overlapping_window_attention`, with one PyTorch operation per term of the formula."""
    batch, height, width, channels = q.shape
    dtype = q.dtype
    heads = bias_table.shape[1]
    head_dim = channels // heads

    if severity is not None:
        s = severity.to(q.dtype).unsqueeze(-1)
        k, v = kv.chunk(2, dim=-1)
        q, kv = s * q, torch.cat((s * k, v), dim=-1)

    queries = partition_windows(q, window)  # (B, windows, w², C)
    count = queries.shape[1]
    queries = queries.view(batch, count, window * window, heads, head_dim).transpose(2, 3)
    keys_values = partition_overlapping_windows(kv, window, key_window)  # (B, windows, o², 2C)
    keys_values = keys_values.view(batch, count, key_window * key_window, 2, heads, head_dim)
    k, v = keys_values.permute(3, 0, 1, 4, 2, 5)

    logits = (queries * head_dim**-0.5) @ k.transpose(-2, -1)  # (B, windows, heads, w², o²)
    logits = logits + gather_bias(bias_table.to(q.dtype), window, key_window)
    attended = logits.softmax(dim=-1) @ v

    attended = attended.transpose(2, 3).reshape(batch, count, window * window, channels)
    return merge_windows(attended, window, height, width).to(dtype)  # under autocast, the products are bfloat16


def partition_overlapping_windows(image: Tensor, window: int, key_window: int) -> Tensor:
    """Cut ``(B, H, W, C)`` into the o×o window around each w×w window, with zeros outside the image.

    Returns:
        ``(B, windows, key_window², C)``, windows in row-major order.
    """
    batch, height, width, channels = image.shape
    margin = (key_window - window) // 2
    padded = F.pad(image, (0, 0, margin, margin, margin, margin))
    tiles = padded.unfold(1, key_window, window).unfold(2, key_window, window)  # (B, rows, columns, C, o, o)
    count = (height // window) * (width // window)
    return tiles.permute(0, 1, 2, 4, 5, 3).reshape(batch, count, key_window * key_window, channels)


def _validate(q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, key_window: int) -> None:
    check_tensor(OP, "q", q, "(B, H, W, C)")
    check_tensor(OP, "kv", kv, "(B, H, W, 2C)")
    check_tensor(OP, "bias_table", bias_table, "((window + key_window − 1)², heads)")
    batch, height, width, channels = q.shape
    check_shape(OP, "kv", kv, (batch, height, width, 2 * channels), "keys and values for every pixel of q")
    check_window(OP, height, width, window)
    check_int(OP, "key_window", key_window)
    if key_window < window or (key_window - window) % 2 != 0:
        raise ValueError(
            f"{OP}: key_window must be at least window={window} and differ from it by an even number of pixels, got "
            f"{key_window}"
        )
    rows = (window + key_window - 1) ** 2
    check_heads(OP, channels, bias_table, rows, f"({window} + {key_window} − 1)² relative positions")
    if severity is not None:
        check_tensor(OP, "severity", severity, "(B, H, W)")
        check_shape(OP, "severity", severity, (batch, height, width), "one value per pixel of q")
    check_same_dtype(OP, "q", q, kv=kv)
    check_same_dtype_or_float32(OP, "q", q, bias_table=bias_table, severity=severity)
    check_same_device(OP, "q", q, kv=kv, bias_table=bias_table, severity=severity)


# The op that fused kernels implement. Its results are those of window attention.


def _decomposition(
    q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, key_window: int
) -> tuple[Tensor, Tensor]:
    out = overlapping_window_attention_reference(q, kv, bias_table, severity, window=window, key_window=key_window)
    return out, empty_log_sum_exp(q, bias_table.shape[1])


def _fake(
    q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, key_window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), empty_log_sum_exp(q, bias_table.shape[1])


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window: int,
    key_window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_severity = q.new_empty(0) if severity is None else severity.new_empty(severity.shape)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), bias_table.new_empty(bias_table.shape), grad_severity


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, bias_table, severity, ctx.window, ctx.key_window = inputs
    ctx.save_for_backward(q, kv, bias_table, severity, *kept_outputs(ctx, output))


def _backward(ctx: Any, grad_out: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under non-reentrant checkpointing, saved tensors can be unpacked only once
    gradients = torch.ops.savl.overlapping_window_attention_backward(grad_out, *saved, ctx.window, ctx.key_window)
    grad_q, grad_kv, grad_bias_table, grad_severity = gradients
    return grad_q, grad_kv, grad_bias_table, None if saved[3] is None else grad_severity, None, None


# Cases for tests and benchmarks


def overlapping_window_attention_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    rows: int = 2,
    columns: int = 2,
    window: int = 8,
    key_window: int = 12,
    heads: int = 2,
    head_dim: int = 24,
    severity: bool = True,
    seed: int = 0,
) -> Case:
    """Return a case of overlapping attention on ``rows`` × ``columns`` windows."""
    draw, height, width = Draw(dtype, seed), rows * window, columns * window
    channels = heads * head_dim
    arguments = {
        "q": draw.normal(batch, height, width, channels),
        "kv": draw.normal(batch, height, width, 2 * channels),
        "bias_table": draw.normal((window + key_window - 1) ** 2, heads),
        "severity": draw.severity(batch, height, width) if severity else None,
    }
    terms = batch * rows * columns * key_window**2 + head_dim
    label = f"windows {window} in {key_window}, head dim {head_dim}{', severity' if severity else ''}"
    options = {"window": window, "key_window": key_window}
    return Case(OP, arguments, options, terms, label)


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """Return overlapping attention as in savl-base: 24×24 keys, 16×16 queries, 6 heads of 24 channels, no severity."""
    window, key_window, heads, channels = 16, 24, 6, 144
    arguments: dict[str, Tensor | None] = {
        "q": draw.normal(1, side, side, channels),
        "kv": draw.normal(1, side, side, 2 * channels),
        "bias_table": draw.normal((window + key_window - 1) ** 2, heads),
    }
    options = {"window": window, "key_window": key_window}
    return attention_benchmark(arguments, options, side**2 * key_window**2, channels, side)


OVERLAPPING_WINDOW_ATTENTION = register(
    Op(
        name=OP,
        function=overlapping_window_attention,
        reference=overlapping_window_attention_reference,
        backends={TRITON: None, CPP: None},
        schema="overlapping_window_attention(Tensor q, Tensor kv, Tensor bias_table, Tensor? severity, int window, "
        "int key_window) -> (Tensor, Tensor)",
        backward_schema="overlapping_window_attention_backward(Tensor grad_out, Tensor q, Tensor kv, "
        "Tensor bias_table, Tensor? severity, Tensor? out, Tensor? lse, int window, int key_window) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        decomposition=_decomposition,
        setup_context=_setup_context,
        backward=_backward,
        case=overlapping_window_attention_case,
        full_cases=(
            {"window": 16, "key_window": 24, "heads": 3, "severity": False},
            {"window": 8, "key_window": 12, "head_dim": 30},
            {"window": 5, "key_window": 9, "rows": 1, "columns": 3, "head_dim": 7},
        ),
        quick_cases=(
            {"window": 16, "key_window": 24, "rows": 1, "heads": 1, "severity": False},
            {"window": 8, "key_window": 12, "rows": 1, "head_dim": 30},
            {"window": 5, "key_window": 9, "rows": 1, "columns": 3, "head_dim": 7},
        ),
        small_cases=(
            {"batch": 2, "window": 4, "key_window": 6, "head_dim": 5},
            {"window": 2, "key_window": 8, "columns": 5, "rows": 3},
            {"window": 3, "key_window": 5, "severity": False},
        ),
        tiny_cases=(
            {"window": 2, "key_window": 4, "head_dim": 2, "rows": 1, "columns": 2},
            {"window": 1, "key_window": 5, "head_dim": 1, "rows": 2, "columns": 3},
        ),
        interpreter_cases=(
            {"window": 4, "key_window": 6, "rows": 1, "head_dim": 30},
            {"window": 8, "key_window": 12, "rows": 1, "columns": 1, "severity": False},
        ),
        title="overlapping attention",
        benchmark=_benchmark,
    )
)
