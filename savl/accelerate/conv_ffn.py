"""The feed-forward network of SRFormer and ATD: two linear layers with a depthwise convolution between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.accelerate import parts
from savl.ops import KernelSettings


def is_conv_ffn(ffn: Any) -> bool:
    """Return whether a module is ``fc2(h + gelu(convolution(h)))`` with ``h = act(fc1(x))``, as ConvFFN."""
    if not parts.is_mlp(ffn) or not parts.has(ffn, "dwconv"):
        return False
    local = getattr(ffn.dwconv, "depthwise_conv", None)
    if not isinstance(local, nn.Sequential) or len(local) != 2 or type(local[0]) is not nn.Conv2d:
        return False
    return parts.activation_of(local[1]) == {"activation": "gelu"}


def apply_conv_ffn(x: Tensor, ffn: Any, norm: nn.LayerNorm, kernels: KernelSettings, residual: Tensor | None) -> Tensor:
    """Return ``residual + ffn(norm(x))`` for a module that `is_conv_ffn`.

    The convolution sees channels-last features, for which torch has a kernel on CPUs, so that nothing is copied. For
    the gradient of its weight, that kernel is less accurate than the one for contiguous planes.
    """
    activation = parts.activation_of(ffn.act)
    hidden = parts.layer(x, ffn.fc1, kernels, norm, **activation or {})
    if activation is None:
        hidden = ffn.act(hidden)
    convolution, planes = ffn.dwconv.depthwise_conv[0], hidden.permute(0, 3, 1, 2)
    if torch.is_grad_enabled() and convolution.weight.requires_grad:
        planes = planes.contiguous()
    local: Tensor = convolution(planes).permute(0, 2, 3, 1)
    local = F.gelu(local) if local.requires_grad else torch.ops.aten.gelu_(local)
    return parts.layer(parts.added(local, hidden), ffn.fc2, kernels, residual=residual)
