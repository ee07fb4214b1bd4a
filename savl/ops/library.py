"""Load the libraries that contain fused kernels, and describe the backends: their devices, dtypes and availability.

The C++ extension and the CUDA library register their kernels with PyTorch when they are loaded, which happens when this
module is imported. Triton is imported later, when one of its kernels is launched for the first time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec

import torch

from savl.build_info import CUDA_LIBRARY, cuda_facts, extension_facts
from savl.kernels.gpu import DEVICE, kind
from savl.ops.gpu import driver_version, why_no_gpu
from savl.settings import EnvironmentVariableError
from savl.version import version

INSTRUCTION_SET_VARIABLE = "SAVL_CPU_INSTRUCTION_SET"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"
OLDEST_TRITON = (3, 4)


def load_extension() -> str | None:
    """Load the C++ extension. Return the reason why its kernels cannot be used, or None if they can.

    Raises:
        EnvironmentVariableError: ``SAVL_CPU_INSTRUCTION_SET`` names an instruction set that this processor does not
            support.
    """
    _, reason = extension_facts()
    if reason is None and (wanted := os.environ.get(INSTRUCTION_SET_VARIABLE)):
        accepted = import_module("savl._C").kernel_instruction_sets()
        if wanted not in accepted:
            raise EnvironmentVariableError(
                f"{INSTRUCTION_SET_VARIABLE} must be an instruction set that this processor supports "
                f"({', '.join(accepted)}), got {wanted!r}"
            )
    return reason


def load_cuda_library() -> str | None:
    """Load the CUDA library if there is a GPU. Return the reason why its kernels cannot be used, or None if they can.

    This does not initialize the CUDA driver.
    """
    try:
        if (reason := why_no_gpu()) is not None:
            return reason
        if torch.version.cuda is None:
            return f"the CUDA library is for NVIDIA GPUs, torch {torch.__version__} is built for {kind().title}"
        if not CUDA_LIBRARY.exists():
            return "savl was installed without its CUDA library (`pip install -v` shows the output of the build)"
        facts = cuda_facts()
        if facts.get("version") != version():
            found = f"has version {facts['version']}" if facts else "has an unknown version"
            return f"the CUDA library {found}, but savl has version {version()}; install savl again"
        driver, runtime = driver_version(), facts["runtime"]
        if driver // 1000 < runtime // 1000:  # A driver supports all minor versions of its major version.
            supported, needed = (f"{packed // 1000}.{packed % 1000 // 10}" for packed in (driver, runtime))
            return (
                f"the driver supports CUDA {supported}, but the CUDA library was built with CUDA {needed}; install a "
                f"newer driver, or install savl again with a CUDA {driver // 1000} toolkit"
            )
        torch.ops.load_library(str(CUDA_LIBRARY))
    except Exception as error:  # Importing savl must not fail because of a broken library.
        return f"the CUDA library could not be loaded ({type(error).__name__}: {error}); install savl again"
    return None


def why_triton_missing() -> str | None:
    """Return the reason why Triton cannot be used on any device, or None if it can.

    Triton is missing if it is not installed, or if the installed version is older than `OLDEST_TRITON`.
    """
    if find_spec("triton") is None:
        return "Triton is not installed; on Linux, `pip install 'savl[triton]'` installs it"
    try:
        found = version_of("triton")
    except PackageNotFoundError:  # Triton was built from source.
        return None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is installed, but savl requires {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return None


EXTENSION_UNAVAILABLE = load_extension()
"""The reason why the C++ kernels cannot be used, or None if they can."""
CUDA_UNAVAILABLE = load_cuda_library()
"""The reason why the CUDA kernels cannot be used on any GPU, or None. `why_unfit` checks the individual GPU."""
TRITON_MISSING = why_triton_missing()
"""The reason why Triton cannot be used on any device, or None if it can."""
INTERPRETED = TRITON_MISSING is None and os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes")
"""Whether Triton's interpreter runs the Triton kernels, on CPU tensors. It is slow and meant for debugging, so the
Triton backend is then used only if it is requested by name."""
TRITON_UNAVAILABLE = TRITON_MISSING if INTERPRETED else TRITON_MISSING or why_no_gpu()
"""The reason why the Triton kernels cannot be used on any device, or None. `why_unfit` checks the individual GPU."""

EAGER, CPP, TRITON, CUDA = "eager", "cpp", "triton", "cuda"


@dataclass(frozen=True)
class Backend:
    """A library or language in which the fused kernels are implemented."""

    title: str
    """Name for messages and tables, such as "C++"."""
    device: str
    """Device type of the tensors that the kernels accept, such as "cuda"."""
    dtypes: tuple[str, ...]
    """Names of the dtypes that the kernels accept, such as "float32"."""
    unavailable: str | None
    """The reason why the kernels cannot be used on this machine, or None if they can."""

    torch_dtypes: frozenset[torch.dtype] = field(init=False)
    """The dtypes themselves."""

    def __post_init__(self) -> None:
        # Here, because torch.compile cannot trace the lock of a cached property.
        object.__setattr__(self, "torch_dtypes", frozenset(getattr(torch, name) for name in self.dtypes))


_GPU_DTYPES = ("float32", "bfloat16", "float16")
FUSED = {
    CPP: Backend("C++", "cpu", ("float32", "float64", "bfloat16"), EXTENSION_UNAVAILABLE),
    TRITON: Backend("Triton", "cpu" if INTERPRETED else DEVICE, _GPU_DTYPES, TRITON_UNAVAILABLE),
    CUDA: Backend("CUDA", "cuda", _GPU_DTYPES, CUDA_UNAVAILABLE),
}
"""The backends by name, without the eager one."""
