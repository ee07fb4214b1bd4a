"""CUDA graphs: record the pass over a tile once per shape and replay it, so that the CPU need not launch its kernels.

A network of this family launches more than a thousand small kernels per tile. With a fast GPU and tiles of a few
hundred pixels a side, the CPU cannot launch them as fast as the GPU runs them. A replay launches all of them at once.

A graph is fixed at capture: shapes, addresses of weights and buffers, the kernels used, and all Python code in between
(hooks of modules run only at capture). `launch_state` describes the settings that may change afterwards, and must be
part of every key.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from savl.ops.scopes import current_settings
from savl.out_of_memory import is_out_of_memory

MAX_GRAPHS = 16
"""Maximum number of graphs in a `GraphCache`. The tiles of an image have up to nine shapes (corners, edges, interior),
or up to sixteen if the last row or column of tiles is narrower than the context of the tiles before it."""

WARM_UPS = 2
"""Passes before a capture. At the first launches, Triton compiles, cuDNN chooses algorithms and libraries are loaded,
which is not allowed during a capture."""

_capturing = threading.Lock()  # torch allows only one capture at a time in a process


class Capture(Protocol):
    """Interface for recording and replaying: `CudaCapture`, or a substitute in tests without a GPU."""

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Record ``function``.

        Returns:
            A function that replays the recording, and the tensor that holds the result after each replay.
        """

    def release(self) -> None:
        """Free the memory that the recordings shared. None of them may be replayed afterwards."""


class CudaCapture:
    """Record CUDA graphs that share one memory pool, so that together they need about as much as the largest one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # its type has no public name
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Run ``function`` a few times on a side stream, then capture it.

        Other threads may use the GPU at the same time, except its random number generator.

        Raises:
            Exception: Whatever ``function`` raises, most often because memory ran out.
            RuntimeError: ``function`` does something that a graph cannot contain, such as waiting for the GPU.
        """
        with _capturing, torch.cuda.device(self.device):
            if self._streams is None:  # kept, because cuBLAS allocates a workspace for every stream it has seen
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
            # torch.cuda.graph does not restore the stream if the capture fails; torch.cuda.stream does.
            # thread_local: other threads may allocate memory during the capture.
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
            failure = failure or error  # the first error is the reason; ending a broken capture raises another one
        if failure is None:
            return graph.replay, output
        try:
            if is_out_of_memory(failure):
                raise failure
            raise RuntimeError(
                f"cuda_graph: the network cannot be captured; use cuda_graph=False ({failure})"
            ) from failure
        finally:
            del failure  # its traceback refers to this frame, and would keep the tensors of the failed call alive

    def release(self) -> None:
        """Drop the memory pool; torch frees it together with the last graph in it."""
        self._pool = None
        torch.cuda.empty_cache()


class CapturedCall:
    """A recorded function with the buffers it reads from and writes to."""

    def __init__(self, capture: Capture, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Record ``function(*inputs)``; arguments as for `GraphCache.run`."""
        self.size = sum(tensor.numel() for tensor in inputs)
        # Outside inference mode, because later calls in any mode write to the buffers.
        with torch.inference_mode(False), torch.no_grad():
            buffers = [torch.empty(tensor.shape, dtype=torch.float32, device=capture.device) for tensor in inputs]
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor)
            self._replay, self._output = capture.record(lambda: function(*buffers))
        self._buffers = buffers

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Replay the recording on other values, wait for it, and return a copy of the result on the CPU."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer, tensor in zip(self._buffers, inputs, strict=True):
                buffer.copy_(tensor)
            self._replay()
            return torch.empty(self._output.shape, dtype=self._output.dtype, device="cpu").copy_(self._output)


class GraphCache:
    """Recordings by key; the least recently used one is dropped when there are too many.

    The recordings share memory, so only one runs at a time: threads wait for each other until the result is on the CPU.
    A recording with more pixels than all before it would not fit into the blocks of the pool, and would enlarge the
    pool by nearly its own size. All others are therefore dropped first, together with the pool. Run large shapes first.
    """

    def __init__(self, capture: Capture, limit: int = MAX_GRAPHS) -> None:
        """Create an empty cache.

        Args:
            capture: Records and replays functions.
            limit: Maximum number of recordings, at least 1.
        """
        self._capture = capture
        self._limit = limit
        self._calls: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self._calls)

    def run(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        unchanged: Callable[[], bool] = lambda: True,
    ) -> Tensor:
        """Compute ``function(*inputs)`` by replaying the recording for ``key``, which is made first if there is none.

        If memory runs out while recording, all other recordings are dropped, and recording is tried once more.

        Args:
            key: Everything that ``function`` depends on, except the values of its inputs: their shapes and
                `launch_state`.
            function: Maps tensors on the device to one tensor on the device. It is not called if there is a recording.
            inputs: Tensors on any device; they are copied into float32 buffers.
            unchanged: Return whether ``key`` still describes the settings; called after recording. If another thread
                changed the settings meanwhile, the recording is used for this call but not kept.

        Returns:
            The result on the CPU, as a new tensor.

        Raises:
            Exception: Whatever ``function`` raises, most often because memory ran out. The cache is then empty.
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
        """Drop all recordings and free their memory."""
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
        # Outside the except block, whose traceback keeps the tensors of the failed call alive.
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
    """Return everything, except shapes, that determines which kernels a pass of ``model`` launches on which weights.

    This comprises the kernel settings of this thread and of the model, the addresses of all weights and buffers,
    whether the model is in training mode, and torch's settings of precision and determinism. Moving the model or giving
    it other tensors changes the state; changing weights in place does not.
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
