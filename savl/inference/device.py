"""The device and the dtype to compute in, from what users write."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(name: str) -> torch.device:
    """Turns "cpu", "cuda", "cuda:1", "mps" or "auto" (`best_device`) into a device that this machine has.

    Raises:
        ValueError: another name, or a device that is not there.
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


def indexed(device: torch.device) -> torch.device:
    """Give "cuda" the number of the device that is current now; every other device stays as it is.

    Tensors on a GPU name its number, so that "cuda" equals the device of none; and which GPU it means would change with
    `torch.cuda.set_device`.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


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
