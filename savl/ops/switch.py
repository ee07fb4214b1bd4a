"""The switch: which backend serves an op. Process-wide, for a block of code, or for one model."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from savl.ops import scopes
from savl.ops.gpu import why_unfit
from savl.ops.library import CPP, EAGER, FUSED, INTERPRETED, TRITON
from savl.ops.op import Op, why_unavailable
from savl.ops.settings import Choice, KernelSettings
from savl.ops.transforms import why_transformed


class KernelUnavailable(RuntimeError):
    """A backend that was requested by name cannot serve; the message says why."""


def use_fused_kernels(enabled: bool | None = True, *, model: nn.Module | None = None, **per_op: Choice) -> FusedKernels:
    """Switch the fused kernels on or off: for `savl.upscale`, `savl.Upscaler`, and networks that are called directly.

    Until this is called or ``SAVL_KERNELS`` is set, `savl.upscale`, `savl.Upscaler` and the command line use the fused
    kernels, and a network that is called directly (``model(lr)``) uses the eager reference.

    A call applies to all threads from then on. As a context manager it applies to the block and the thread that runs
    it; blocks nest, and the previous setting applies again afterwards (until a block is entered, its setting is that of
    the process). With ``model`` it applies to that model alone, in every thread, and takes precedence over both.

    Where no fused kernel takes the machine, device or dtype, the reference serves silently; `kernel_report` says where.
    It also serves under the transforms of `torch.func` and in forward mode: the fused ops have first derivatives in
    reverse mode only. If activations are checkpointed, the backward pass recomputes them and belongs in the block too.

    Args:
        enabled: True for every op that a fused kernel can serve, False for the eager reference everywhere. None, with
            a model, removes the model's own setting.
        model: A network, or any module with savl blocks in it.
        per_op: For ops by name, in place of ``enabled``: True, False, or a backend's name such as ``"cpp"`` or
            ``"triton"``, which raises where it cannot serve instead of falling back.

    Returns:
        A context manager that undoes the setting. It need not be used.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: No such op or backend, None without a model, or a model without savl blocks.
        KernelUnavailable: A backend requested by name cannot serve on this machine.
    """
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool (backends are named per op), got {enabled!r}")
    if enabled is None and (model is None or per_op):
        raise ValueError("enabled=None takes a model's own setting away: it needs model=, and no ops")
    settings = None if enabled is None else KernelSettings.of(enabled, **per_op)
    for op, choice in per_op.items():
        if isinstance(choice, str) and (reason := why_unavailable(op, choice)) is not None:
            raise KernelUnavailable(f"{op}: backend {choice!r} cannot serve: {reason}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return FusedKernels(settings, model)


class FusedKernels:
    """The result of `use_fused_kernels`: the setting applies already; a ``with`` block limits it to the block."""

    def __init__(self, settings: KernelSettings | None, model: nn.Module | None) -> None:
        self._settings = settings
        self._before: list[tuple[nn.Module, KernelSettings | None]] = []
        if model is None:
            assert settings is not None
            scopes.process.push(self, settings)
            return
        with _lock:
            for module in model.modules():
                kernels = vars(module).get("kernels", "no such attribute")
                if kernels is None or isinstance(kernels, KernelSettings):
                    self._before.append((module, kernels))
                    module.kernels = settings  # type: ignore[assignment]
        if not self._before:
            raise ValueError(f"model must have savl blocks in it, {type(model).__name__} has none")

    def __enter__(self) -> FusedKernels:
        if self._settings is not None and not self._before:
            scopes.process.remove(self)  # the call applied to all threads, a block applies to its own
            scopes.enter_block(self._settings)
        return self

    def __exit__(self, *error: object) -> None:
        if not self._before:
            scopes.leave_block()
        with _lock:
            for module, kernels in self._before:
                module.kernels = kernels  # type: ignore[assignment]


_lock = threading.Lock()


def serves(op: Op, kernels: KernelSettings | None, *tensors: Tensor | None) -> bool:
    """Return whether a fused kernel serves a call; otherwise the reference does.

    Args:
        op: The op.
        kernels: Setting of the model; None for the setting of this thread.
        tensors: All tensors of the call; device and dtype of the first decide.

    Raises:
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    choice = scopes.choice_of_thread(op.name) if kernels is None else getattr(kernels, op.name)
    if choice is False or choice == EAGER:
        return False
    first = tensors[0]
    assert first is not None
    # The dispatcher calls the kernels of the device: the automatic choice is the one backend that has some.
    backend = op.backend_for(first.device.type) if choice is True else choice
    if backend is None or (choice is True and INTERPRETED and backend == TRITON):
        return False
    # An exported program, which may run without Python, contains the ops of the chain: they have kernels in C++.
    by_chain = choice is True and backend == CPP and op.forward_on_cpu is not None
    if by_chain and (torch.compiler.is_exporting() or _are_trained(*tensors)):
        return False
    limit = op.backends[backend]
    reason = why_unavailable(op.name, backend) or _why_refused(backend, first) or why_transformed(*tensors)
    reason = reason or (None if limit is None else limit(*tensors))
    if reason is not None and choice is not True:
        raise KernelUnavailable(f"{op.name}: backend {choice!r} cannot serve this call: {reason}")
    return reason is None


def _are_trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def _why_refused(backend: str, tensor: Tensor) -> str | None:
    kernels = FUSED[backend]
    if tensor.device.type != kernels.device:
        place = "the CPU" if kernels.device == "cpu" else "a GPU"
        return f"the {kernels.title} kernels are for {place}, the tensors are on {tensor.device}"
    if tensor.dtype not in kernels.torch_dtypes:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"the {kernels.title} kernels take {', '.join(kernels.dtypes)}, the tensors are {dtype}"
    return why_unfit(backend, tensor.device.index or 0) if tensor.device.type != "cpu" else None
