"""GPUs: the kinds that torch is built for, and what the kernels require of one.

Everything that differs between NVIDIA, AMD and other vendors in Python is in `KINDS`; what differs in the compiler is
in `savl.kernels.targets`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from savl.build_info import cuda_facts
from savl.kernels.targets import AMD, Architecture

OLDEST_CAPABILITY = (8, 0)
"""Oldest compute capability that the Triton kernels support."""


@dataclass(frozen=True)
class Kind:
    """GPUs of one vendor, as torch and Triton name them."""

    title: str
    """Name of the platform in messages."""
    device: str
    """Type of its devices in torch. In upper case it is the key under which the dispatcher keeps their kernels, and
    ``torch.<device>`` is their module."""
    compiler: str
    """Name of Triton's compiler."""
    built: Callable[[], bool]
    """Return whether torch is built for it."""
    architecture: Callable[[int], Architecture]
    """Return the architecture of a device."""
    why_unfit: Callable[[Architecture, str], str | None]
    """Given architecture and name of a device, return why the Triton kernels do not support it, or None."""


def _why_too_old(capability: Architecture, name: str) -> str | None:
    assert isinstance(capability, tuple)
    if capability >= OLDEST_CAPABILITY:
        return None
    oldest, (major, minor) = ".".join(map(str, OLDEST_CAPABILITY)), capability
    return f"the Triton kernels need compute capability {oldest}, {name} has {major}.{minor}"


def _why_unknown(architecture: Architecture, name: str) -> str | None:
    if architecture in AMD:
        return None
    return f"the Triton kernels support the architectures {', '.join(AMD)}, {name} has {architecture}"


KINDS = (
    Kind(
        title="CUDA",
        device="cuda",
        compiler="cuda",
        built=lambda: torch.version.cuda is not None,
        architecture=lambda index: torch.cuda.get_device_capability(index),
        why_unfit=_why_too_old,
    ),
    Kind(  # AMD's build of torch calls its devices and their module "cuda", too
        title="ROCm",
        device="cuda",
        compiler="hip",
        built=lambda: torch.version.hip is not None,
        architecture=lambda index: torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0],
        why_unfit=_why_unknown,
    ),
)
"""The kinds of GPUs. A build of torch is for one of them at most."""


def kind() -> Kind:
    """Return the kind of GPUs that torch is built for; without any, the first of `KINDS`."""
    return next((each for each in KINDS if each.built()), KINDS[0])


DEVICE = kind().device
"""Type of the devices that are GPUs, such as ``"cuda"``."""
COMPILER = kind().compiler
"""Triton's compiler for them, such as ``"hip"``."""


def why_no_gpu() -> str | None:
    """Return why torch has no GPU, or None. Does not start the driver, after which processes could not fork."""
    here = kind()
    if not here.built():
        return f"torch {torch.__version__} is built without {' or '.join(each.title for each in KINDS)}"
    count = torch.get_device_module(DEVICE).device_count()
    return None if count > 0 else f"torch finds no {here.title} GPU"


def gpu_names() -> tuple[str, ...]:
    """Return the names of the GPUs that torch finds."""
    devices = torch.get_device_module(DEVICE)
    return tuple(devices.get_device_name(index) for index in range(devices.device_count()))


def architecture_of(index: int) -> Architecture:
    """Return the architecture of a GPU, for `savl.kernels.configs`; starts the driver.

    Args:
        index: Index of the device.
    """
    return kind().architecture(index)


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
        return here.why_unfit(here.architecture(index), torch.get_device_module(DEVICE).get_device_name(index))
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
