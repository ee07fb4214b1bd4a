"""The report: which backend serves each op on this machine, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from savl.build_info import BuildInfo, build_info
from savl.kernels.gpu import gpu_names
from savl.ops.library import EAGER, FUSED, INTERPRETED, TRITON
from savl.ops.op import OPS, why_unavailable
from savl.ops.scopes import current_settings, explicit_settings
from savl.ops.settings import Choice


@dataclass(frozen=True)
class BackendStatus:
    """One backend of one op."""

    op: str
    backend: str
    """``"eager"`` or the name of a fused backend."""
    device: str
    """Type of the devices whose tensors it takes: ``"cpu"``, ``"cuda"``, or ``"any"`` for eager."""
    serves: bool
    """Whether it serves calls with tensors of such a device and a dtype it takes; for eager, calls on the CPU."""
    reason: str
    """Why it serves, or why it does not."""


@dataclass(frozen=True)
class KernelReport:
    """The result of `kernel_report`. As text it is a table of every backend."""

    statuses: tuple[BackendStatus, ...]
    build: BuildInfo
    threads: int
    """Number of threads that torch's operations and savl's kernels use."""
    gpus: tuple[str, ...]
    """Names of the GPUs that torch finds."""

    @property
    def instruction_set(self) -> str | None:
        """Instruction set that the C++ kernels use; None without them."""
        return self.build["kernel_instruction_set"]

    def serving(self, op: str, device: str = "cpu") -> str:
        """Return the name of the backend that serves an op for tensors of a type of device."""
        found = (s.backend for s in self.statuses if s.op == op and s.serves and s.device == device)
        return next(found, EAGER)

    def __str__(self) -> str:
        rows = [("op", "backend", "tensors", "serves", "why")]
        rows += [(s.op, s.backend, s.device, "yes" if s.serves else "no", s.reason) for s in self.statuses]
        return "\n".join([*aligned(rows), "", self.describe_machine()])

    def describe_machine(self) -> str:
        """Return a line on torch, the extension and the processor, and one on GPUs and the CUDA library."""
        build = self.build
        extension, cuda = "no extension", "no CUDA library"
        if build["extension"]:
            extension = f"extension by {build['compiler']}, headers of torch {build['built_against_torch']}"
        if self.instruction_set:
            extension += f", {self.instruction_set} kernels"
        if build["cuda"]:
            cuda = f"CUDA library by {build['cuda_compiler']} for {', '.join(build['cuda_architectures'])}"
        return (
            f"savl {build['version']}, torch {build['torch']}, {self.threads} threads; {extension}\n"
            f"{', '.join(self.gpus) or 'no GPU'}; {cuda}"
        )


def kernel_report() -> KernelReport:
    """Return which backend serves each op of a network that this thread calls directly, and why others do not."""
    settings, statuses = current_settings(), []
    for name, op in OPS.items():
        found = [_status(name, backend, getattr(settings, name)) for backend in op.backends]
        on_cpu = any(status.serves and status.device == "cpu" for status in found)
        reason = "the reference; slower" if on_cpu else "the reference; serves what no fused kernel can"
        statuses += [*found, BackendStatus(name, EAGER, "any", not on_cpu, reason)]
    return KernelReport(tuple(statuses), build_info(), torch.get_num_threads(), gpu_names())


def _status(op: str, backend: str, choice: Choice) -> BackendStatus:
    """Return whether a fused backend serves an op, and why."""
    kernels, reason = FUSED[backend], why_unavailable(op, backend)
    serves = choice == backend or (choice is True and reason is None)
    if serves and choice is True and INTERPRETED and backend == TRITON:
        serves, reason = False, "Triton's interpreter is slow: it is used only when requested by name"
    elif serves and reason is not None:
        reason = f"requested by name, and raises KernelUnavailable: {reason}"
    elif serves:
        reason = f"{'the fastest here' if choice is True else 'requested by name'}; {', '.join(kernels.dtypes)}"
    elif reason is None and explicit_settings() is None:
        reason = (
            "serves savl.upscale and savl.Upscaler; savl.use_fused_kernels() switches it on for networks that are "
            "called directly"
        )
    elif reason is None:
        reason = "could serve, but is switched off: savl.use_fused_kernels() switches it on"
    return BackendStatus(op, backend, kernels.device, serves, reason)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows of a table with aligned columns; the last column keeps its width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
