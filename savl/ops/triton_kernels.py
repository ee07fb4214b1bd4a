"""Triton's part in the ops: whether it can serve, the registration, and the log-sum-exp that its backward pass wants.

Triton itself is imported when a kernel is launched for the first time, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from savl.ops.library import LIBRARY

OLDEST_TRITON = (3, 4)
OLDEST_CAPABILITY = (8, 0)
INTERPRETER_VARIABLE = "TRITON_INTERPRET"


def _installed() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'savl[triton]', on Linux)"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return None  # a build of one's own
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is installed, {'.'.join(map(str, OLDEST_TRITON))} or newer is needed"
    return None


TRITON_MISSING = _installed()
"""Why Triton cannot be used on any device, None where it can."""

INTERPRETED = TRITON_MISSING is None and os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes")
"""Whether Triton's interpreter runs the kernels, on tensors of the CPU. It is slow and meant for looking for errors, so
it serves only when asked for by name."""


def why_triton_unavailable() -> str | None:
    """Why the Triton kernels cannot serve on this machine, or None."""
    if TRITON_MISSING is not None or INTERPRETED:
        return TRITON_MISSING
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


@cache
def why_gpu_unfit(index: int) -> str | None:
    """Why the Triton kernels cannot serve on a GPU, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return (
            f"the Triton kernels need compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}, "
            f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}"
        )
    return None


def register_triton(op: str) -> None:
    """Register the kernels of ``savl.kernels.<op>`` for an op and its backward pass."""
    key = "CPU" if INTERPRETED else "CUDA"
    for name in (op, f"{op}_backward"):
        LIBRARY.impl(name, _late(op, name), key, allow_override=INTERPRETED)


def _late(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(import_module(f"savl.kernels.{module}"), name)(*args)

    return run


def empty_log_sum_exp(q: Tensor, heads: int) -> Tensor:
    """The op's second result without data: ``(B, heads, H, W)`` where Triton serves, else empty."""
    if q.device.type == "cuda" or INTERPRETED:
        from savl.kernels.log_sum_exp import lse_dtype

        return q.new_empty(q.shape[0], heads, q.shape[1], q.shape[2], dtype=lse_dtype(q.dtype))
    return q.new_empty(0, dtype=torch.float32)


def kept_outputs(ctx: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What the backward pass is given of both results: nothing where there is no log-sum-exp."""
    out, lse = output
    ctx.mark_non_differentiable(lse)
    return (out, lse) if lse.dim() == 4 else (None, None)
