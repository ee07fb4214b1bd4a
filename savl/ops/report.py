"""What would serve each op on this machine, and why nothing else would."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from savl.build_info import BuildInfo, build_info
from savl.ops.switch import BACKENDS, EAGER, FUSED, OPS, Choice, current_settings, is_set, why_unavailable
from savl.ops.triton_kernels import INTERPRETED


@dataclass(frozen=True)
class BackendStatus:
    """One backend of one op."""

    op: str
    backend: str
    """``"eager"`` or the name of a fused backend."""
    device: str
    """Type of the devices whose tensors it takes: ``"cpu"``, ``"cuda"``, or ``"any"`` for eager."""
    serves: bool
    """Whether a call with tensors of such a device and a dtype it takes goes here; of eager, whether one on the CPU
    does."""
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
    gpus: tuple[str, ...]
    """Names of the GPUs that torch finds."""

    def serving(self, op: str, device: str = "cpu") -> str:
        """Name of the backend that serves an op for tensors of a type of device."""
        found = (s.backend for s in self.statuses if s.op == op and s.serves and s.device == device)
        return next(found, EAGER)

    def __str__(self) -> str:
        rows = [("op", "backend", "tensors", "serves", "why")]
        rows += [(s.op, s.backend, s.device, "yes" if s.serves else "no", s.reason) for s in self.statuses]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join((*map(str.ljust, row, widths), row[4])) for row in rows]
        return "\n".join([*lines, "", self.describe_machine()])

    def describe_machine(self) -> str:
        """A line on torch, the extension and the processor, and one on GPUs and the CUDA library."""
        build = self.build
        extension = (
            f"extension by {build['compiler']}, headers of torch {build['built_against_torch']}"
            if build["extension"]
            else "no extension"
        )
        kernels = f", {self.instruction_set} kernels" if self.instruction_set else ""
        gpus = ", ".join(self.gpus) or "no GPU"
        architectures = ", ".join(build["cuda_architectures"])
        cuda = f"CUDA library by {build['cuda_compiler']} for {architectures}" if build["cuda"] else "no CUDA library"
        return (
            f"savl {build['version']}, torch {build['torch']}, {self.threads} threads; {extension}{kernels}\n"
            f"{gpus}; {cuda}"
        )


def kernel_report() -> KernelReport:
    """Say, per op, which backend serves a network that is called directly in this thread now, and why others do not."""
    settings = current_settings()
    statuses = []
    for op in OPS:
        choice: Choice = getattr(settings, op)
        on_cpu = False  # whether a fused backend serves tensors of the CPU
        for backend in BACKENDS[op]:
            kernels = FUSED[backend]
            reason = why_unavailable(op, backend)
            serves = choice == backend or (choice is True and reason is None)
            if serves and choice == backend and reason is not None:
                reason = f"asked for by name, and raises KernelUnavailable: {reason}"
            elif serves and INTERPRETED and backend == "triton" and choice is True:
                serves, reason = False, "Triton's interpreter is slow: it serves only when asked for by name"
            elif serves:
                how = "asked for by name" if choice == backend else "the fastest here"
                reason = f"{how}; {', '.join(kernels.dtypes)}"
            elif reason is None:
                reason = "could serve, but is switched off: savl.use_fused_kernels() switches it on"
                if not is_set():
                    reason = (
                        "serves savl.upscale and savl.Upscaler; savl.use_fused_kernels() switches it on for networks "
                        "that are called directly"
                    )
            statuses.append(BackendStatus(op, backend, kernels.device, serves, reason))
            on_cpu = on_cpu or (serves and kernels.device == "cpu")
        eager = "the reference; serves what no fused kernel can" if not on_cpu else "the reference; slower"
        statuses.append(BackendStatus(op, EAGER, "any", not on_cpu, eager))
    build = build_info()
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return KernelReport(tuple(statuses), build, torch.get_num_threads(), build["kernel_instruction_set"], gpus)
