"""Register savl's ops with torch as soon as both are imported, in either order.

A file that contains fused ops (`torch.export`, `torch.jit`, AOTInductor) can only be loaded if torch knows these ops.
`import savl` is enough for that. It does not import torch, which takes seconds and would slow down `savl --help`: if
torch has not been imported yet, an import hook registers the ops after torch's import.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import MetaPathFinder
else:
    MetaPathFinder = object  # Its import takes longer than everything that this module does.


def register_ops_with_torch() -> None:
    """Register the ops now if torch is imported, otherwise right after its import."""
    if sys.modules.get("torch") is not None:
        _register()
    elif not any(isinstance(finder, _AfterTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTorch())


def _register() -> None:
    # An error here comes from `savl.ops`, such as a malformed SAVL_KERNELS. It must not end the import of torch, which
    # cannot be repeated in a process. The first use of savl's ops raises it again.
    with contextlib.suppress(Exception):
        import_module("savl.ops")


class _AfterTorch(MetaPathFinder):
    """Import hook: lets the other finders find torch, and registers the ops after its loader has executed it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return another finder's spec for torch; None for every other module."""
        if fullname != "torch":
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._follow(spec)
                return spec
        return None

    def _follow(self, spec: ModuleSpec) -> None:
        """Let the loader of torch register the ops after it has executed the module; it stays torch's loader."""
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)
        if loader is None or execute is None:
            return

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        with contextlib.suppress(AttributeError, TypeError):  # a loader without settable attributes
            loader.exec_module = execute_and_register  # type: ignore[method-assign]
