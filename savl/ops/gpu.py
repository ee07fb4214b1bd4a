"""Requirements of the kernels for GPUs: a GPU that torch finds, its driver, and code for its architecture."""

from __future__ import annotations

import ctypes

import torch

from savl.build_info import cuda_facts
from savl.kernels.gpu import DEVICE, KINDS, kind


def why_no_gpu() -> str | None:
    """Return why torch has no GPU, or None. Does not start the driver, after which processes could not fork."""
    here = kind()
    if not here.built():
        return f"torch {torch.__version__} is built without {' or '.join(each.title for each in KINDS)}"
    count = torch.get_device_module(DEVICE).device_count()
    return None if count > 0 else f"torch finds no {here.title} GPU"


def driver_version() -> int:
    """Return the newest CUDA that the driver supports (13000 is 13.0), without starting the driver."""
    packed = ctypes.c_int()
    if error := ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(packed)):
        raise RuntimeError(f"cuDriverGetVersion gives error {error}")
    return packed.value


def why_unfit(backend: str, index: int) -> str | None:
    """Return why a backend for GPUs has no kernels for one of them, or None.

    Starts the driver: call it only when a tensor is on the GPU already.

    Args:
        backend: ``"triton"`` or ``"cuda"``.
        index: Index of the device.
    """
    here = kind()
    if backend == "triton":
        name = torch.get_device_module(DEVICE).get_device_name(index)
        reason: str | None = here.why_unfit(here.architecture(index), name)
        return reason
    if index not in _fitting:
        capability = torch.cuda.get_device_capability(index)
        _fitting[index] = why_no_code(capability, cuda_facts().get("architectures", []))
    return _fitting[index]


_fitting: dict[int, str | None] = {}

# The mark that torch.compiler.assume_constant_result leaves, so that torch.compile asks once and does not trace into
# the driver. The function itself would import torch._dynamo, 1.2 s that every `savl upscale` would pay.
why_unfit._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_no_code(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Return why the CUDA library cannot run on a GPU of a compute capability, or None."""
    if any(runs_on(architecture, capability) for architecture in architectures):
        return None
    major, minor = capability
    remedy = f"install savl again with SAVL_CUDA_ARCHS={major}{minor}" if major >= 8 else "they need 8.0"
    return (
        f"the CUDA kernels have no code for compute capability {major}.{minor} (but for {', '.join(architectures)}); "
        f"{remedy}"
    )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs the code that the CUDA library has for an architecture.

    Machine code runs on GPUs of its own major version from its minor version on, PTX on everything newer too.

    Args:
        architecture: An element of ``cuda_architectures`` of `savl.build_info.BuildInfo`.
        capability: Compute capability of the GPU, such as (9, 0).
    """
    number, _, ptx = architecture.partition("+")
    major, minor = divmod(int(number), 10)
    return (major == capability[0] and minor <= capability[1]) or (bool(ptx) and (major, minor) <= capability)
