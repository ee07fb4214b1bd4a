"""Transformations of torch for which the fused kernels have no rules: detect that a call is under one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A private name, as torch has no public one for the question. Without it torch raises an error of its own instead.
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _in_forward_mode() -> bool:
    """Return whether a level of forward mode is open, which is cheaper than to look at each tensor."""
    return getattr(forward_ad, "_current_level", 0) >= 0  # a private name: without it, the tensors are looked at


def why_transformed(*tensors: Tensor | None) -> str | None:
    """Return why the fused kernels cannot differentiate or map a call the way that is asked for, or None.

    They have derivatives of the first order in reverse mode. The transforms of `torch.func` (grad, vjp, jvp, jacrev,
    jacfwd, hessian, vmap) and the tangents of forward mode need the reference.

    Args:
        tensors: All arguments of the call that are tensors, and None for those that are omitted.
    """
    if _transforms_active():
        return "it is under a transform of torch.func, which savl.use_fused_kernels(False) serves"
    if not _in_forward_mode():
        return None
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            return "a tensor has a tangent of forward-mode differentiation, which savl.use_fused_kernels(False) serves"
    return None
