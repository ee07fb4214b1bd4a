"""savl: real-world image super-resolution guided by a per-pixel degradation field.

`build` and `load` give networks, `upscale` takes a picture; see README.md.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from savl.network import CONFIGS, SAVL, DegradationField, SAVLConfig

if TYPE_CHECKING:
    from savl.inference import Upscaler, upscale
    from savl.weights import build, load

try:
    __version__ = version("savl")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["CONFIGS", "SAVL", "DegradationField", "SAVLConfig", "Upscaler", "build", "load", "upscale"]

# Resolved on first use, so that `import savl` does not load image libraries.
_LAZY = {"Upscaler": "savl.inference", "upscale": "savl.inference", "build": "savl.weights", "load": "savl.weights"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'savl' has no attribute {name!r}")
