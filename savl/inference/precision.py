"""The number formats the network may compute in."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16)


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Turns "float32" or "bfloat16", with or without a leading "torch.", into the dtype.

    Raises:
        ValueError: for anything else; for float16 it says why that is refused.
    """
    names = {str(accepted).removeprefix("torch."): accepted for accepted in DTYPES}
    name = str(dtype).removeprefix("torch.")
    if name in names:
        return names[name]
    reason = ""
    if name in ("float16", "half", "fp16"):
        reason = "; networks of the HAT family overflow in float16 and give black or NaN pictures"
    raise ValueError(f"dtype must be {' or '.join(names)}, got {name!r}{reason}")
