"""Dtype of the log-sum-exp that the forward attention kernels hand to the backward ones. Imports without Triton."""

from __future__ import annotations

import torch


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the log-sum-exp: float64 for float32 tensors, so that its rounding does not show.

    Args:
        dtype: Dtype of q.

    Returns:
        ``torch.float64`` for float32, else ``torch.float32``.
    """
    return torch.float64 if dtype == torch.float32 else torch.float32
