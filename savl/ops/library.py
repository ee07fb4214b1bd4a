"""The torch library ``savl``: where the ops are defined, and the two libraries that bring their kernels.

Each op's file defines its schema here and registers a fake kernel (shapes for `torch.compile` and `torch.export`) and
its autograd; the C++ extension registers the CPU kernels as it is loaded, the CUDA library those of the GPU. All of it
works without them too, but for calling the ops.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

import savl
from savl.cuda_facts import LIBRARY as CUDA_LIBRARY
from savl.cuda_facts import CudaFacts, cuda_facts
from savl.settings import EnvironmentVariableError

INSTRUCTION_SET_VARIABLE = "SAVL_CPU_INSTRUCTION_SET"


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


def _gpu_found() -> bool:
    """Whether torch finds a CUDA GPU, asked in the way that does not start the driver: processes fork after that."""
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        return torch.cuda.is_available()
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _driver_version() -> int:
    """The newest CUDA that the driver supports, as CUDA packs it: 13000 is 13.0. Does not start the driver."""
    version = ctypes.c_int()
    if error := ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
        raise RuntimeError(f"cuDriverGetVersion gives error {error}")
    return version.value


def _driver_too_old(facts: CudaFacts) -> str | None:
    driver = _driver_version()
    if driver // 1000 >= facts["runtime"] // 1000:  # a driver serves all of its major version
        return None
    supported, needed = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, facts["runtime"]))
    return (
        f"the driver supports CUDA {supported}, the CUDA library was built with {needed}: install a newer driver, or "
        f"savl again with a CUDA {driver // 1000} toolkit"
    )


def _load_cuda() -> str | None:
    """Load the CUDA library where torch has CUDA; returns why it cannot be used, or None.

    Nothing runs on the GPU, and no context is made.
    """
    try:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not _gpu_found():
            return "torch finds no CUDA GPU"
        if not CUDA_LIBRARY.exists():
            return "savl was installed without its CUDA library (`pip install -v` shows what the build said)"
        facts = cuda_facts()
        if facts is None or facts["version"] != savl.__version__:
            found = "of no known version" if facts is None else f"of version {facts['version']}"
            return f"the CUDA library is {found}, savl of {savl.__version__}; install savl again"
        if (reason := _driver_too_old(facts)) is not None:
            return reason
        torch.ops.load_library(str(CUDA_LIBRARY))
    except Exception as error:  # whatever is wrong with the library, savl must import
        return f"the CUDA library does not load ({type(error).__name__}: {error}); install savl again"
    return None


CUDA_UNAVAILABLE = _load_cuda()
"""Why the CUDA C++ kernels cannot be used; None where they can, but for what `cuda_architecture_unavailable` says of a
GPU."""

# After what may raise: a namespace is defined once in a process, and an import that failed may be tried again.
LIBRARY = torch.library.Library("savl", "DEF")

_architectures: dict[int, str | None] = {}


def cuda_architecture_unavailable(index: int) -> str | None:
    """Why the CUDA library has no code for a GPU; None where it has.

    Not asked before a tensor is there: the answer starts the driver.

    Args:
        index: Of the CUDA device.
    """
    if index not in _architectures:
        major, minor = torch.cuda.get_device_capability(index)
        _architectures[index] = _code_missing(major, minor, (cuda_facts() or {"architectures": []})["architectures"])
    return _architectures[index]


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what the CUDA library has for an architecture.

    Machine code runs on its own major version from its minor version on, PTX on everything newer too.

    Args:
        architecture: One of `savl.cuda_facts.CudaFacts`'s, such as ``"90"`` or ``"80+PTX"``.
        capability: Compute capability of the GPU, such as (9, 0).
    """
    number, _, ptx = architecture.partition("+")
    major, minor = divmod(int(number), 10)
    return (major == capability[0] and minor <= capability[1]) or (bool(ptx) and (major, minor) <= capability)


def _code_missing(major: int, minor: int, architectures: list[str]) -> str | None:
    if any(runs_on(architecture, (major, minor)) for architecture in architectures):
        return None
    cure = f"install savl again with SAVL_CUDA_ARCHS={major}{minor}" if major >= 8 else "they need 8.0"
    return (
        f"the CUDA kernels have no code for compute capability {major}.{minor} (but for {', '.join(architectures)}); "
        f"{cure}"
    )


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
    reference: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define one op of the library.

    Args:
        schema: As `torch.library.Library.define` takes it, without the namespace.
        fake: Computes outputs without data, of the right shapes, dtypes and strides.
        reference: Computes outputs by torch's own operations, for the transforms of `torch.func`, which then are under
            the call of an exported program: the public functions do not get here. None for a backward pass.
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

    if reference is not None:  # the key under which torch.func interprets a call, whatever the transform
        LIBRARY.impl(name.removeprefix("savl::"), reference, "FuncTorchDynamicLayerFrontMode")

    def unavailable(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        reason = EXTENSION_UNAVAILABLE if device.type == "cpu" else CUDA_UNAVAILABLE
        raise NotImplementedError(
            f"{name} has no kernel for tensors on {device} ({reason or 'savl has kernels for CPUs and CUDA GPUs'}). A "
            f"program exported with fused kernels needs them: install savl with its kernels, or export the program "
            f"with savl.use_fused_kernels(False)"
        )

    LIBRARY.impl(name.removeprefix("savl::"), unavailable, "CompositeExplicitAutograd")  # wherever no kernel is
