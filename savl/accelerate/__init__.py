"""Acceleration of other networks: their attention blocks are computed with savl's ops, in place.

`accelerate` finds the blocks of a network that savl's fused kernels can compute, verifies on random inputs that they
compute the same, and replaces their ``forward``. The adapters, one file for each family of networks, recognise blocks
by their structure. ``savl.accelerate(model)`` calls the function of this package.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from savl.accelerate.apply import accelerate
from savl.accelerate.report import AccelerationReport, BlockReport

__all__ = ["AccelerationReport", "BlockReport", "accelerate"]


class _CallableModule(ModuleType):
    """The type of this module: Python makes ``savl.accelerate`` the module, and users call it as the function."""

    __call__ = staticmethod(accelerate)


_module: Any = sys.modules[__name__]
_module.__class__ = _CallableModule
