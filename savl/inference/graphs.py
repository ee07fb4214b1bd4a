"""Upscale tiles with CUDA graphs: record the forward pass once for each tile shape, and replay it for other tiles.

The network launches more than a thousand small kernels per tile. On a fast GPU, with tiles of a few hundred pixels a
side, the CPU needs more time to launch these kernels than the GPU needs to run them. A replay launches all of them at
once.

A capture fixes the shapes, the addresses of weights and buffers, and the kernels. Python code, such as hooks of
modules, runs during the capture only, not during a replay. `GraphCache` finds a graph by its key. `launch_state`
describes everything except shapes that may change after a capture; every key must contain it.
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
"""Maximum number of graphs in a `GraphCache`. The tiles of an image have up to nine shapes (corners, edges, interior).
If the last row and column of tiles are narrower than the context that the network reads around a tile, there are up to
sixteen shapes."""

WARM_UPS = 2
"""Number of passes before a capture, unless the function has run before. During the first passes, Triton compiles
kernels, cuDNN chooses algorithms and libraries are loaded. None of this is allowed during a capture."""

_capturing = threading.Lock()  # torch allows only one capture at a time in a process


class Capture(Protocol):
    """Interface of an object that records functions: `CudaCapture`, or a substitute in tests without a GPU."""

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""

    def record(self, function: Callable[[], Tensor], warm_ups: int = WARM_UPS) -> tuple[Callable[[], object], Tensor]:
        """Record ``function`` after ``warm_ups`` calls of it.

        Returns:
            A function that replays the recording, and the tensor that holds the result after each replay.
        """

    def release(self) -> None:
        """Free the memory that the recordings share. No recording may be replayed afterwards."""


class CudaCapture:
    """Record CUDA graphs that share one memory pool. Together, they need about as much memory as the largest graph."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # its type has no public name
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def record(self, function: Callable[[], Tensor], warm_ups: int = WARM_UPS) -> tuple[Callable[[], object], Tensor]:
        """Run ``function`` ``warm_ups`` times on a side stream, then capture it.

        Other threads may use the GPU during the recording, but not its random number generator.

        Raises:
            Exception: An exception of ``function``, such as ``torch.OutOfMemoryError``.
            RuntimeError: ``function`` contains an operation that cannot be captured, such as a synchronization.
        """
        with _capturing, torch.cuda.device(self.device):
            if self._streams is None:  # reused, because cuBLAS allocates a workspace for every new stream
                self._streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side, stream = self._streams
            current = torch.cuda.current_stream(self.device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(warm_ups):
                    function()
            current.wait_stream(side)
            return self._capture(function, stream)

    def _capture(
        self, function: Callable[[], Tensor], stream: torch.cuda.Stream
    ) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            # torch.cuda.stream restores the current stream if the capture fails; torch.cuda.graph does not.
            # The error mode "thread_local" lets other threads allocate memory during the capture.
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
            failure = failure or error  # keep the first error: the end of a failed capture raises a second one
        if failure is None:
            return graph.replay, output
        try:
            if is_out_of_memory(failure):
                raise failure
            raise RuntimeError(
                f"the network cannot be captured as a CUDA graph; use cuda_graph=False ({failure})"
            ) from failure
        finally:
            del failure  # its traceback refers to this frame, and would keep the tensors of the failed call alive

    def release(self) -> None:
        """Release the memory pool. PyTorch frees it when its last graph is deleted."""
        self._pool = None
        torch.cuda.empty_cache()


class CapturedCall:
    """A recorded function with the buffers it reads from and writes to."""

    def __init__(
        self, capture: Capture, function: Callable[..., Tensor], inputs: Sequence[Tensor], warm_ups: int = WARM_UPS
    ) -> None:
        """Record ``function(*inputs)``. For the arguments, see `GraphCache.run`."""
        self.size = sum(tensor.numel() for tensor in inputs)
        # The buffers must not be inference tensors, because calls outside inference mode also write to them.
        with torch.inference_mode(False), torch.no_grad():
            buffers = [torch.empty(tensor.shape, dtype=torch.float32, device=capture.device) for tensor in inputs]
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor)
            self._replay, self._output = capture.record(lambda: function(*buffers), warm_ups)
        self._buffers = buffers

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Replay the recording with the values of ``inputs``, and return a copy of the result on the CPU."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer, tensor in zip(self._buffers, inputs, strict=True):
                buffer.copy_(tensor)
            self._replay()
            return torch.empty(self._output.shape, dtype=self._output.dtype, device="cpu").copy_(self._output)


