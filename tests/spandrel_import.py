"""Import of spandrel beside a CPU build of torch. Tests of its networks begin with ``spandrel_import.architecture``.

torchvision, which spandrel imports, is published for CUDA builds. Beside a CPU build it imports nevertheless once two
schemas exist that its compiled library would define. The functions behind them are never called here.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch


def spandrel() -> ModuleType:
    """Return spandrel; the test or module is skipped where it is not installed."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module: ModuleType = pytest.importorskip("spandrel", reason="spandrel is not installed", exc_type=ImportError)
    return module


def architecture(name: str, file: str) -> ModuleType:
    """Return the module of an architecture in spandrel, such as ``architecture("SwinIR", "SwinIR")``."""
    spandrel()
    return import_module(f"spandrel.architectures.{name}.__arch.{file}")
