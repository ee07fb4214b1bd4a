"""The interface of an adapter, which knows the blocks of one family of networks, and the class of an accelerated block.

`savl.accelerate.apply` changes the class of a block to a subclass of its own class that inherits from `Accelerated`.
The subclass overrides ``forward`` and pickling. Parameters, buffers, the names in a state dict, hooks and the mode of
the block are not touched. `Accelerated.forward` falls back to the original ``forward`` where the
adapter or the setting of the kernels says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from savl.ops import KernelSettings
from savl.ops.op import Op
from savl.ops.scopes import explicit_settings
from savl.ops.switch import serves
from savl.ops.window_attention import WINDOW_ATTENTION

FUSED = KernelSettings.of(True)
"""The setting of accelerated blocks where neither the model, nor a ``with`` block, nor the process has another one."""

Arguments = tuple[Any, ...]


class Adapter(ABC):
    """What savl knows about a kind of block: how to recognise it, how to try it, and how to compute it.

    An adapter has no state: it reads everything from the block at every call. Tensors that are derived from parameters
    are cached on the block by `keep`.
    """

    name: str
    """Identifier of the adapter, unique."""
    title: str
    """What it serves, in the words of a report."""
    op: Op = WINDOW_ATTENTION
    """The op without whose fused kernel a call is left to the original ``forward``."""
    irrelevant: frozenset[str] = frozenset({"drop_prob", "input_resolution"})
    """Names of attributes, of the block and inside it, that change neither what it computes in the verification nor
    its label, such as its number in the network. Blocks that differ in nothing else are verified together."""
    features: int = 2
    """Number of arguments, from the first on, that may be features and need gradients. Later ones are masks and
    indices."""
    is_layer: bool = False
    """Whether it serves single layers, in networks with other blocks that are served."""

    @abstractmethod
    def matches(self, block: Any) -> bool:
        """Return whether a module has the structure of this kind of block: attributes, their types and shapes."""

    @abstractmethod
    def refusal(self, block: Any, network: nn.Module) -> str | None:
        """Return why a block that matches cannot be computed by savl's ops; None if it can.

        Args:
            block: The block.
            network: The network that contains it, which may hold index buffers that the block is called with.
        """

    @abstractmethod
    def label(self, block: Any) -> str:
        """Return the sizes of a block for the report, such as ``"window 8, shift 4, 6 heads of 30"``."""

    @abstractmethod
    def example(
        self, block: Any, network: nn.Module, generator: torch.Generator, batch: int, rows: int, columns: int
    ) -> Arguments:
        """Draw arguments of the block's ``forward``, for the verification.

        Args:
            block: The block.
            network: The network that contains it.
            generator: Generator of the numbers.
            batch: Number of images.
            rows: Height of the image in windows, or, if the block pads images itself, a number that its height grows
                with.
            columns: Width of the image, likewise.

        Returns:
            The positional arguments. Floating-point tensors are float64 on the CPU; the caller converts and moves them.
        """

    def why_not(self, block: Any, *args: Any, **kwargs: Any) -> str | None:
        """Return why a call must be computed by the original ``forward``; None if `forward` can compute it."""
        return None

    @abstractmethod
    def forward(self, block: Any, kernels: KernelSettings, *args: Any, **kwargs: Any) -> Any:
        """Compute what the block's original ``forward`` computes, with savl's ops."""


ADAPTERS: dict[str, Adapter] = {}
"""The adapters by name, in the order in which they are tried."""


def register(adapter: Adapter) -> Adapter:
    """Add an adapter to `ADAPTERS`."""
    ADAPTERS[adapter.name] = adapter
    return adapter


@dataclass
class Calls:
    """Counts of the calls of a block outside of compiled programs."""

    served: int = 0
    fallen_back: Counter[str] = field(default_factory=Counter)
    """Calls that the original ``forward`` computed, by reason."""


class Accelerated:
    """The first base class of accelerated blocks, before the original class of the block."""

    _savl_adapter: Adapter
    _savl_original: type[nn.Module]
    _savl_types: tuple[type, ...]
    _savl_calls: Calls
    kernels: KernelSettings | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block with savl's ops, or with the original ``forward``."""
        block: Any = self
        kernels = self.kernels or explicit_settings() or FUSED
        adapter = self._savl_adapter
        reason = _why_changed(block) or _why_not_fused(adapter.op, kernels, args)
        reason = reason or adapter.why_not(block, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self._count(reason)
        if reason is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return adapter.forward(block, kernels, *args, **kwargs)

    def _count(self, reason: str | None) -> None:
        calls = self.__dict__.get("_savl_calls")
        if calls is None:  # a copy of a block, which has no report
            return
        if reason is None:
            calls.served += 1
        else:
            calls.fallen_back[reason] += 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy the block by the name of its adapter: its class cannot be imported."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_savl_calls", "_savl_kept")}
        return _rebuild, (self._savl_adapter.name, self._savl_original), state


def _rebuild(adapter: str, original: type[nn.Module]) -> nn.Module:
    import savl.accelerate.apply  # noqa: F401  (registers the adapters)

    kind = accelerated_class(adapter, original)
    block: nn.Module = kind.__new__(kind)
    return block


_classes: dict[tuple[str, type], type] = {}


def accelerated_class(adapter: str, original: type) -> Any:
    """Return the subclass of a block's class that an adapter computes, always the same one."""
    if (adapter, original) in _classes:
        return _classes[adapter, original]
    attributes = {
        "_savl_adapter": ADAPTERS[adapter],
        "_savl_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return _classes.setdefault((adapter, original), type(original.__name__, (Accelerated, original), attributes))


def inner_types(block: nn.Module) -> tuple[type, ...]:
    """Return the types of the modules inside a block."""
    return tuple(type(module) for module in block.modules())[1:]


def _why_changed(block: Any) -> str | None:
    """Return why the modules inside a block must run themselves, such as hooks; None if they need not."""
    inside = list(block.modules())[1:]
    if tuple(type(module) for module in inside) != block._savl_types:
        return "a module inside was replaced"
    for module in inside:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "a module inside has hooks"
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return "dropout is active"
    return None


def _why_not_fused(op: Op, kernels: KernelSettings, args: Arguments) -> str | None:
    if torch._C._get_tracing_state() is not None:
        return "the call is traced"
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or not serves(op, kernels, *tensors):
        return "no fused kernel serves the setting, device or dtype"
    return None


def keep(block: nn.Module, name: str, sources: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """Return a tensor that is computed from parameters, and keep it on a CPU in evaluation mode without gradients.

    It is computed again once a source has changed. The sources are compared with copies of them, because a change by
    way of ``parameter.data``, as in moving averages of weights, leaves no other trace. On a GPU a comparison would make
    the CPU wait, so that the tensor is computed at every call there.

    Args:
        block: The block that keeps it.
        name: Its name in the block.
        sources: The parameters and buffers that it depends on.
        compute: Computes it.
    """
    if block.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute()
    if any(source.device.type != "cpu" for source in sources):
        return compute()
    kept = block.__dict__.setdefault("_savl_kept", {})
    copies, value = kept.get(name, ((), None))
    if value is None or not all(map(_equal, copies, sources)):
        with torch.autocast("cpu", enabled=False):  # calls without autocast will have it too
            value = compute()
        kept[name] = (tuple(source.detach().clone() for source in sources), value)
    found: Tensor = value
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
