"""GPUs: the kinds that torch is built for, their names and architectures.

Everything that differs between NVIDIA, AMD and other vendors in Python is in `KINDS`; what differs in the compiler is
in `savl.kernels.targets`. This module does not need Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

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
