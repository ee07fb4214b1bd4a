"""Scopes of the kernel settings: process, ``with`` block of a thread, and the backward passes started in a block.

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

from savl.ops.settings import Choice, KernelSettings, settings_of_environment


class ProcessSettings:
    """The setting of the process: that of the newest call whose result entered no ``with`` block."""

    def __init__(self, first: KernelSettings | None) -> None:
        self.settings = first
        """None if neither a call nor the environment has set anything."""
        self._calls: list[tuple[Callable[[], object | None], KernelSettings | None]] = [(lambda: None, first)]

    def push(self, call: object, settings: KernelSettings) -> None:
        """Apply the setting of a new call."""
        with _lock:
            if self._calls[-1][0]() is None:  # nobody can undo that call any more: it hides for good what came before
                del self._calls[:-1]
            self._calls.append((weakref.ref(call), settings))
            self.settings = settings

    def remove(self, call: object) -> None:
        """Undo a call, because its result enters a block."""
        with _lock:
            self._calls = [entry for entry in self._calls if entry[0]() is not call]
            self.settings = self._calls[-1][1]


_lock = threading.Lock()
_thread = threading.local()

process = ProcessSettings(None)
"""The setting of this process. Tests put another in its place."""


def read_environment() -> None:
    """Give the process the settings in ``SAVL_KERNELS``, once all ops are registered."""
    global process
    process = ProcessSettings(settings_of_environment())


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


def enter_block(settings: KernelSettings) -> None:
    """Apply settings to this thread until `leave_block`; blocks nest."""
    before = getattr(_thread, "settings", None), _settings_of_backward_pass()
    _thread.outer = [*getattr(_thread, "outer", []), before]
    _thread.settings = settings
    _hand_to_backward_passes(settings)


def leave_block() -> None:
    """Apply the settings that held before `enter_block`."""
    _thread.settings, handed_on = _thread.outer.pop()
    _hand_to_backward_passes(handed_on)


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


def choice_of_thread(op: str) -> Choice:
    """Return the choice of `current_settings` for one op, given by name."""
    settings = explicit_settings()
    choice: Choice = getattr(_thread, "default", False) if settings is None else getattr(settings, op)
    return choice


@contextmanager
def fused_by_default(*, eager: bool = False) -> Iterator[None]:
    """Have the fused kernels serve in a block of this thread unless something else is set.

    A model's own setting, a ``with use_fused_kernels(...)`` block, a call of `use_fused_kernels` in any thread and the
    environment variable ``SAVL_KERNELS`` all take precedence. Blocks nest.

    Args:
        eager: Have the reference serve in the block instead, as ``use_fused_kernels(False)`` does.
    """
    if eager:
        enter_block(KernelSettings.of(False))
        try:
            yield
        finally:
            leave_block()
        return
    outer = getattr(_thread, "default", False)
    _thread.default = True
    try:
        yield
    finally:
        _thread.default = outer
