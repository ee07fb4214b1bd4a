"""The record of an op: everything that makes it an op, in one place.

A file ``savl/ops/<op>.py`` builds one `Op` and registers it. The switch, `savl.kernel_report`, ``savl kernels info |
verify | tune``, the profiler, the equivalence tests and the benchmarks iterate over `OPS`; none of them names an op.
docs/adding-an-op.md walks through a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from savl.kernels.gpu import DEVICE
from savl.ops.library import CPP, CUDA_UNAVAILABLE, EAGER, EXTENSION_UNAVAILABLE, FUSED, INTERPRETED, TRITON

if TYPE_CHECKING:
    from savl.ops.case import BenchmarkProblem, Case

Limit = Callable[..., str | None]
"""Given the positional arguments of a call, return why the backend cannot serve it, or None."""
Settings = Mapping[str, Any]
"""Keyword arguments for `Op.case`."""


@dataclass(frozen=True, eq=False)
class Op:
    """Record of an op: its functions, its backends, and its cases for tests and benchmarks."""

    name: str
    """Name in ``torch.ops.savl``, of the modules that hold its kernels, and of its setting."""
    function: Callable[..., Any]
    """The public function. Its positional parameters are its tensors, its keyword-only parameters everything else; one
    of these, ``kernels``, takes a `savl.ops.KernelSettings`."""
    reference: Callable[..., Any]
    """The eager reference, which defines the correct result; arguments of the public function without ``kernels``."""
    backends: Mapping[str, Limit | None]
    """The fused backends by name, at most one for each type of device, with their limits beyond device and dtype."""

    schema: str
    """Schema of the op, as `torch.library.Library.define` takes it, without the namespace."""
    backward_schema: str
    """Schema of ``<name>_backward``, which computes the gradients."""
    fake: Callable[..., Any]
    """Outputs without data, of the right shapes, dtypes and strides."""
    fake_backward: Callable[..., Any]
    """Outputs of ``<name>_backward`` without data."""
    decomposition: Callable[..., Any]
    """Outputs computed by operations of torch, for calls under the transforms of `torch.func`."""
    setup_context: Callable[..., None]
    """Keep what ``backward`` needs, as for `torch.library.register_autograd`."""
    backward: Callable[..., Any]
    """Gradient formula, as for `torch.library.register_autograd`."""

    case: Callable[..., Case]
    """Make a `savl.ops.case.Case` from a dtype, a ``seed`` and settings."""
    full_cases: tuple[Settings, ...]
    """Settings of the cases of ``savl kernels verify --all``: shapes as networks have them."""
    quick_cases: tuple[Settings, ...]
    """Settings of the cases of ``savl kernels verify``: every trait of the op, on small shapes."""
    small_cases: tuple[Settings, ...]
    """Settings of the cases in most tests: optional arguments present and absent, sizes not divisible by a tile."""
    tiny_cases: tuple[Settings, ...]
    """Settings of cases with a few dozen numbers, whose derivatives finite differences can check."""
    interpreter_cases: tuple[Settings, ...] = ()
    """Settings of the cases under Triton's interpreter, which is slow; empty without a Triton kernel."""

    forward_on_cpu: Callable[..., Any] | None = None
    """Kernel for CPUs in Python, a chain of other ops; None if the C++ extension has one. The public function calls the
    same chain where no kernel serves, and keeps what the gradients need, which ``backward_in_torch`` computes again.
    The automatic choice on CPUs is therefore not this kernel where gradients are needed, nor in an exported program,
    which may run without Python."""
    calls: tuple[str, ...] = ()
    """Names of the ops that ``forward_on_cpu`` calls."""
    backward_in_torch: Callable[..., Any] | None = None
    """Kernel of ``<name>_backward`` for CPUs and GPUs by operations of torch; None if the backends have their own."""
    title: str = ""
    """Name of the op in tables of benchmarks."""
    benchmark: Callable[..., BenchmarkProblem] | None = None
    """Make the `savl.ops.case.BenchmarkProblem` of the op; see there. None leaves the op out of the benchmarks."""
    benchmark_options: tuple[Settings, ...] = ()
    """More benchmarks: keyword arguments for ``benchmark`` with a ``title`` each."""

    def backend_for(self, device: str) -> str | None:
        """Return the name of the fused backend that takes tensors on a type of device, or None."""
        found: str | None = vars(self)["_by_device"].get(device)
        return found

    def __post_init__(self) -> None:
        # Here, because torch.compile cannot trace the lock of a cached property.
        by_device = {FUSED[name].device: name for name in reversed(list(self.backends))}  # the first of each device
        object.__setattr__(self, "_by_device", by_device)


