"""GPUs that kernels are compiled for: what Triton calls them, and what programs share there.

A new kind of GPU needs an entry here, a rule for block sizes in `savl.kernels.configs`, and an entry in
`savl.kernels.gpu.KINDS`. This module needs neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

Architecture = tuple[int, int] | str
"""Compute capability of an NVIDIA GPU, such as (9, 0), or AMD's name of an architecture, such as ``"gfx942"``."""


@dataclass(frozen=True)
class Multiprocessor:
    """Resources of a multiprocessor, which the programs that it runs at the same time share.

    On AMD GPUs this is a compute unit, from RDNA on a work-group processor of two compute units. Each has four
    schedulers (SIMDs), which share the warps.
    """

    shared: int
    """Shared memory in bytes."""
    shared_of_program: int
    """Largest shared memory of one program in bytes."""
    warps: int
    programs: int
    tensor_memory: int = 0
    """Columns of tensor memory."""
    registers: int = 512
    """Registers of each thread that a scheduler could give to a single warp."""
    register_unit: int = 8
    """A warp gets a multiple of this many registers."""
    shared_unit: int = 128
    """A program gets a multiple of this many bytes of shared memory."""
    shared_reserved: int = 1024
    """Bytes of shared memory of each program that the driver uses."""


_KIB = 1024
_NVIDIA = {
    (7, 5): Multiprocessor(64 * _KIB, 64 * _KIB, 32, 16),
    (8, 0): Multiprocessor(164 * _KIB, 163 * _KIB, 64, 32),
    (8, 6): Multiprocessor(100 * _KIB, 99 * _KIB, 48, 16),
    (8, 7): Multiprocessor(164 * _KIB, 163 * _KIB, 48, 16),
    (8, 9): Multiprocessor(100 * _KIB, 99 * _KIB, 48, 24),
    (9, 0): Multiprocessor(228 * _KIB, 227 * _KIB, 64, 32),
    (10, 0): Multiprocessor(228 * _KIB, 227 * _KIB, 64, 32, tensor_memory=512),
    (10, 3): Multiprocessor(228 * _KIB, 227 * _KIB, 64, 32, tensor_memory=512),
    (12, 0): Multiprocessor(100 * _KIB, 99 * _KIB, 48, 24),
    (12, 1): Multiprocessor(100 * _KIB, 99 * _KIB, 48, 24),
}
"""Resources by compute capability, from the tables of the CUDA C++ programming guide."""


@dataclass(frozen=True)
class Target:
    """A GPU as Triton's compilers name it."""

    name: str
    """Name in tables, such as ``"sm_90"`` or ``"gfx942"``."""
    backend: str
    """Triton's compiler: ``"cuda"`` for NVIDIA, ``"hip"`` for AMD."""
    architecture: int | str
    """Argument of this compiler."""
    warp: int
    """Threads of a warp."""
    multiprocessor: Multiprocessor


# Local data share and vector registers from https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html: 512 KiB of
# registers per compute unit of MI300, 768 KiB of Radeon RX 7900. Warps and programs, and the units of allocation, as in
# LLVM's AMDGPUBaseInfo.cpp (getMaxWavesPerEU, getMaxWorkGroupsPerCU, getVGPRAllocGranule). Triton compiles RDNA kernels
# for work-group processors ("WGP mode"), with twice the memory and registers of a compute unit.
AMD = {
    "gfx942": Target(
        "gfx942", "hip", "gfx942", 64,
        Multiprocessor(64 * _KIB, 64 * _KIB, 32, 16, shared_unit=512, shared_reserved=0),
    ),
    "gfx1100": Target(
        "gfx1100", "hip", "gfx1100", 32,
        Multiprocessor(
            128 * _KIB, 64 * _KIB, 64, 32, registers=1536, register_unit=24, shared_unit=1024, shared_reserved=0
        ),
    ),
}  # fmt: skip
"""The architectures of AMD that the kernels are compiled for: CDNA 3 (MI300) and RDNA 3 (Radeon RX 7900)."""


def target_of(architecture: Architecture) -> Target:
    """Return the target of an architecture.

    Of an unknown NVIDIA GPU, the multiprocessor is the least of its major version, or of all.

    Args:
        architecture: As for `Architecture`.

    Raises:
        ValueError: There is no such architecture of AMD.
    """
    if isinstance(architecture, str):
        if architecture not in AMD:
            raise ValueError(f"architecture must be one of {', '.join(AMD)}, got {architecture!r}")
        return AMD[architecture]
    number = 10 * architecture[0] + architecture[1]
    multiprocessor = _NVIDIA.get(architecture)
    if multiprocessor is None:
        relatives = [one for known, one in _NVIDIA.items() if known[0] == architecture[0]]
        multiprocessor = min(relatives or _NVIDIA.values(), key=lambda one: (one.shared_of_program, one.warps))
    return Target(f"sm_{number}", "cuda", number, 32, multiprocessor)


def named_target(name: str) -> Target:
    """Return the target with the name `Target.name`."""
    return target_of(name if name in AMD else divmod(int(name.removeprefix("sm_")), 10))
