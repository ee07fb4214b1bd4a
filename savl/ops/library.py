"""The torch library ``savl``: where the ops are defined, and the C++ extension that brings their CPU kernels.

Each op's file defines its schema here and registers a fake kernel (shapes for `torch.compile` and `torch.export`) and
its autograd; the extension registers the CPU kernels as it is loaded. All of it works without the extension too, but
for calling the ops.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

import savl
from savl.settings import EnvironmentVariableError

INSTRUCTION_SET_VARIABLE = "SAVL_CPU_INSTRUCTION_SET"

LIBRARY = torch.library.Library("savl", "DEF")


def _load_extension() -> str | None:
    """Load ``savl._C``; returns why its kernels cannot be used, or None.

    Loading registers whatever kernels it has; `savl.ops` does not call them where this gives a reason.
    """
    try:
        extension = import_module("savl._C")
        facts = extension.build_facts()
    except ModuleNotFoundError:
        return "savl was installed without its C++ extension (`pip install -v` shows what the build said)"
    except Exception as error:  # whatever is wrong with the library, savl must import
        return f"the C++ extension does not load ({type(error).__name__}: {error}); install savl again"
    if facts["version"] != savl.__version__:
        return f"the C++ extension is of version {facts['version']}, savl of {savl.__version__}; install savl again"
    wanted, accepted = os.environ.get(INSTRUCTION_SET_VARIABLE), extension.kernel_instruction_sets()
    if wanted and wanted not in accepted:
        raise EnvironmentVariableError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of those this processor can run ({', '.join(accepted)}), "
            f"got {wanted!r}"
        )
    return None


EXTENSION_UNAVAILABLE = _load_extension()
"""Why the C++ kernels cannot be used, None where they can."""


def has_kernel(op: str, key: str) -> bool:
    """Whether kernels of ``savl::op`` and its backward are registered for a dispatch key such as ``"CPU"``."""
    try:
        names = (f"savl::{op}", f"savl::{op}_backward")
        return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names)
    except RuntimeError:  # neither defined yet nor registered by the extension
        return False


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define one op of the library.

    Args:
        schema: As `torch.library.Library.define` takes it, without the namespace.
        fake: Computes outputs without data, of the right shapes, dtypes and strides.
        backward: Gradient formula, as `torch.library.register_autograd` takes it; None for an op that is itself a
            backward pass: it says so when it is differentiated.
        setup_context: What the forward pass keeps for ``backward``.
    """
    name = f"savl::{schema.partition('(')[0]}"
    LIBRARY.define(schema)
    torch.library.register_fake(name, fake, lib=LIBRARY)

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{name} has no derivative: for second derivatives use savl.use_fused_kernels(False)")

    torch.library.register_autograd(name, backward or refuse, setup_context=setup_context, lib=LIBRARY)
