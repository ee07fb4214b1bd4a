"""Import of spandrel's architectures in tests. conftest.py lets spandrel import beside a CPU build of torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest


def spandrel() -> ModuleType:
    """Return spandrel; the test or module is skipped where it is not installed."""
    module: ModuleType = pytest.importorskip("spandrel", reason="spandrel is not installed", exc_type=ImportError)
    return module


def architecture(name: str, file: str) -> ModuleType:
    """Return the module of an architecture in spandrel, such as ``architecture("SwinIR", "SwinIR")``."""
    spandrel()
    return import_module(f"spandrel.architectures.{name}.__arch.{file}")
