"""What would serve each op on this machine, and why nothing else would."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

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
    """What `kernel_report` returns; as text, a table of every backend."""

    statuses: tuple[BackendStatus, ...]
    build: BuildInfo
    threads: int
    """Threads that torch shares among its operations and savl's kernels."""
    instruction_set: str | None
    """Instruction set the C++ kernels use; None without them."""
    gpus: tuple[str, ...]
    """Names of the GPUs that torch finds."""

    def serving(self, op: str, device: str = "cpu") -> str:
        """Return the name of the backend that serves an op for tensors of a type of device."""
        found = (s.backend for s in self.statuses if s.op == op and s.serves and s.device == device)
        return next(found, EAGER)

    def __str__(self) -> str:
        rows = [("op", "backend", "tensors", "serves", "why")]
        rows += [(s.op, s.backend, s.device, "yes" if s.serves else "no", s.reason) for s in self.statuses]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join((*map(str.ljust, row, widths), row[4])) for row in rows]
        return "\n".join([*lines, "", self.describe_machine()])

    def overview(self, width: int = 80) -> str:
        """Return a table of what serves each op by device, and below it each reason why a backend does not, once.

        Args:
            width: Columns to wrap the reasons at.
        """
        devices = [("cpu", "on the CPU")] + ([("cuda", "on a GPU")] if self.gpus else [])
        rows = [("op", *(title for _, title in devices))]
        rows += [(op, *(self.serving(op, device) for device, _ in devices)) for op in OPS]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        reasons: dict[tuple[str, str], list[str]] = {}
        for status in self.statuses:
            if status.backend != EAGER and not status.serves:
                reasons.setdefault((status.backend, status.reason), []).append(status.op)
        causes: dict[tuple[str, str], list[str]] = {}  # of a reason that several backends share, all of them
        for (backend, reason), ops in reasons.items():
            everywhere = sum(backend in backends for backends in BACKENDS.values()) == len(ops)
            causes.setdefault(("" if everywhere else ", ".join(ops), reason), []).append(backend)
        serving = {backend for row in rows[1:] for backend in row[1:]} - {EAGER}
        notes = [f"{backend} takes {', '.join(FUSED[backend].dtypes)}" for backend in FUSED if backend in serving]
        notes += [
            f"{' and '.join(backends)} {'do' if backends[1:] else 'does'} not serve{f' {ops}' if ops else ''}: {reason}"
            for (ops, reason), backends in causes.items()
        ]
        notes += [  # what raises is not served by another
            f"{status.backend} for {status.op}: {status.reason}"
            for status in self.statuses
            if status.serves and status.backend != EAGER and why_unavailable(status.op, status.backend) is not None
        ]
        notes.append("eager is the reference: it serves whatever no other backend takes")
        wrapped = [
            line
            for note in (*notes, *self.describe_machine().replace("; ", "\n").splitlines())
            for line in textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
        ]
        return "\n".join([*lines, "", *wrapped])

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON holds; `savl kernels info --help` explains the keys."""
        build = self.build
        by_op: dict[str, list[BackendStatus]] = {op: [] for op in OPS}
        for status in self.statuses:
            by_op[status.op].append(status)
        return {
            "savl": build["version"],
            "torch": build["torch"],
            "threads": self.threads,
            "instruction_set": self.instruction_set,
            "gpus": list(self.gpus),
            "extension": {"compiler": build["compiler"], "torch": build["built_against_torch"]}
            if build["extension"]
            else None,
            "cuda_library": {"compiler": build["cuda_compiler"], "architectures": list(build["cuda_architectures"])}
            if build["cuda"]
            else None,
            "ops": {
                op: {
                    "serves": {"cpu": self.serving(op), "cuda": self.serving(op, "cuda") if self.gpus else None},
                    "backends": {
                        status.backend: {
                            "device": status.device,
                            "dtypes": list(FUSED[status.backend].dtypes) if status.backend != EAGER else None,
                            "serves": status.serves,
                            "reason": status.reason,
                        }
                        for status in statuses
                    },
                }
                for op, statuses in by_op.items()
            },
        }

    def describe_machine(self) -> str:
        """Return a line on torch, the extension and the processor, and one on GPUs and the CUDA library."""
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
