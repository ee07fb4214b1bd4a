"""Export of networks to other runtimes: ONNX files, and packages of AOTInductor.

``savl.export(model, "out.onnx")`` calls the function of this package. The file takes images of any number and size. It
is compared with the network in PyTorch before it is written.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from savl.export.errors import ExportError, ExportUnavailable
from savl.export.write import ExportReport, export

__all__ = ["ExportError", "ExportReport", "ExportUnavailable", "export"]


class _CallableModule(ModuleType):
    """The type of this module: Python makes ``savl.export`` the module, and users call it as the function."""

    __call__ = staticmethod(export)


_module: Any = sys.modules[__name__]
_module.__class__ = _CallableModule
