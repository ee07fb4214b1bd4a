"""Image files, tiling, and the upscaler that ties them to a network.

What is exported here is imported on first use: reading an image file should not load torch, and a network
should not load libvips.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savl.inference.upscale_image import upscale
    from savl.inference.upscaler import Upscaler

__all__ = ["Upscaler", "upscale"]

_HOMES = {"Upscaler": "savl.inference.upscaler", "upscale": "savl.inference.upscale_image"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'savl.inference' has no attribute {name!r}")
