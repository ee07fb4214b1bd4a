"""Registration of savl's ops with torch as soon as both are imported, in either order.

A file that holds fused ops (`torch.export`, `torch.jit`, AOTInductor) can be loaded only where torch knows them, and
whoever loads it has no reason to import `savl.ops` by name: `import savl` is enough. It does not import torch for that,
which takes seconds that `savl --help` does not have. Where torch is not there yet, a finder waits for its import.
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
    MetaPathFinder = object  # its import takes longer than all that is done here


def register_ops_with_torch() -> None:
    """Register the ops now if torch is imported, else right after it will have been."""
    if sys.modules.get("torch") is not None:
        _register()
    elif not any(isinstance(finder, _AfterTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTorch())


def _register() -> None:
    # An error here is that of `savl.ops`, such as a malformed SAVL_KERNELS. It must not end the import of torch, which
    # cannot be repeated in a process; whatever uses savl's ops meets it again.
    with contextlib.suppress(Exception):
        import_module("savl.ops")


class _AfterTorch(MetaPathFinder):
    """Let the other finders find torch, and register the ops when its loader has executed it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that another finder has for torch; None for every other module."""
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
        """Have the loader of torch register the ops after the execution of the module; it stays torch's loader."""
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

        with contextlib.suppress(AttributeError, TypeError):  # of a loader that takes no attributes
            loader.exec_module = execute_and_register  # type: ignore[method-assign]
