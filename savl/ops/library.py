"""The kernels that savl can call: which libraries they come from, what they take, and why they cannot be used here.

The C++ extension registers its kernels with torch as it is loaded, the CUDA library likewise. Triton is imported when
one of its kernels is launched for the first time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec

import torch

from savl.build_info import CUDA_LIBRARY, cuda_facts, extension_facts
from savl.ops.gpu import driver_version, why_no_gpu
from savl.settings import EnvironmentVariableError
from savl.version import version

INSTRUCTION_SET_VARIABLE = "SAVL_CPU_INSTRUCTION_SET"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"
OLDEST_TRITON = (3, 4)


def load_extension() -> str | None:
    """Load the C++ extension. Return why its kernels cannot be used, or None.

    Raises:
        EnvironmentVariableError: ``SAVL_CPU_INSTRUCTION_SET`` names an instruction set that this processor lacks.
    """
    _, reason = extension_facts()
    if reason is None and (wanted := os.environ.get(INSTRUCTION_SET_VARIABLE)):
        accepted = import_module("savl._C").kernel_instruction_sets()
        if wanted not in accepted:
            raise EnvironmentVariableError(
                f"{INSTRUCTION_SET_VARIABLE} must be one of those this processor can run ({', '.join(accepted)}), "
                f"got {wanted!r}"
            )
    return reason


def load_cuda_library() -> str | None:
    """Load the CUDA library if there is a GPU. Return why its kernels cannot be used, or None. Starts no driver."""
    try:
        if (reason := why_no_gpu()) is not None:
            return reason
        if not CUDA_LIBRARY.exists():
            return "savl was installed without its CUDA library (`pip install -v` shows what the build said)"
        facts = cuda_facts()
        if facts.get("version") != version():
            found = f"version {facts['version']}" if facts else "no known version"
            return f"the CUDA library is of {found}, savl of {version()}; install savl again"
        driver, runtime = driver_version(), facts["runtime"]
        if driver // 1000 < runtime // 1000:  # a driver serves every minor version of its own major version
            supported, needed = (f"{packed // 1000}.{packed % 1000 // 10}" for packed in (driver, runtime))
            return (
                f"the driver supports CUDA {supported}, the CUDA library was built with {needed}: install a newer "
                f"driver, or savl again with a CUDA {driver // 1000} toolkit"
            )
        torch.ops.load_library(str(CUDA_LIBRARY))
    except Exception as error:  # savl must import whatever is wrong with the library
        return f"the CUDA library does not load ({type(error).__name__}: {error}); install savl again"
    return None


def why_triton_missing() -> str | None:
    """Return why Triton cannot be used on any device, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'savl[triton]', on Linux)"
    try:
        found = version_of("triton")
    except PackageNotFoundError:  # built from source
        return None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is installed, {'.'.join(map(str, OLDEST_TRITON))} or newer is needed"
    return None


EXTENSION_UNAVAILABLE = load_extension()
"""Why the C++ kernels cannot be used, None if they can."""
CUDA_UNAVAILABLE = load_cuda_library()
"""Why the CUDA C++ kernels cannot be used, None if they can on GPUs for which `why_unfit` gives no reason."""
TRITON_MISSING = why_triton_missing()
"""Why Triton cannot be used on any device, None if it can."""
INTERPRETED = TRITON_MISSING is None and os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes")
"""Whether Triton's interpreter runs the Triton kernels, on tensors of the CPU. It is slow and meant for finding errors,
so it serves only if it is requested by name."""
TRITON_UNAVAILABLE = TRITON_MISSING if INTERPRETED else TRITON_MISSING or why_no_gpu()
"""Why the Triton kernels cannot be used, None if they can on GPUs for which `why_unfit` gives no reason."""

EAGER, CPP, TRITON, CUDA = "eager", "cpp", "triton", "cuda"


@dataclass(frozen=True)
class Backend:
    """A kind of fused kernels."""

    title: str
    """Name in a sentence: "the … kernels"."""
    device: str
    """Type of the devices whose tensors the kernels take."""
    dtypes: tuple[str, ...]
    """Names of the dtypes that the kernels take."""
    unavailable: str | None
    """Why the kernels cannot be used on this machine, None if they can."""


_GPU_DTYPES = ("float32", "bfloat16", "float16")
FUSED = {
    CPP: Backend("C++", "cpu", ("float32", "float64", "bfloat16"), EXTENSION_UNAVAILABLE),
    TRITON: Backend("Triton", "cpu" if INTERPRETED else "cuda", _GPU_DTYPES, TRITON_UNAVAILABLE),
    CUDA: Backend("CUDA", "cuda", _GPU_DTYPES, CUDA_UNAVAILABLE),
}
"""The fused backends by name."""
