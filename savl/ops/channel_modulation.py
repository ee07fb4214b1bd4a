"""Channel modulation: scale and shift the attended features by vectors read off the degradation field.

    out = residual + (1 + gamma) · attended + beta

The last step of DSCA (SAVL, ICLR 2026): one vector of C factors per pixel, so that channels react to the type of
degradation found there. The 1 + makes gamma = 0 leave the attended features as they are.
"""

from __future__ import annotations

from torch import Tensor

from savl.ops.validation import (
    check_same_device,
    check_same_dtype,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
)

OP = "channel_modulation"


def channel_modulation(attended: Tensor, gamma: Tensor, beta: Tensor | None, residual: Tensor) -> Tensor:
    """Compute ``residual + (1 + gamma) · attended + beta``.

    Args:
        attended: ``(B, H, W, C)`` floating, output of the spatial path.
        gamma: ``(B, H, W, C)``, same dtype.
        beta: ``(B, H, W, C)``, same dtype, or None for no shift.
        residual: ``(B, H, W, C)``, same dtype or float32 (autocast keeps residual streams in float32).

    Returns:
        ``(B, H, W, C)``, dtype of ``residual``.

    Raises:
        TypeError: An argument is not a tensor, not floating, or dtypes do not fit together.
        ValueError: Shapes or devices differ.
    """
    check_tensor(OP, "attended", attended, "(B, H, W, C)")
    for name, value in (("gamma", gamma), ("beta", beta), ("residual", residual)):
        if name == "beta" and value is None:
            continue
        value = check_tensor(OP, name, value, "(B, H, W, C)")
        check_shape(OP, name, value, tuple(attended.shape), "that of attended")
    check_same_dtype(OP, "attended", attended, gamma=gamma, beta=beta)
    check_same_dtype_or_float32(OP, "attended", attended, residual=residual)
    check_same_device(OP, "attended", attended, gamma=gamma, beta=beta, residual=residual)
    return channel_modulation_reference(attended, gamma, beta, residual)


def channel_modulation_reference(attended: Tensor, gamma: Tensor, beta: Tensor | None, residual: Tensor) -> Tensor:
    """The definition of the truth. Arguments as `channel_modulation`."""
    out = residual + (1 + gamma) * attended
    if beta is not None:
        out = out + beta
    return out.to(residual.dtype)  # type promotion already gave it, but for float64 on a float32 residual
