"""savl: real-world image super-resolution guided by a per-pixel degradation field.

`load` and `build` return networks; `upscale` upscales an image and `upscale_file` an image file. Both use the fused
kernels where they are available. A network that is called directly uses them after `use_fused_kernels()`. `accelerate`
puts them under networks of other packages, and `export` writes networks for other runtimes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savl.accelerate import accelerate
    from savl.export import export
    from savl.inference import Upscaler, upscale
    from savl.inference.upscale_file import upscale_file
    from savl.network import CONFIGS, SAVL, DegradationField, SAVLConfig
    from savl.ops import KernelUnavailable, kernel_report, use_fused_kernels
    from savl.weights import build, load, save

    __version__: str

from savl.torch_import import register_ops_with_torch
from savl.version import version

__all__ = [
    "CONFIGS",
    "SAVL",
    "DegradationField",
    "KernelUnavailable",
    "SAVLConfig",
    "Upscaler",
    "accelerate",
    "build",
    "export",
    "kernel_report",
    "load",
    "save",
    "upscale",
    "upscale_file",
    "use_fused_kernels",
]

# Resolved on first use: `import savl` and `savl --help` load neither torch nor image libraries.
_HOMES = {
    "savl.inference": ("Upscaler", "upscale"),
    "savl.inference.upscale_file": ("upscale_file",),
    "savl.network": ("CONFIGS", "SAVL", "DegradationField", "SAVLConfig"),
    "savl.ops": ("KernelUnavailable", "kernel_report", "use_fused_kernels"),
    "savl.weights": ("build", "load", "save"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name in ("accelerate", "export"):
        return import_module(f"savl.{name}")  # a module that can be called as its function
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'savl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


register_ops_with_torch()
