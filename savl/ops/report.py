"""What would serve each op on this machine, and why nothing else would."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from savl.build_info import BuildInfo, build_info
from savl.ops.switch import BACKENDS, CPP_DTYPES, EAGER, OPS, Choice, current_settings, why_unavailable


@dataclass(frozen=True)
class BackendStatus:
    """One backend of one op."""

    op: str
    backend: str
    """``"eager"`` or the name of a fused backend."""
    serves: bool
    """Whether a call with float32 tensors on the CPU would go here."""
    reason: str
    """Why it serves, or why it does not."""


@dataclass(frozen=True)
class KernelReport:
    """What `kernel_report` returns; as text, a table."""

    statuses: tuple[BackendStatus, ...]
    build: BuildInfo
    threads: int
    """Threads that torch shares among its operations and savl's kernels."""
    instruction_set: str | None
    """Instruction set the C++ kernels use; None without them."""

    def serving(self, op: str) -> str:
        """Name of the backend that serves an op."""
        return next(status.backend for status in self.statuses if status.op == op and status.serves)

    def __str__(self) -> str:
        rows = [("op", "backend", "serves", "why")]
        rows += [(s.op, s.backend, "yes" if s.serves else "no", s.reason) for s in self.statuses]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join((*map(str.ljust, row, widths), row[3])) for row in rows]
        return "\n".join([*lines, "", self.describe_machine()])

    def describe_machine(self) -> str:
        """One line on torch, the extension and the processor."""
        build = self.build
        extension = (
            f"extension by {build['compiler']}, headers of torch {build['built_against_torch']}"
            if build["extension"]
            else "no extension"
        )
        kernels = f", {self.instruction_set} kernels" if self.instruction_set else ""
        return f"savl {build['version']}, torch {build['torch']}, {self.threads} threads; {extension}{kernels}"


def kernel_report() -> KernelReport:
    """Say, per op, which backend serves in this thread now, and why each other does not."""
    settings = current_settings()
    statuses = []
    for op in OPS:
        choice: Choice = getattr(settings, op)
        found = None  # the fused backend that serves
        for backend in BACKENDS[op]:
            reason = why_unavailable(op, backend)
            if reason is None and choice in (True, backend):
                found = backend
                how = "asked for by name" if choice == backend else "the fastest here"
                reason = f"{how}; CPU tensors of {', '.join(CPP_DTYPES)}"
            elif reason is None:
                reason = "could serve, but is switched off: savl.use_fused_kernels() switches it on"
            elif choice == backend:
                found = backend
                reason = f"asked for by name, and raises KernelUnavailable: {reason}"
            statuses.append(BackendStatus(op, backend, found == backend, reason))
        eager = "the reference; serves what no fused kernel can" if found is None else "the reference; slower"
        statuses.append(BackendStatus(op, EAGER, found is None, eager))
    build = build_info()
    return KernelReport(tuple(statuses), build, torch.get_num_threads(), build["kernel_instruction_set"])
