"""Upscaling of images and image files with a network, in tiles and in bounded memory.

The exported names are imported on first use, so that importing this package loads neither torch nor libvips.
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
