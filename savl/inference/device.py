"""Devices and dtypes to compute in: checked, and chosen where the user does not name them."""

from __future__ import annotations

import torch

from savl.ops import kernel_report
from savl.ops.library import CPP
from savl.ops.op import OPS
from savl.ops.scopes import fused_by_default


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


def checked_dtype(dtype: str | torch.dtype, *, also: tuple[str, ...] = ()) -> torch.dtype:
    """Return the dtype for "float32" or "bfloat16", with or without a leading "torch.".

    Args:
        dtype: The dtype or its name.
        also: What else the caller accepts, for the message.

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
    raise ValueError(f"dtype must be {' or '.join((*also, *names))}, got {name!r}{reason}")


MEASURED_IN_BFLOAT16 = ("savl-tiny",)
"""Names of shipped weights whose 8-bit results in bfloat16 were measured to be within one level of those in
float32 (`benchmarks.studies.bfloat16`). Measure new weights before their name is added or kept here."""


def is_faster_in_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes a network faster in bfloat16 than in float32, as far as this is known.

    This is so on a CPU with fast products of bfloat16 numbers, which the C++ kernels then use: their
    instruction set is "amx" or "avx512_bf16". By default they use the fastest one of the processor, and prefer "avx512"
    to "avx512_bf16" on Intel's processors that multiply bfloat16 fast with AMX only. The C++ kernels must serve all ops
    that they can serve; eager PyTorch and other devices were not measured.
    """
    if device.type != "cpu":
        return False
    with fused_by_default():
        report = kernel_report()
    fused = all(report.serving(name) == CPP for name, op in OPS.items() if CPP in op.backends)
    return fused and report.instruction_set in ("amx", "avx512_bf16")
