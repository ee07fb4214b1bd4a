"""The switch: which backend serves an op. Process-wide, for a block of code, or for one model; per op if so wished.

Three settings may apply to a call, the nearest counts: that of the model, that of the ``with`` block the thread is in,
that of the process, which ``SAVL_KERNELS`` gives its first value. Where none of them was made, the eager reference
serves, and the fused kernels serve inside `fused_by_default`, which `savl.Upscaler` and the command line enter.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from savl.ops.library import CUDA_UNAVAILABLE, EXTENSION_UNAVAILABLE, cuda_architecture_unavailable, has_kernel
from savl.ops.triton_kernels import INTERPRETED, INTERPRETER_VARIABLE, why_gpu_unfit, why_triton_unavailable
from savl.settings import EnvironmentVariableError

EAGER = "eager"
CPP = "cpp"
TRITON = "triton"
CUDA = "cuda"


@dataclass(frozen=True)
class Backend:
    """What kind of kernels an op may have."""

    title: str
    """In a sentence: "the … kernels"."""
    device: str
    """Type of the devices whose tensors they take."""
    dtypes: tuple[str, ...]
    """What they take, by name."""


FUSED = {
    CPP: Backend("C++", "cpu", ("float32", "float64", "bfloat16")),
    TRITON: Backend("Triton", "cpu" if INTERPRETED else "cuda", ("float32", "bfloat16", "float16")),
    CUDA: Backend("CUDA", "cuda", ("float32", "bfloat16", "float16")),
}
"""The fused backends by name."""

VARIABLE = "SAVL_KERNELS"

Choice = bool | str
"""For one op: True for the fastest backend that can serve, False or ``"eager"`` for the reference, or a backend's name,
which then must serve or raise `KernelUnavailable`."""


class KernelUnavailable(RuntimeError):
    """A backend that was asked for by name cannot serve; the message says why."""


@dataclass(frozen=True)
class KernelSettings:
    """A `Choice` for each op."""

    window_attention: Choice = False
    overlapping_window_attention: Choice = False
    gaussian_posterior: Choice = False
    channel_modulation: Choice = False
    layer_norm: Choice = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_choice(field.name, getattr(self, field.name))

    @classmethod
    def of(cls, enabled: Choice) -> KernelSettings:
        """The same choice for every op."""
        return cls(**dict.fromkeys(OPS, enabled))


OPS = tuple(field.name for field in fields(KernelSettings))
"""The ops by name, as in ``torch.ops.savl``."""

BACKENDS: dict[str, tuple[str, ...]] = {
    "window_attention": (TRITON, CPP),
    "overlapping_window_attention": (TRITON, CPP),
    "gaussian_posterior": (CUDA, CPP),
    "channel_modulation": (CUDA, CPP),
    "layer_norm": (TRITON, CPP),
}
"""The fused backends of each op, by name; one for each type of device."""


def why_unavailable(op: str, backend: str) -> str | None:
    """Why a backend cannot serve an op on this machine, whatever the tensors; None if it can."""
    return _UNAVAILABLE[op, backend]


def _probe(op: str, backend: str) -> str | None:
    if backend == TRITON:
        return why_triton_unavailable()
    if backend == CPP and INTERPRETED and TRITON in BACKENDS[op]:
        return f"{INTERPRETER_VARIABLE} is set: Triton's interpreter has this op on the CPU"
    library, reason = ("C++ extension", EXTENSION_UNAVAILABLE) if backend == CPP else ("CUDA library", CUDA_UNAVAILABLE)
    if reason is None and not has_kernel(op, FUSED[backend].device.upper()):
        return f"the {library} has no such kernel: it is older than this package; install savl again"
    return reason


_UNAVAILABLE = {(op, EAGER): None for op in OPS} | {
    (op, backend): _probe(op, backend) for op in OPS for backend in BACKENDS[op]
}


def parse_settings(text: str) -> KernelSettings:
    """Read what ``SAVL_KERNELS`` says.

    Args:
        text: ``fused`` (also 1, on, true, auto), ``eager`` (also 0, off, false, or nothing), or a list such as
            ``window_attention=cpp,channel_modulation=eager``; ops not in the list are fused.

    Raises:
        EnvironmentVariableError: It says something else.
    """
    word = text.strip().lower()
    if word in ("fused", "1", "on", "true", "auto"):
        return KernelSettings.of(True)
    if word in ("", EAGER, "0", "off", "false"):
        return KernelSettings.of(False)
    choices: dict[str, Choice] = {}
    try:
        for part in word.split(","):
            op, equals, choice = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise ValueError(f"{part.strip()!r} is no setting")
            choices[op] = {"fused": True, "auto": True}.get(choice, choice)
        return _checked(True, choices)
    except ValueError as error:
        raise EnvironmentVariableError(
            f"{VARIABLE} must be 'fused', 'eager' or a list like 'window_attention=cpp,channel_modulation=eager', "
            f"got {text!r}: {error}"
        ) from None


def use_fused_kernels(enabled: bool | None = True, *, model: nn.Module | None = None, **per_op: Choice) -> FusedKernels:
    """Switch the fused kernels on or off: for `savl.upscale`, `savl.Upscaler`, and networks that are called directly.

    Until this is called or ``SAVL_KERNELS`` is set, `savl.upscale`, `savl.Upscaler` and the command line compute with
    the fused kernels, and a network that is called directly (``model(lr)``) computes with the eager reference.

    As a call it holds from now on, in all threads. As a context manager it holds in the block and for the thread that
    runs it; blocks nest, and what held before holds again afterwards. With ``model`` it holds for that model alone,
    wherever it runs, and comes before both.

    Without fused kernels for a machine, a device or a dtype the eager reference serves silently; `kernel_report` tells.
    Results agree within twice the rounding error of the eager path (`savl kernels verify`). The fused ops have first
    derivatives only, in reverse mode: under the transforms of `torch.func` (grad, vmap, jvp, ...) and for the tangents
    of forward mode the reference serves. Where activations are checkpointed, the backward pass computes them again and
    belongs into the block too, or the setting to the model. Until a block is entered, its setting is the process's.

    Args:
        enabled: True for every op that a fused kernel can serve, False for the eager reference everywhere. None, with
            a model, takes the model's own setting away.
        model: A network, or any module with savl blocks in it.
        per_op: For ops by name, in place of ``enabled``: True, False, or a backend's name such as ``"cpp"`` or
            ``"triton"``, which raises where it cannot serve instead of falling back.

    Returns:
        A context manager that undoes the setting; leave it if you do not need it.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: No such op or backend, None without a model, or a model without savl blocks.
        KernelUnavailable: A backend asked for by name cannot serve on this machine.
    """
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool (backends are named per op), got {enabled!r}")
    if enabled is None and (model is None or per_op):
        raise ValueError("enabled=None takes a model's own setting away: it needs model=, and no ops")
    settings = None if enabled is None else _checked(enabled, per_op)
    if settings is not None:
        for op in OPS:
            choice = getattr(settings, op)
            if isinstance(choice, str) and (reason := why_unavailable(op, choice)) is not None:
                raise KernelUnavailable(f"{op}: backend {choice!r} cannot serve: {reason}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return FusedKernels(settings, model)


class FusedKernels:
    """What `use_fused_kernels` returns: the setting is made; a ``with`` block confines it."""

    def __init__(self, settings: KernelSettings | None, model: nn.Module | None) -> None:
        self._settings = settings
        self._modules: list[tuple[nn.Module, KernelSettings | None]] = []
        if model is None:
            assert settings is not None
            _process.push(self, settings)
            return
        unset = object()
        found = [
            module
            for module in model.modules()
            if isinstance(vars(module).get("kernels", unset), KernelSettings | None)
        ]
        if not found:
            raise ValueError(f"model must have savl blocks in it, {type(model).__name__} has none")
        with _lock:
            self._modules = [(module, module.kernels) for module in found]  # type: ignore[misc]
            for module in found:
                module.kernels = settings  # type: ignore[assignment]

    def __enter__(self) -> FusedKernels:
        if not self._modules:
            _process.remove(self)  # the call made it for all threads, a block is this thread's own
            # On the thread, not on the object, which threads may share.
            before = getattr(_thread, "settings", None), _of_the_backward_pass()
            _thread.outer = [*getattr(_thread, "outer", []), before]
            _thread.settings = self._settings
            _hand_to_backward_passes(self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._modules:
            with _lock:
                for module, settings in self._modules:
                    module.kernels = settings  # type: ignore[assignment]
        else:
            _thread.settings, handed_on = _thread.outer.pop()
            _hand_to_backward_passes(handed_on)


class _Process:
    """What holds for every thread that says nothing else: the newest call whose result entered no ``with`` block."""

    def __init__(self, first: KernelSettings | None) -> None:
        self.settings = first
        """None where neither a call nor the environment has said anything."""
        self._calls: list[tuple[weakref.ref[FusedKernels] | None, KernelSettings | None]] = [(None, first)]

    def push(self, call: FusedKernels, settings: KernelSettings) -> None:
        """A call was made."""
        with _lock:
            # Nobody can take back a call whose result is gone, and what lies below it never shows again.
            gone = [index for index, (caller, _) in enumerate(self._calls) if caller is None or caller() is None]
            self._calls = [*self._calls[gone[-1] if gone else 0 :], (weakref.ref(call), settings)]
            self.settings = settings

    def remove(self, call: FusedKernels) -> None:
        """Its result has entered a block."""
        with _lock:
            self._calls = [entry for entry in self._calls if entry[0] is None or entry[0]() is not call]
            self.settings = self._calls[-1][1]


# A backward pass may run in threads of autograd's own: on a GPU always, on a CPU where reentrant checkpoints nest
# deeply. What is checkpointed is computed there again, and must find the setting of the block that the pass was started
# in. Torch hands a thread's state to them, and in it what lies under this key; the functions have no public names.
_KEY = "savl.ops.switch"
_HANDS_ON = all(hasattr(torch._C, name) for name in ("_stash_obj_in_tls", "_get_obj_in_tls", "_is_key_in_tls"))


def _hand_to_backward_passes(settings: KernelSettings | None) -> None:
    if _HANDS_ON:
        torch._C._stash_obj_in_tls(_KEY, settings)


def _of_the_backward_pass() -> KernelSettings | None:
    """What held where the backward pass was started that this thread works on; None without one or without a block."""
    if torch.compiler.is_compiling() or not _HANDS_ON or not torch._C._is_key_in_tls(_KEY):
        return None
    settings: KernelSettings | None = torch._C._get_obj_in_tls(_KEY)
    return settings


def current_settings() -> KernelSettings:
    """Return what holds in this thread for a model without a setting of its own."""
    settings: KernelSettings | None = getattr(_thread, "settings", None)
    if settings is None:
        settings = _of_the_backward_pass()
    if settings is None:
        settings = _process.settings
    return getattr(_thread, "default", _EAGER) if settings is None else settings


def is_set() -> bool:
    """Return whether a block of this thread, a call, or the environment has said which kernels serve."""
    settings = getattr(_thread, "settings", None), _of_the_backward_pass(), _process.settings
    return any(each is not None for each in settings)


@contextmanager
def fused_by_default(*, eager: bool = False) -> Iterator[None]:
    """Let the fused kernels serve in a block of this thread wherever nobody has said otherwise.

    A model's own setting, a ``with use_fused_kernels(...)`` block, a call of `use_fused_kernels` in any thread and the
    environment variable ``SAVL_KERNELS`` all come before it. Blocks nest.

    Args:
        eager: Let the reference serve in the block instead, as ``use_fused_kernels(False)`` does.
    """
    if eager:
        with use_fused_kernels(False):
            yield
        return
    outer = getattr(_thread, "default", _EAGER)
    _thread.default = _FUSED
    try:
        yield
    finally:
        _thread.default = outer


def serves(op: str, tensor: Tensor, kernels: KernelSettings | None, limit: str | None = None) -> bool:
    """Whether the fused kernel serves a call; else the reference does.

    Args:
        op: Name of the op.
        tensor: Its main argument, for device and dtype.
        kernels: The model's setting; None for what holds in this thread.
        limit: What else keeps the kernel from serving this call, in words.

    Raises:
        KernelUnavailable: A backend was asked for by name and cannot.
    """
    choice = getattr(current_settings() if kernels is None else kernels, op)
    if choice is False or choice == EAGER:
        return False
    if choice is True:  # the dispatcher calls the kernels of the tensor's device: there is one backend that has them
        backend = next((name for name in BACKENDS[op] if FUSED[name].device == tensor.device.type), None)
        if backend is None or (INTERPRETED and backend == TRITON):
            return False
        return (_UNAVAILABLE[op, backend] or _refusal(backend, tensor) or limit) is None
    reason = _UNAVAILABLE[op, choice] or _refusal(choice, tensor) or limit
    if reason is not None:
        raise KernelUnavailable(f"{op}: backend {choice!r} cannot serve this call: {reason}")
    return True


def _refusal(backend: str, tensor: Tensor) -> str | None:
    kernels = FUSED[backend]
    if tensor.device.type != kernels.device:
        place = "the CPU" if kernels.device == "cpu" else "a CUDA GPU"
        return f"the {kernels.title} kernels are for {place}, the tensors are on {tensor.device}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in kernels.dtypes:
        return f"the {kernels.title} kernels take {', '.join(kernels.dtypes)}, the tensors are {dtype}"
    return _gpu_refusal(backend, tensor.device.index or 0) if tensor.device.type == "cuda" else None


def _gpu_refusal(backend: str, index: int) -> str | None:
    return why_gpu_unfit(index) if backend == TRITON else cuda_architecture_unavailable(index)


# The mark that torch.compiler.assume_constant_result leaves, so that torch.compile asks once and does not trace into
# the driver. The function itself would import torch._dynamo, 1.2 s that every `savl upscale` would pay.
_gpu_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(enabled: bool, per_op: dict[str, Choice]) -> KernelSettings:
    for op in per_op:
        if op not in OPS:
            raise ValueError(f"no such op: {op!r}; there are {', '.join(OPS)}")
    changes: dict[str, Any] = per_op
    return replace(KernelSettings.of(enabled), **changes)


def _check_choice(op: str, choice: object) -> None:
    if not isinstance(choice, bool | str):
        raise TypeError(f"{op} must be True, False or a backend's name, got {choice!r}")
    if isinstance(choice, str) and choice not in (EAGER, *BACKENDS[op]):
        raise ValueError(f"{op} has no backend {choice!r}; it has {', '.join((EAGER, *BACKENDS[op]))}")


def _of_environment() -> KernelSettings | None:
    """Return what ``SAVL_KERNELS`` says; None where it is not set or empty."""
    text = os.environ.get(VARIABLE, "").strip()
    return parse_settings(text) if text else None


_EAGER, _FUSED = KernelSettings.of(False), KernelSettings.of(True)
_lock = threading.Lock()
_thread = threading.local()
_process = _Process(_of_environment())