class GraphCache:
    """Cache of recordings. If it is full, the least recently used recording is deleted.

    The recordings share memory. Only one of them can therefore run at a time, and a thread must wait until the result
    of the thread before it is on the CPU.

    A recording with more input elements than all recordings in the cache does not fit into the memory blocks of the
    pool, and would enlarge the pool by nearly the memory that it needs. All recordings and the pool are therefore
    deleted first. To avoid this, run the largest shapes first.
    """

    def __init__(self, capture: Capture, limit: int = MAX_GRAPHS) -> None:
        """Create an empty cache.

        Args:
            capture: The object that records functions.
            limit: Maximum number of recordings, at least 1.
        """
        self._capture = capture
        self._limit = limit
        self._calls: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self._calls)

    def __contains__(self, key: object) -> bool:
        """Return whether there is a recording for ``key``."""
        return key in self._calls

    def run(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        key_is_current: Callable[[], bool] = lambda: True,
        warm_ups: int = WARM_UPS,
    ) -> Tensor:
        """Compute ``function(*inputs)`` by replaying the recording for ``key``. If there is none, record it first.

        If memory runs out while recording, all other recordings are deleted, and recording is tried once more.

        Args:
            key: Everything that the result of ``function`` depends on, except the values of the inputs: at least their
                shapes and `launch_state`.
            function: Function from tensors on the device to one tensor on the device. It is called only if there is no
                recording for ``key``.
            inputs: Tensors on any device. They are copied into float32 buffers.
            key_is_current: Function that returns whether ``key`` still describes the settings. It is called after
                recording. If another thread has changed the settings during the recording, the recording is used for
                this call but not kept.
            warm_ups: Number of calls of ``function`` before it is recorded. 0 is enough if it has been called with
                tensors of the same shapes and with the same settings.

        Returns:
            The result on the CPU, as a new tensor.

        Raises:
            Exception: An exception of ``function``, such as ``torch.OutOfMemoryError``. The cache is then empty.
        """
        with self._lock:
            call = self._calls.get(key)
            if call is None:
                call = self._record(function, inputs, warm_ups)
                if key_is_current():
                    self._calls[key] = call
            else:
                self._calls.move_to_end(key)
            return call(inputs)

    def clear(self) -> None:
        """Delete all recordings and free their memory."""
        with self._lock:
            self._delete_all()

    def _record(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], warm_ups: int) -> CapturedCall:
        size = sum(tensor.numel() for tensor in inputs)
        if self._calls and size > max(call.size for call in self._calls.values()):
            self._delete_all()
        while len(self._calls) >= self._limit:
            self._calls.popitem(last=False)
        try:
            return CapturedCall(self._capture, function, inputs, warm_ups)
        except Exception as error:
            was_empty = not self._calls
            self._delete_all()
            if was_empty or not is_out_of_memory(error):
                raise
        # This code is not in the except block, because the traceback there keeps the tensors of the failed call alive.
        self._capture.release()
        try:
            return CapturedCall(self._capture, function, inputs, warm_ups)
        except Exception:
            self._delete_all()
            raise

    def _delete_all(self) -> None:
        self._calls.clear()
        self._capture.release()


def launch_state(model: nn.Module) -> Hashable:
    """Return everything except shapes that determines the kernels and addresses of a forward pass of ``model``.

    The state consists of the kernel settings of this thread and of the model, the addresses of all weights and buffers,
    the training mode, and PyTorch's settings of precision and determinism. It changes if the model is moved or its
    tensors are replaced. It does not change if weights are modified in place.
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
