"""Fused kernels on the command line: on, unless the user or the environment says otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

HELP = "Compute with PyTorch's own operations instead of the fused kernels: slower, the same picture."


def fused_unless(eager: bool) -> AbstractContextManager[Any]:
    """Return a block in which the reference serves with ``--eager``, and else what `fused_by_default` lets serve."""
    from savl.ops.switch import fused_by_default, use_fused_kernels

    return use_fused_kernels(False) if eager else fused_by_default()
