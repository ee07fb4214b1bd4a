"""Tests of the cache of CUDA graphs without a GPU: keys, memory, threads, and changes that need a new recording."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import savl
from savl.inference.graphs import WARM_UPS, CudaCapture, GraphCache, launch_state
from savl.network import SAVL


class Recorder:
    """Substitute for `CudaCapture` that replays by computing again, and counts recordings and replays.

    It fails if two replays overlap, or if a released recording is replayed.
    """

    def __init__(self, fails: Callable[[], Exception | None] = lambda: None, seconds: float = 0.0) -> None:
        self.device = torch.device("cpu")
        self.recorded = self.replayed = self.released = 0
        self._fails = fails
        self._seconds = seconds
        self._busy = threading.Lock()

    def record(self, function: Callable[[], Tensor], warm_ups: int = WARM_UPS) -> tuple[Callable[[], object], Tensor]:
        self.recorded += 1
        output = function().clone()
        if (failure := self._fails()) is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback would keep this frame and its tensors alive
        output.fill_(float("nan"))  # a capture computes nothing
        pool = self.released

        def replay() -> None:
            assert self._busy.acquire(blocking=False), "two replays at a time"
            assert pool == self.released, "its memory was released"
            time.sleep(self._seconds)
            output.copy_(function())
            self.replayed += 1
            self._busy.release()

        return replay, output

    def release(self) -> None:
        self.released += 1


def square(x: Tensor) -> Tensor:
    return x * x


def failing(*failures: Exception | None) -> Callable[[], Exception | None]:
    """Return a function whose calls return the given exceptions one after the other, and then None."""
    remaining = list(failures)
    return lambda: remaining.pop(0) if remaining else None


def never(x: Tensor) -> Tensor:
    raise AssertionError("there is a recording, it need not be called")


def test_a_key_is_recorded_once_and_replayed_with_other_values() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder)
    assert torch.equal(cache.run("key", square, [torch.tensor([1.0, 2.0])]), torch.tensor([1.0, 4.0]))
    assert torch.equal(cache.run("key", never, [torch.tensor([3.0, 4.0])]), torch.tensor([9.0, 16.0]))
    assert (recorder.recorded, recorder.replayed, len(cache)) == (1, 2, 1)


def test_each_key_has_its_own_recording() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder)
    cache.run("square", square, [torch.ones(3)])
    assert torch.equal(cache.run("double", lambda x: 2 * x, [torch.ones(3)]), torch.full((3,), 2.0))
    assert recorder.recorded == 2


def test_the_result_does_not_share_memory_with_the_replayed_buffer() -> None:
    cache = GraphCache(Recorder())
    first = cache.run("key", square, [torch.tensor([2.0])])
    cache.run("key", square, [torch.tensor([3.0])])
    assert first.item() == 4


def test_an_input_of_another_dtype_is_converted_to_float32() -> None:
    result = GraphCache(Recorder()).run("key", square, [torch.tensor([0.1], dtype=torch.float64)])
    assert torch.equal(result, torch.tensor([0.1]) ** 2)


def test_the_least_recently_used_recording_is_deleted() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder, limit=2)
    for key in "abac":  # b is dropped
        cache.run(key, square, [torch.ones(1)])
    assert (recorder.recorded, len(cache)) == (3, 2)
    cache.run("a", never, [torch.ones(1)])
    cache.run("b", square, [torch.ones(1)])
    assert (recorder.recorded, len(cache)) == (4, 2)


def test_a_larger_shape_deletes_all_recordings_and_a_smaller_shape_shares_the_pool() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder)
    cache.run("medium", square, [torch.ones(4)])
    cache.run("small", square, [torch.ones(2)])
    assert (recorder.released, len(cache)) == (0, 2)
    cache.run("large", square, [torch.ones(8)])
    assert (recorder.released, len(cache)) == (1, 1)
    cache.run("medium", square, [torch.ones(4)])
    assert (recorder.released, len(cache)) == (1, 2)


def test_concurrent_threads_get_their_own_results() -> None:
    cache = GraphCache(Recorder(seconds=0.002))
    values = [float(n) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: cache.run(n % 3, square, [torch.tensor([n])]).item(), values))
    assert results == [n * n for n in values]


def test_out_of_memory_deletes_other_recordings_and_retries_once() -> None:
    recorder = Recorder(failing(None, MemoryError()))
    cache = GraphCache(recorder)
    cache.run("other", square, [torch.ones(2)])
    assert cache.run("key", square, [torch.tensor([3.0])]).item() == 9
    assert (recorder.recorded, len(cache)) == (3, 1)
    assert recorder.released > 0


def test_tensors_of_a_failed_recording_are_freed_before_the_retry() -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def remember(x: Tensor) -> Tensor:
        alive.extend(tensor() is not None for tensor in held)
        held.append(weakref.ref(x))
        return x + 0

    cache = GraphCache(Recorder(failing(None, MemoryError())))
    cache.run("other", square, [torch.ones(2)])
    cache.run("key", remember, [torch.ones(1)])
    assert alive[:1] == [False]


@pytest.mark.parametrize("others", [0, 1])
def test_out_of_memory_is_raised_if_a_retry_cannot_help(others: int) -> None:
    recorder = Recorder(failing(*[None] * others, *[MemoryError()] * (1 + others)))
    cache = GraphCache(recorder)
    for other in range(others):
        cache.run(other, square, [torch.ones(2)])
    with pytest.raises(MemoryError):
        cache.run("key", square, [torch.ones(1)])
    assert (recorder.recorded, len(cache)) == (1 + 2 * others, 0)
    assert recorder.released > 0
    assert cache.run("key", square, [torch.ones(1)]).item() == 1, "it recovers"


def test_other_errors_are_raised_without_a_retry() -> None:
    recorder = Recorder(failing(None, RuntimeError("a bug")))
    cache = GraphCache(recorder)
    cache.run("other", square, [torch.ones(1)])
    with pytest.raises(RuntimeError, match="a bug"):
        cache.run("key", square, [torch.ones(1)])
    assert recorder.recorded == 2


def test_a_recording_is_not_kept_if_the_settings_changed_meanwhile() -> None:
    cache = GraphCache(Recorder())
    assert cache.run("key", square, [torch.tensor([3.0])], lambda: False).item() == 9
    assert len(cache) == 0


def test_recordings_work_inside_and_outside_inference_mode() -> None:
    for first, second in [(True, False), (False, True)]:
        cache = GraphCache(Recorder())
        for mode in (first, second):
            with torch.inference_mode(mode):
                assert cache.run("key", square, [torch.tensor([3.0])]).item() == 9


def test_clear_frees_the_memory() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder)
    cache.run("key", square, [torch.ones(1)])
    cache.clear()
    assert (recorder.released, len(cache)) == (1, 0)


@pytest.fixture
def model(small_config: Callable[..., Any]) -> SAVL:
    return SAVL(small_config()).eval()


def test_the_launch_state_does_not_change_with_in_place_weight_updates(model: SAVL) -> None:
    state = launch_state(model)
    with torch.no_grad():
        model.conv_first.weight.mul_(2)
    assert launch_state(model) == state
    assert hash(launch_state(model)) == hash(state)


def assign_weights(model: SAVL) -> None:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: savl.use_fused_kernels(True, model=model.groups[0]),
        lambda model: model.to(torch.float64),
        lambda model: model.train(),
        assign_weights,
    ],
    ids=["kernels", "dtype", "mode", "tensors"],
)
def test_the_launch_state_changes_with_the_model(model: SAVL, change: Callable[[SAVL], object]) -> None:
    before = launch_state(model)
    _kept = change(model)
    assert launch_state(model) != before


def test_the_launch_state_contains_the_kernel_settings_of_the_thread(model: SAVL) -> None:
    with savl.use_fused_kernels(False):
        eager = launch_state(model)
        with savl.use_fused_kernels(False, channel_modulation=True):
            assert launch_state(model) != eager
        assert launch_state(model) == eager


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "deterministic", True),
    ],
)
def test_the_launch_state_contains_precision_and_determinism_settings(
    model: SAVL, holder: Any, name: str, value: object
) -> None:
    before = launch_state(model)
    previous = getattr(holder, name)
    setattr(holder, name, value)
    try:
        assert launch_state(model) != before
    finally:
        setattr(holder, name, previous)
    assert launch_state(model) == before


class FakeCuda:
    """Substitute for the parts of torch.cuda that a capture uses. It stores the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end: str | None = None) -> None:
        self.events: list[str] = []
        events = self.events

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.name = "side" if "side" not in str(events) else "stream"
                events.append(f"new {self.name}")

            def wait_stream(self, other: Stream) -> None:
                pass

        class Entered:
            def __init__(self, name: str) -> None:
                self.name = name

            def __enter__(self) -> None:
                events.append(f"enter {self.name}")

            def __exit__(self, *error: object) -> None:
                events.append(f"exit {self.name}")

        class Graph(Entered):
            def __init__(self, graph: object, pool: object, stream: Stream, capture_error_mode: str) -> None:
                super().__init__(f"capture into {pool} on {stream.name}, errors {capture_error_mode}")

            def __exit__(self, *error: object) -> None:
                if end is not None:
                    raise RuntimeError(end)
                super().__exit__(*error)

        class CUDAGraph:
            def replay(self) -> None:
                events.append("replay")

        handles = iter(["pool 1", "pool 2"])
        current = Stream(torch.device("cpu"))
        events.clear()
        for name, fake in {
            "device": lambda device: nullcontext(),
            "Stream": Stream,
            "current_stream": lambda device: current,
            "stream": lambda stream: Entered(stream.name),
            "graph_pool_handle": lambda: next(handles),
            "graph": Graph,
            "CUDAGraph": CUDAGraph,
            "empty_cache": lambda: events.append("empty cache"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_warm_up_runs_on_a_side_stream_and_captures_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    events = FakeCuda(monkeypatch).events
    capture = CudaCapture(torch.device("cuda", 0))

    def compute() -> Tensor:
        events.append("compute")
        return torch.ones(1)

    warm = ["enter side", *["compute"] * WARM_UPS, "exit side"]
    replay, output = capture.record(compute)
    assert output.item() == 1
    replay()
    captured = "capture into pool 1 on stream, errors thread_local"
    first = [*warm, "enter stream", f"enter {captured}", "compute", f"exit {captured}", "exit stream"]
    assert events == ["new side", "new stream", *first, "replay"]
    events.clear()
    capture.record(compute)
    assert events == first, "the second capture has the streams and the pool of the first"
    capture.release()
    capture.record(compute)
    assert "enter capture into pool 2 on stream, errors thread_local" in events


@pytest.mark.parametrize("end", [None, "capture invalidated"])
def test_out_of_memory_in_a_capture_is_not_hidden_by_the_error_of_ending_it(
    monkeypatch: pytest.MonkeyPatch, end: str | None
) -> None:
    events = FakeCuda(monkeypatch, end).events
    calls = iter(range(WARM_UPS + 1))
    activations: list[weakref.ref[Tensor]] = []

    def compute() -> Tensor:
        activation = torch.ones(1)
        if next(calls) == WARM_UPS:
            activations.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return activation

    raised: str | None = None
    try:
        CudaCapture(torch.device("cuda", 0)).record(compute)
    except torch.OutOfMemoryError as error:
        raised = str(error)
    assert raised == "CUDA out of memory"
    assert activations[0]() is None, "the tensors of the failed capture are still there"
    assert events[-1] == "exit stream", "the thread is back on its own stream"


def test_an_operation_that_cannot_be_captured_raises_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, "operation not permitted when stream is capturing")
    with pytest.raises(
        RuntimeError, match=r"cannot be captured as a CUDA graph; use cuda_graph=False \(operation not permitted"
    ):
        CudaCapture(torch.device("cuda", 0)).record(lambda: torch.ones(1))


def test_other_exceptions_of_the_function_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)

    def compute() -> Tensor:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        CudaCapture(torch.device("cuda", 0)).record(compute)
