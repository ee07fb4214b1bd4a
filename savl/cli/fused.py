"""Fused kernels on the command line: on, unless the user or the environment says otherwise."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

HELP = "Compute with PyTorch's own operations instead of the fused kernels: slower, the same picture."


def fused_unless(eager: bool) -> AbstractContextManager[Any]:
    """A block in which the fused kernels serve: not with ``--eager``, and as ``SAVL_KERNELS`` says where it is set."""
    from savl.ops.switch import VARIABLE, use_fused_kernels

    if not eager and os.environ.get(VARIABLE):
        return nullcontext()
    return use_fused_kernels(not eager)
