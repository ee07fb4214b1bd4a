"""The switch: which backend serves an op. Process-wide, for a block of code, or for one model.

Three settings may apply to a call, and the nearest counts: the setting of the model, that of the ``with`` block that
the thread is in, and that of the process, whose first value comes from ``SAVL_KERNELS``. Without any of them the eager
reference serves, or the fused kernels inside `fused_by_default`, which `savl.Upscaler` and the command line enter.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from savl.ops.gpu import why_unfit
from savl.ops.library import EAGER, FUSED, INTERPRETED, TRITON
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
            process.push(self, settings)
            return
        for module in model.modules():
            kernels = vars(module).get("kernels", "no such attribute")
            if kernels is None or isinstance(kernels, KernelSettings):
                self._before.append((module, kernels))
        if not self._before:
            raise ValueError(f"model must have savl blocks in it, {type(model).__name__} has none")
        _set_kernels([(module, settings) for module, _ in self._before])

    def __enter__(self) -> FusedKernels:
        if not self._before:
            process.remove(self)  # the call applied to all threads, a block applies to its own
            # Kept by thread and not by object, which threads may share.
            before = getattr(_thread, "settings", None), _settings_of_backward_pass()
            _thread.outer = [*getattr(_thread, "outer", []), before]
            _thread.settings = self._settings
            _hand_to_backward_passes(self._settings)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before:
            _set_kernels(self._before)
        else:
            _thread.settings, handed_on = _thread.outer.pop()
            _hand_to_backward_passes(handed_on)


def _set_kernels(settings: list[tuple[nn.Module, KernelSettings | None]]) -> None:
    with _lock:
        for module, kernels in settings:
            module.kernels = kernels  # type: ignore[assignment]


class ProcessSettings:
    """The setting of the process: that of the newest call whose result entered no ``with`` block."""

    def __init__(self, first: KernelSettings | None) -> None:
        self.settings = first
        """None if neither a call nor the environment has set anything."""
        self._calls: list[tuple[Callable[[], FusedKernels | None], KernelSettings | None]] = [(lambda: None, first)]

    def push(self, call: FusedKernels, settings: KernelSettings) -> None:
        """Apply the setting of a new call."""
        with _lock:
            if self._calls[-1][0]() is None:  # nobody can undo that call any more: it hides for good what came before
                del self._calls[:-1]
            self._calls.append((weakref.ref(call), settings))
            self.settings = settings

    def remove(self, call: FusedKernels) -> None:
        """Undo a call, because its result enters a block."""
        with _lock:
            self._calls = [entry for entry in self._calls if entry[0]() is not call]
            self.settings = self._calls[-1][1]


process = ProcessSettings(None)
"""The setting of this process; `savl.ops` gives it the value of the environment. Tests put another in its place."""

_lock = threading.Lock()
_thread = threading.local()

# A backward pass may run in threads of autograd: on a GPU always, on a CPU where reentrant checkpoints nest deeply. It
# recomputes checkpointed activations there, by the setting of the block that it was started in. Torch hands the state
# of a thread to these threads, including the object under this key; the functions have no public names.
_KEY = "savl.ops.switch"
_HANDS_ON = all(hasattr(torch._C, name) for name in ("_stash_obj_in_tls", "_get_obj_in_tls", "_is_key_in_tls"))


def _hand_to_backward_passes(settings: KernelSettings | None) -> None:
    if _HANDS_ON:
        torch._C._stash_obj_in_tls(_KEY, settings)


def _settings_of_backward_pass() -> KernelSettings | None:
    """Return the setting of the block in which the backward pass was started that this thread works on, or None."""
    if torch.compiler.is_compiling() or not _HANDS_ON or not torch._C._is_key_in_tls(_KEY):
        return None
    settings: KernelSettings | None = torch._C._get_obj_in_tls(_KEY)
    return settings


def explicit_settings() -> KernelSettings | None:
    """Return what a block of this thread, a call or the environment has set for models without their own setting."""
    settings: KernelSettings | None = getattr(_thread, "settings", None)
    if settings is None:
        settings = _settings_of_backward_pass()
    return process.settings if settings is None else settings


def current_settings() -> KernelSettings:
    """Return the settings that apply in this thread to a model without a setting of its own."""
    settings = explicit_settings()
    return KernelSettings.of(getattr(_thread, "default", False)) if settings is None else settings


@contextmanager
def fused_by_default(*, eager: bool = False) -> Iterator[None]:
    """Have the fused kernels serve in a block of this thread unless something else is set.

    A model's own setting, a ``with use_fused_kernels(...)`` block, a call of `use_fused_kernels` in any thread and the
    environment variable ``SAVL_KERNELS`` all take precedence. Blocks nest.

    Args:
        eager: Have the reference serve in the block instead, as ``use_fused_kernels(False)`` does.
    """
    if eager:
        with use_fused_kernels(False):
            yield
        return
    outer = getattr(_thread, "default", False)
    _thread.default = True
    try:
        yield
    finally:
        _thread.default = outer


def serves(op: Op, kernels: KernelSettings | None, *tensors: Tensor | None) -> bool:
    """Return whether a fused kernel serves a call; otherwise the reference does.

    Args:
        op: The op.
        kernels: Setting of the model; None for the setting of this thread.
        tensors: All tensors of the call; device and dtype of the first decide.

    Raises:
        KernelUnavailable: A backend was requested by name and cannot serve.
    """
    settings = explicit_settings() if kernels is None else kernels
    choice = getattr(_thread, "default", False) if settings is None else getattr(settings, op.name)
    if choice is False or choice == EAGER:
        return False
    first = tensors[0]
    assert first is not None
    # The dispatcher calls the kernels of the device: the automatic choice is the one backend that has some.
    backend = op.backend_for(first.device.type) if choice is True else choice
    if backend is None or (choice is True and INTERPRETED and backend == TRITON):
        return False
    limit = op.backends[backend]
    reason = why_unavailable(op.name, backend) or _why_refused(backend, first) or why_transformed(*tensors)
    reason = reason or (None if limit is None else limit(*tensors))
    if reason is not None and choice is not True:
        raise KernelUnavailable(f"{op.name}: backend {choice!r} cannot serve this call: {reason}")
    return reason is None


def _why_refused(backend: str, tensor: Tensor) -> str | None:
    kernels = FUSED[backend]
    if tensor.device.type != kernels.device:
        place = "the CPU" if kernels.device == "cpu" else "a CUDA GPU"
        return f"the {kernels.title} kernels are for {place}, the tensors are on {tensor.device}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in kernels.dtypes:
        return f"the {kernels.title} kernels take {', '.join(kernels.dtypes)}, the tensors are {dtype}"
    return why_unfit(backend, tensor.device.index or 0) if tensor.device.type == "cuda" else None
