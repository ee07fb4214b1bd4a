"""CUDA graphs: a pass over a tile recorded once per shape and replayed, so that the CPU need not launch its kernels.

A network of this family launches a thousand and more small kernels a tile. On a fast GPU, and with tiles of a few
hundred pixels a side, the CPU cannot launch them as fast as the GPU runs them; a replay launches all of them at once.

What a graph has fixed at capture and does not look at again: shapes, the addresses of weights and buffers, which
kernels serve, and all Python code in between (hooks of modules run at capture alone). `launch_state` sums up what may
change behind its back and belongs into every key.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from savl.ops.switch import current_settings
from savl.out_of_memory import is_out_of_memory

LIMIT = 16
"""Most graphs a `GraphCache` keeps. A tiled image has up to nine shapes of tiles (corners, edges, inside), and up to
sixteen where its last row or column of tiles is narrower than the context of the tiles before."""

WARM_UPS = 2
"""Passes before a capture: Triton compiles, cuDNN picks and libraries load at the first launch, none of which a capture
allows."""

_capturing = threading.Lock()  # torch allows one capture at a time in a process


class Capture(Protocol):
    """What records and replays: `CudaCapture`, or a stand-in where there is no GPU."""

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Record ``function``.

        Returns:
            What runs it again, and the tensor that then holds its result.
        """

    def release(self) -> None:
        """Give the memory back that recordings shared; none of them is replayed any more."""


class CudaCapture:
    """Records CUDA graphs that share one pool of memory, so that together they take about as much as the largest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # its type has no public name
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Run ``function`` a few times on a side stream, then capture it.

        Other threads may go on using the GPU meanwhile, but for its random generator.

        Raises:
            Exception: What ``function`` raises, lack of memory above all.
            RuntimeError: ``function`` does what a graph cannot hold, such as waiting for the GPU.
        """
        with _capturing, torch.cuda.device(self.device):
            if self._streams is None:  # the same ones every time: cuBLAS keeps a workspace for every stream it saw
                self._streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side, stream = self._streams
            current = torch.cuda.current_stream(self.device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function()
            current.wait_stream(side)
            return self._capture(function, stream)

    def _capture(
        self, function: Callable[[], Tensor], stream: torch.cuda.Stream
    ) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            # torch.cuda.graph does not come back from its stream when the capture ends in an error; this block does.
            # Errors of this thread alone: others may allocate memory while the capture lasts.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    output = function()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            failure = failure or error  # ending a broken capture fails too, which would hide the reason
        if failure is None:
            return graph.replay, output
        try:
            if is_out_of_memory(failure):
                raise failure
            raise RuntimeError(
                f"cuda_graph: the network cannot be captured; use cuda_graph=False ({failure})"
            ) from failure
        finally:
            del failure  # it would hold its traceback, that this frame, and all of them the failed tensors

    def release(self) -> None:
        """Leave the pool to torch, which frees it with the last graph in it."""
        self._pool = None
        torch.cuda.empty_cache()


class CapturedCall:
    """A recorded function with the buffers it reads from and writes to."""

    def __init__(self, capture: Capture, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Record ``function(*inputs)``; arguments as for `GraphCache.run`."""
        self.size = sum(tensor.numel() for tensor in inputs)
        with torch.inference_mode(False), torch.no_grad():  # later calls write to the buffers in whatever mode they are
            buffers = [torch.empty(tensor.shape, dtype=torch.float32, device=capture.device) for tensor in inputs]
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor)
            self._replay, self._output = capture.record(lambda: function(*buffers))
        self._buffers = buffers

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run it on other values. Returns a copy of the result on the CPU, for which it waits."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer, tensor in zip(self._buffers, inputs, strict=True):
                buffer.copy_(tensor)
            self._replay()
            return torch.empty(self._output.shape, dtype=self._output.dtype, device="cpu").copy_(self._output)


class GraphCache:
    """Recordings by key, the least recently used of them dropped.

    They share memory, so one runs at a time: threads wait for each other, from the inputs going in until the result is
    on the CPU. A recording of more pixels than all before it would find no block of the pool large enough and make it
    grow by nearly its own size; so the others are dropped first, and the pool with them. Ask for large shapes first.
    """

    def __init__(self, capture: Capture, limit: int = LIMIT) -> None:
        """Start empty.

        Args:
            capture: What records.
            limit: Most recordings that are kept, at least 1.
        """
        self._capture = capture
        self._limit = limit
        self._calls: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Recordings there are."""
        return len(self._calls)

    def run(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        unchanged: Callable[[], bool] = lambda: True,
    ) -> Tensor:
        """Compute ``function(*inputs)`` by replaying the recording of ``key``, which is made if there is none.

        Where memory runs out in making it, all others are dropped and it is tried once more.

        Args:
            key: All that ``function`` depends on but the values of its inputs: their shapes, `launch_state`.
            function: Tensors on the device to one tensor there. Not called where the recording exists.
            inputs: Tensors on any device; they are copied into float32 buffers.
            unchanged: Whether ``key`` still says the truth, asked after a recording was made. One made while another
                thread changed the settings serves this call and is not kept.

        Returns:
            The result on the CPU, a tensor of its own.

        Raises:
            Exception: What ``function`` raises, lack of memory above all; there are no recordings then.
        """
        with self._lock:
            call = self._calls.get(key)
            if call is None:
                call = self._record(function, inputs)
                if unchanged():
                    self._calls[key] = call
            else:
                self._calls.move_to_end(key)
            return call(inputs)

    def clear(self) -> None:
        """Drop all recordings and give their memory back."""
        with self._lock:
            self._drop_all()

    def _record(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> CapturedCall:
        size = sum(tensor.numel() for tensor in inputs)
        if self._calls and size > max(call.size for call in self._calls.values()):
            self._drop_all()
        while len(self._calls) >= self._limit:
            self._calls.popitem(last=False)
        try:
            return CapturedCall(self._capture, function, inputs)
        except Exception as error:
            alone = not self._calls
            self._drop_all()
            if alone or not is_out_of_memory(error):
                raise
        # Out of the except block: its traceback would keep the failed tensors alive.
        self._capture.release()
        try:
            return CapturedCall(self._capture, function, inputs)
        except Exception:
            self._drop_all()
            raise

    def _drop_all(self) -> None:
        self._calls.clear()
        self._capture.release()


def launch_state(model: nn.Module) -> Hashable:
    """All that decides which kernels a pass of ``model`` launches, and on what weights, but the shapes.

    The fused kernels in force in this thread and those of the model itself; where its weights are, so that one that was
    moved or given other tensors is another while weights changed in place are the same; evaluation or training; torch's
    settings of precision and determinism.
    """
    kernels: list[object] = []
    addresses: list[int] = []
    for module in model.modules():
        kernels.append(vars(module).get("kernels"))
        tensors = chain(module.parameters(recurse=False), module.buffers(recurse=False))
        addresses += [tensor.data_ptr() for tensor in tensors]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    numerics = (
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
    return current_settings(), tuple(kernels), tuple(addresses), model.training, numerics
