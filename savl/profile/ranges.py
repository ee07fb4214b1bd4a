"""Named ranges around the parts of a network, for torch.profiler, Nsight Systems and Nsight Compute.

Names are plain words, outermost first: ``estimator``, ``group 0``, ``group 0 HAB 1``, ``group 0 HAB 1 CAB``; those of
the ops end in the backend that serves: ``window_attention [triton]``.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from savl import ops
from savl.network import CAB, DARHAG, DSCA, HAB, OCAB, SAVL, AmortizedEstimator, LikelihoodDecoder
from savl.network.layers import MLP
from savl.network.savl import DirectUpsampler, PixelShuffleUpsampler
from savl.ops import KernelSettings, KernelUnavailable
from savl.ops.library import EAGER
from savl.ops.op import OPS, Op
from savl.ops.switch import serves

NETWORK = "network"
TITLES: dict[type[nn.Module], str] = {
    SAVL: NETWORK,
    AmortizedEstimator: "estimator",
    DARHAG: "group",
    DSCA: "DSCA",
    HAB: "HAB",
    OCAB: "OCAB",
    CAB: "CAB",
    MLP: "MLP",
    PixelShuffleUpsampler: "upsampler",
    DirectUpsampler: "upsampler",
    LikelihoodDecoder: "decoder",
}
"""Names of the ranges of modules, by type."""

_PARTS: dict[tuple[type[nn.Module], str], str] = {
    (SAVL, "conv_first"): "shallow features",
    (SAVL, "conv_last"): "deep features",
    (DARHAG, "conv"): "convolution",
}
"""Names of the ranges of modules whose type says nothing, by the type of their parent and their attribute."""


def range_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that get a range, outermost first, with the names of their ranges.

    Args:
        model: A network, or any module with savl blocks in it.
    """
    paths = dict(model.named_modules())
    names: dict[str, str] = {}
    for path, module in paths.items():
        outer, _, last = path.rpartition(".")
        title = _PARTS.get((type(paths[outer]), last)) or _title(module)
        if title is None:
            continue
        while outer and outer not in names:
            outer = outer.rpartition(".")[0]
        around = names.get(outer, NETWORK) if path else NETWORK
        words = ([] if around == NETWORK else [around]) + [title] + ([last] if last.isdigit() else [])
        names[path] = " ".join(words)
    return {paths[path]: name for path, name in names.items()}


@contextmanager
def annotate(model: nn.Module) -> Iterator[None]:
    """Put named ranges around the parts of a network and the ops for the duration of a ``with`` block.

    The ranges go to `torch.profiler.record_function`, and to NVTX if there is a CUDA GPU. They are removed when the
    block ends, also by an exception. Blocks may nest; a part that is annotated already keeps its one range. The
    backward pass has no ranges of its own. Code compiled by `torch.compile` has no ranges inside, and is compiled once
    more for a block.

    Args:
        model: A network, or any module with savl blocks in it, in training or evaluation mode. The block must not end
            while another thread runs it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It has no savl blocks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = range_names(model)
    if not names:
        raise ValueError(f"model must have savl blocks in it, {type(model).__name__} has none")
    with _lock:
        for module, name in names.items():
            _hooked.setdefault(module, _Hooks(module, name)).open()
        _wrapped_ops.open()
    depth = len(_stack())
    try:
        yield
    finally:
        with _lock:
            for module in names:
                if _hooked[module].close():
                    del _hooked[module]
            _wrapped_ops.close()
        _close_down_to(depth)


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Open one range for torch.profiler, and for NVTX if there is a CUDA GPU.

    Args:
        name: Name of the range in profilers.
    """
    depth = len(_stack())
    _open(name, None)
    try:
        yield
    finally:
        _close_down_to(depth)


def serving(op: Op, kernels: KernelSettings | None, *tensors: Tensor | None) -> str:
    """Return the name of the backend that serves a call; ``"refused"`` where it raises `KernelUnavailable`.

    Args:
        op: The op.
        kernels: Setting of the model; None for the setting of this thread.
        tensors: All tensors of the call.
    """
    try:
        fused = serves(op, kernels, *tensors)
    except KernelUnavailable:
        return "refused"
    first = tensors[0]
    return (op.backend_for(first.device.type) if fused and first is not None else None) or EAGER


# Modules


@dataclass
class _Hooks:
    """The hooks of one module, which are registered while any block needs them."""

    module: nn.Module
    name: str
    blocks: int = 0
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def open(self) -> None:
        self.blocks += 1
        if self.blocks == 1:
            self.handles = [
                self.module.register_forward_pre_hook(self._before),
                self.module.register_forward_hook(self._after, always_call=True),
            ]

    def close(self) -> bool:
        """Leave a block; return whether no other block needs the hooks."""
        self.blocks -= 1
        if self.blocks == 0:
            for handle in self.handles:
                handle.remove()
        return self.blocks == 0

    def _before(self, module: nn.Module, arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            _open(self.name, module)

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = _stack()
        # Called after errors too, even where the range was not opened yet.
        place = next((index for index in reversed(range(len(stack))) if stack[index].owner is module), None)
        if place is not None:
            _close_down_to(place)


# Ops


class _WrappedOps:
    """Replacements of the functions ``ops.<name>`` that open a range; they are installed while any block needs them."""

    def __init__(self) -> None:
        self.blocks = 0
        self.originals: dict[str, Any] = {}

    def open(self) -> None:
        self.blocks += 1
        if self.blocks == 1:
            self.originals = {name: getattr(ops, name) for name in OPS}
            for name, op in OPS.items():
                setattr(ops, name, _in_range(op))

    def close(self) -> None:
        self.blocks -= 1
        if self.blocks == 0:
            for op, function in self.originals.items():
                setattr(ops, op, function)
            self.originals = {}


def _in_range(op: Op) -> Callable[..., Any]:
    function = op.function
    signature = inspect.signature(function)
    names = [name for name, each in signature.parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        tensors = [*arguments, *(options.get(name) for name in names[len(arguments) :])]
        valid = isinstance(tensors[0], Tensor) and all(isinstance(each, Tensor | None) for each in tensors)
        if torch.compiler.is_compiling() or not valid:  # the function itself reports what is wrong
            return function(*arguments, **options)
        with named_range(f"{op.name} [{serving(op, options.get('kernels'), *tensors)}]"):
            return function(*arguments, **options)

    return call


# Ranges


class _Range:
    """An open range of this thread."""

    def __init__(self, name: str, owner: nn.Module | None) -> None:
        self.owner = owner
        self._nvtx = _has_nvtx()
        self._record = record_function(name)
        self._record.__enter__()
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)

    def close(self) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
        self._record.__exit__(None, None, None)


@functools.cache
def _has_nvtx() -> bool:
    return torch.cuda.is_available()


def _stack() -> list[_Range]:
    """Return the open ranges of this thread."""
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    stack: list[_Range] = _thread.stack
    return stack


def _open(name: str, owner: nn.Module | None) -> None:
    _stack().append(_Range(name, owner))


def _close_down_to(depth: int) -> None:
    stack = _stack()
    while len(stack) > depth:
        stack.pop().close()


def _title(module: nn.Module) -> str | None:
    return next((title for kind, title in TITLES.items() if isinstance(module, kind)), None)


_lock = threading.Lock()
_thread = threading.local()
_hooked: dict[nn.Module, _Hooks] = {}
_wrapped_ops = _WrappedOps()
