"""``savl::window_attention`` and its backward pass on the GPU; the mathematics is in savl/ops/window_attention.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from savl.kernels import launch


def _call(
    qkv: Tensor,
    bias_table: Tensor | None,
    severity: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    heads: int,
    window_height: int,
    window_width: int,
    key_height: int,
    key_width: int,
    shift_rows: int,
    shift_columns: int,
    dilated: bool,
    mask: float | None,
) -> launch.Attention:
    q = launch.with_even_pixels(qkv)
    if k is None or v is None:
        q, k, v = q.chunk(3, dim=-1)
    else:
        k, v = launch.with_even_keys(k, v)
    return launch.Attention(
        q,
        k,
        v,
        bias_table if bias is None else bias,
        None if severity is None else severity.contiguous(),
        (window_height, window_width),
        (key_height, key_width),
        heads,
        None if scale is None else scale.contiguous(),
        (shift_rows, shift_columns),
        dilated=dilated,
        mask=-math.inf if mask is None else mask,
    )


def window_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp for the backward pass; arguments and results as in the op's schema."""
    return launch.forward(_call(*arguments))


def window_attention_backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the seven tensors, empty for absent ones; arguments as in the op's schema."""
    *tensors, out, lse = arguments[:9]
    qkv, bias_table, _, k, v, bias, _ = tensors
    call = _call(*tensors, *arguments[9:])
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_k, grad_v, absent = qkv.new_empty(0), qkv.new_empty(0), qkv.new_empty(0)
    if k is None or v is None:
        parts = grad_qkv.chunk(3, dim=-1)
    else:
        grad_k, grad_v = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (k, v))
        parts = (grad_qkv, grad_k, grad_v)
    grad_bias, grad_severity, grad_scale = launch.backward(call, out, lse, grad_out.contiguous(), *parts)
    grad_table = absent if bias_table is None else grad_bias
    grad_bias = absent if bias is None else grad_bias
    return grad_qkv, grad_table, grad_severity, grad_k, grad_v, grad_bias, grad_scale