OPS: dict[str, Op] = {}
"""The ops by name, in the order of reports."""

UNAVAILABLE: dict[tuple[str, str], str | None] = {}
"""Why a backend cannot serve an op on this machine, by the names of both; None if it can. Tests replace entries."""


def why_unavailable(op: str, backend: str) -> str | None:
    """Return why a backend cannot serve an op on this machine, whatever the tensors; None if it can."""
    return None if backend == EAGER else UNAVAILABLE[op, backend]


# Created after everything in savl.ops.library that may raise: a process defines a namespace once, and an import of savl
# that failed may be repeated.
LIBRARY = torch.library.Library("savl", "DEF")


def register(op: Op) -> Op:
    """Define an op and its backward pass in torch, and add it to `OPS`.

    Returns:
        ``op``.
    """
    _define(op.schema, op.fake, op.backward, op.setup_context)
    _define(op.backward_schema, op.fake_backward, None, None)
    # The key under which torch.func interprets a call, whatever the transform.
    LIBRARY.impl(op.name, op.decomposition, "FuncTorchDynamicLayerFrontMode")
    if op.forward_on_cpu is not None:
        LIBRARY.impl(op.name, op.forward_on_cpu, "CPU")
    if op.backward_in_torch is not None:
        for key in ("CPU", DEVICE.upper()):
            LIBRARY.impl(f"{op.name}_backward", op.backward_in_torch, key)
    if TRITON in op.backends:
        for name in (op.name, f"{op.name}_backward")[: 1 if op.backward_in_torch else 2]:
            key = FUSED[TRITON].device.upper()
            LIBRARY.impl(name, _triton_launcher(op.name, name), key, allow_override=INTERPRETED)
    OPS[op.name] = op
    UNAVAILABLE.update({(op.name, backend): _why_unavailable(op, backend) for backend in op.backends})
    return op


def _define(
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
) -> None:
    name = schema.partition("(")[0]
    qualified = f"savl::{name}"
    LIBRARY.define(schema)
    torch.library.register_fake(qualified, fake, lib=LIBRARY)

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{qualified} has no derivative: for second derivatives use savl.use_fused_kernels(False)")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context, lib=LIBRARY)

    def unavailable(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        reason = EXTENSION_UNAVAILABLE if device.type == "cpu" else CUDA_UNAVAILABLE
        raise NotImplementedError(
            f"{qualified} has no kernel for tensors on {device} ({reason or 'savl has kernels for CPUs and GPUs'})"
            f". A program exported with fused kernels needs them: install savl with its kernels, or export the program "
            f"with savl.use_fused_kernels(False)"
        )

    LIBRARY.impl(name, unavailable, "CompositeExplicitAutograd")  # serves where no kernel does


def _triton_launcher(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports ``savl.kernels.<module>`` when it is called first: Triton takes long to import."""

    def launch(*args: Any) -> Any:
        return getattr(import_module(f"savl.kernels.{module}"), name)(*args)

    return launch


def has_kernel(op: str, device: str) -> bool:
    """Return whether torch has a kernel of an op and of its backward pass for a type of device."""
    names = (f"savl::{op}", f"savl::{op}_backward")
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()) for name in names)


def _why_unavailable(op: Op, backend: str) -> str | None:
    if backend == CPP and INTERPRETED and TRITON in op.backends:
        return "TRITON_INTERPRET is set: Triton's interpreter has this op on the CPU"
    kernels = FUSED[backend]
    if kernels.unavailable is None and not all(
        has_kernel(each, kernels.device) for each in (op.name, *(op.calls if backend == CPP else ()))
    ):
        library = "C++ extension" if backend == CPP else "CUDA library"
        return f"the {library} has no such kernel: it is older than this package; install savl again"
    return kernels.unavailable
