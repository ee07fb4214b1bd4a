"""Count the bytes and FLOPs of eager PyTorch, operation by operation, on tensors without data.

A tensor of the meta device has a shape and no memory, so that images of any size take no time. The operations that
PyTorch would run on a GPU are recorded one at a time. Views move no bytes. An operation reads each input once (of an
expanded tensor only the stored numbers) and writes each result once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import savl
from benchmarks.peers import sdpa
from savl import ops
from savl.ops.op import OPS, Op

BF16 = {"dtype": torch.bfloat16, "device": "meta"}
NOTHING_WRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
NOTHING_READ = ("zeros_like", "ones_like", "full_like", "new_zeros", "fill_", "zero_")


@dataclass(frozen=True)
class Step:
    """One operation."""

    name: str
    bytes: float
    flops: float
    shape: tuple[int, ...]
    detail: tuple[bool, bool] = (False, False)
    """For window attention: whether there is a severity map, and whether windows are shifted."""

    def facts(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        return {
            "op": self.name.removeprefix("aten."),
            "shape": list(self.shape),
            "bytes": self.bytes,
            "flops": self.flops,
        }

    def seconds(self, bytes_per_second: float, flops: float) -> float:
        """Return the minimum time in seconds on a GPU with these bytes and FLOPs per second."""
        return max(self.bytes / bytes_per_second, self.flops / flops)


@dataclass
class RecordedOperations(TorchDispatchMode):
    """Records operations while it is entered.

    Attributes:
        steps: Operations in order.
        peak: Largest number of bytes in tensors that were created meanwhile.
    """

    steps: list[Step] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._held = 0

    @property
    def bytes(self) -> float:
        """Bytes that all steps move."""
        return sum(step.bytes for step in self.steps)

    @property
    def launches(self) -> int:
        """Number of steps, each of which launches at least one kernel."""
        return len(self.steps)

    def seconds(self, bytes_per_second: float, flops: float) -> float:
        """Return the minimum time of all steps in seconds, one after the other."""
        return sum(step.seconds(bytes_per_second, flops) for step in self.steps)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record an operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        results = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        known = {each.untyped_storage()._cdata for each in given}
        new = [each for each in results if each.untyped_storage()._cdata not in known]
        written = [each for each in given if _is_written(func, args, each)]
        for each in new:
            self._hold(each)
        packet = func._schema.name.split("::")[1]
        if packet in NOTHING_WRITTEN or not (new or written):
            return out
        flops = 0.0
        if func._overloadpacket in flop_registry:
            flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        distinct = {id(each): each for each in given}.values()
        read = [] if packet in NOTHING_READ else distinct
        moved = sum(map(bytes_of, read)) + sum(map(bytes_of, [*new, *written]))
        name = func._schema.name.replace("::", ".")
        attends = name == "savl.window_attention"
        detail = (args[2] is not None, args[12:14] != (0, 0)) if attends else (False, False)
        self.steps.append(Step(name, float(moved), flops, tuple((new or written)[0].shape), detail))
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self._held -= size


def _is_written(func: Any, args: Any, tensor: Tensor) -> bool:
    marked = (argument.alias_info for argument in func._schema.arguments)
    return any(
        info is not None and info.is_write and given is tensor for info, given in zip(marked, args, strict=False)
    )


def bytes_of(tensor: Tensor) -> int:
    """Return the stored bytes of a tensor, in which an expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def record(call: Callable[[], object]) -> RecordedOperations:
    """Return the operations of a call."""
    recorded = RecordedOperations()
    with recorded:
        call()
    return recorded


def window(side: int, backward: bool = False, sdpa_peer: bool = False) -> RecordedOperations:
    """Record window attention of savl-base with shift 8 and severity.

    Args:
        side: Side of the image in tokens.
        backward: Whether gradients are computed too.
        sdpa_peer: Whether to use `benchmarks.peers.sdpa` in place of the reference, counting its attention as bytes.
    """
    qkv, table, severity = (
        torch.empty(shape, **BF16, requires_grad=backward)
        for shape in ((1, side, side, 432), (961, 6), (1, side, side))
    )

    def call() -> None:
        if sdpa_peer:
            with attention_without_work():
                options = {"padded_head_dim": 32, "backend": sdpa.SDPBackend.EFFICIENT_ATTENTION}
                sdpa.window_attention(qkv, table, severity, window=16, shift=8, **options)
            return
        out = ops.window_attention(qkv, table, severity, window=16, shift=8, kernels=ops.KernelSettings.of(False))
        if backward:
            torch.autograd.grad(out, (qkv, table, severity), torch.empty_like(out))

    return record(call)


def overlapping(side: int) -> RecordedOperations:
    """Record overlapping attention of savl-base: 24×24 keys for 16×16 queries."""
    q, kv, table = (torch.empty(shape, **BF16) for shape in ((1, side, side, 144), (1, side, side, 288), (39**2, 6)))
    eager = ops.KernelSettings.of(False)
    return record(lambda: ops.overlapping_window_attention(q, kv, table, window=16, key_window=24, kernels=eager))


def posterior(side: int, noise: bool = False) -> RecordedOperations:
    """Record the posterior of a field with 64 channels."""
    fields = [torch.empty(1, 64, side, side, **BF16) for _ in range(3 if noise else 2)]
    return record(lambda: ops.gaussian_posterior(*fields, kernels=ops.KernelSettings.of(False)))


def modulation(side: int) -> RecordedOperations:
    """Record the modulation of savl-base."""
    attended, gamma, residual = (torch.empty(1, side, side, 144, **BF16) for _ in range(3))
    eager = ops.KernelSettings.of(False)
    return record(lambda: ops.channel_modulation(attended, gamma, None, residual, kernels=eager))


@torch.no_grad()
def network(side: int, fused: bool) -> RecordedOperations:
    """Record the forward pass of savl-base.

    Args:
        side: Side of the image in pixels.
        fused: Whether to use the fused ops, each a single step, in place of the references.
    """
    with torch.device("meta"):
        model = savl.build("savl-base").eval().to(torch.bfloat16)
    lr = torch.empty(1, 3, side, side, **BF16)
    if fused:
        with fused_everywhere():
            return record(lambda: model(lr))
    with savl.use_fused_kernels(False):
        return record(lambda: model(lr))


@contextmanager
def fused_everywhere() -> Iterator[None]:
    """Let the kernels for GPUs serve on any device, within their limits.

    On meta tensors they return tensors of the right shape.
    """

    def serves(op: Op, kernels: ops.KernelSettings | None, *tensors: Tensor | None) -> bool:
        backend = op.backend_for("cuda")
        limit = None if backend is None else op.backends[backend]
        return backend is not None and (limit is None or limit(*tensors) is None)

    with ExitStack() as replaced:
        for op in OPS.values():
            replaced.enter_context(_replaced(import_module(op.function.__module__), {"serves": serves}))
        yield


@contextmanager
def attention_without_work() -> Iterator[None]:
    """Let SDPA of `benchmarks.peers.sdpa` count as one operation that reads its inputs and writes its result."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **_: Any) -> Tensor:
        out: Tensor = torch.ops.savl_traffic.attention(q, k, v, attn_mask)
        return out

    with _replaced(sdpa.F, {"scaled_dot_product_attention": attend}):
        yield


@torch.library.custom_op("savl_traffic::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(q)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@contextmanager
def _replaced(where: Any, by: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(where, name) for name in by}
    for name, function in by.items():
        setattr(where, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(where, name, function)
