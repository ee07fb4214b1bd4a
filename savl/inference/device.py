"""Devices and dtypes to compute in: checked, and chosen where the user does not name them."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """Return CUDA if available, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(name: str) -> torch.device:
    """Return the device for "cpu", "cuda", "cuda:1", "mps" or "auto" (`best_device`).

    Raises:
        ValueError: ``name`` is none of these, or this machine does not have the device.
    """
    if name == "auto":
        return best_device()
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise ValueError(f"device {name!r} is not auto, cpu, cuda, cuda:<number> or mps")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise ValueError(f"device {name!r}: this installation of torch sees {count} CUDA devices")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available on this machine")
    return torch.device(name)


def with_device_index(device: torch.device) -> torch.device:
    """Return ``device``, with the index of the current GPU added to a plain "cuda".

    The devices of tensors always have an index, so a plain "cuda" equals none of them. And it would mean another GPU
    after `torch.cuda.set_device`.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


DTYPES = (torch.float32, torch.bfloat16)


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype for "float32" or "bfloat16", with or without a leading "torch.".

    Raises:
        ValueError: ``dtype`` is another one. The message for float16 explains why it is refused.
    """
    names = {str(accepted).removeprefix("torch."): accepted for accepted in DTYPES}
    name = str(dtype).removeprefix("torch.")
    if name in names:
        return names[name]
    reason = ""
    if name in ("float16", "half", "fp16"):
        reason = "; networks of the HAT family overflow in float16 and give black or NaN images"
    raise ValueError(f"dtype must be {' or '.join(names)}, got {name!r}{reason}")
