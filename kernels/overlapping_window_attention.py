"""``savl::overlapping_window_attention`` and its backward pass on the GPU; see savl/ops for the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from savl.kernels import launch


def _call(
    q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, key_window: int
) -> launch.Attention:
    k, v = launch.with_even_pixels(kv).chunk(2, dim=-1)
    return launch.Attention(
        launch.with_even_pixels(q),
        k,
        v,
        bias_table,
        None if severity is None else severity.contiguous(),
        (window, window),
        (key_window, key_window),
        bias_table.shape[1],
        margin=(key_window - window) // 2,
    )


def overlapping_window_attention(
    q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, key_window: int
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp for the backward pass, in the shapes of the op's schema."""
    return launch.forward(_call(q, kv, bias_table, severity, window, key_window))


def overlapping_window_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int,
    key_window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, kv, the bias table and the severity (empty without severity)."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_kv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    call = _call(q, kv, bias_table, severity, window, key_window)
    grad_table, grad_severity, _ = launch.backward(
        call, out, lse, grad_out.contiguous(), grad_q, *grad_kv.chunk(2, dim=-1)
    )
    return grad_q, grad_kv, grad_table, grad_severity
