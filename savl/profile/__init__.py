"""Profiling: named ranges for profilers, a profile of one step, and the roofline of the ops.

Your own programs need `annotate` only. ``savl profile`` does everything else; ``--guide`` explains it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savl.profile.ranges import annotate, named_range

__all__ = ["annotate", "named_range"]


# Resolved on first use: `savl --help` names the command of this package, and loads no torch.
def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("savl.profile.ranges"), name)
    raise AttributeError(f"module 'savl.profile' has no attribute {name!r}")
