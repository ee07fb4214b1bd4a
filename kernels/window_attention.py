"""``savl::window_attention`` and its backward pass on the GPU; the mathematics is in savl/ops/window_attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from savl.kernels import launch


def _call(qkv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, shift: int) -> launch.Attention:
    q, k, v = launch.with_even_pixels(qkv).chunk(3, dim=-1)
    return launch.Attention(
        q, k, v, bias_table, None if severity is None else severity.contiguous(), window, window, shift
    )


def window_attention(
    qkv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, shift: int
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp for the backward pass, in the shapes of the op's schema."""
    return launch.forward(_call(qkv, bias_table, severity, window, shift))


def window_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    severity: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, the bias table and the severity (empty without severity)."""
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    call = _call(qkv, bias_table, severity, window, shift)
    grad_table, grad_severity = launch.backward(call, out, lse, grad_out.contiguous(), *grad_qkv.chunk(3, dim=-1))
    return grad_qkv, grad_table, grad_severity
