"""Tests of how the kernels run on a GPU: streams, devices, CUDA graphs, synchronisation and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from savl.ops import KernelSettings, window_attention
from savl.ops.equivalence import Case
from savl.ops.op import OPS
from savl.ops.window_attention import window_attention_case

BackendOf = Callable[[str], str]
Results = dict[str, Tensor]

NAP = 50_000_000
"""Cycles for which a GPU is kept busy, some tens of ms. Code that does not wait for its inputs then reads old data."""


def settings_for(case: Case, backend: str) -> KernelSettings:
    return KernelSettings(**{case.op: backend})


class Prepared:
    """A call with its tensors on a GPU, which can be repeated with other values in them."""

    def __init__(self, case: Case, backend: str, device: str = "cuda") -> None:
        self.case, self.kernels = case, settings_for(case, backend)
        self.given = {
            name: None if value is None else value.to(device).requires_grad_() for name, value in case.arguments.items()
        }
        self.wanted = [value for value in self.given.values() if value is not None]
        self.seeds = [torch.ones_like(result) for result in self._forward()]

    def _forward(self) -> list[Tensor]:
        results = OPS[self.case.op].function(**self.given, **self.case.options, kernels=self.kernels)
        return [results] if isinstance(results, Tensor) else list(results)

    def __call__(self) -> list[Tensor]:
        """Return outputs and gradients."""
        results = self._forward()
        gradients = torch.autograd.grad(results, self.wanted, self.seeds, allow_unused=True)
        return [value.detach() for value in results] + [value for value in gradients if value is not None]

    def fill(self, case: Case) -> None:
        """Copy the values of another case into the tensors."""
        with torch.no_grad():
            for name, value in case.arguments.items():
                given = self.given[name]
                if value is not None and given is not None:
                    given.copy_(value)


def assert_same_bits(found: list[Tensor], expected: list[Tensor], when: str) -> None:
    assert len(found) == len(expected)
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(value.cpu(), wanted.cpu()), f"result {index} differs {when}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


@DTYPES
def test_a_cuda_graph_computes_the_same_as_a_launch(
    dtype: torch.dtype, small_case: Callable[..., Case], backend_of: BackendOf
) -> None:
    first, second = small_case(dtype, 0), small_case(dtype, 1)
    backend = backend_of(first.op)
    expected = Prepared(second, backend)()
    call = Prepared(first, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and allocates what must not happen while a graph is captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        call.fill(second)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected, "when a graph replays it")
    call.fill(first)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0].cpu(), expected[0].cpu()), "the graph does not read its inputs"


def test_a_side_stream_computes_the_same_as_the_default_stream(
    small_case: Callable[..., Case], backend_of: BackendOf
) -> None:
    first, second = small_case(torch.float32, 0), small_case(torch.float32, 1)
    backend = backend_of(first.op)
    call = Prepared(first, backend)
    old, expected = call(), Prepared(second, backend)()
    torch.cuda.synchronize()
    assert not torch.equal(old[0], expected[0])
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    fresh = dataclasses.replace(
        second, arguments={n: None if v is None else v.cuda() for n, v in second.arguments.items()}
    )
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(NAP)
        call.fill(fresh)  # late: kernels on another stream would read the old numbers
        found = call()
        done.record(side)
    torch.cuda.current_stream().wait_event(done)
    for value in found:
        value.record_stream(torch.cuda.current_stream())
    copies = [value.clone() for value in found]
    assert_same_bits(copies, expected, "on a stream of its own")


def test_tensors_on_another_device_than_the_current_one_are_computed_there(
    small_case: Callable[..., Case], backend_of: BackendOf
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case = small_case()
    backend = backend_of(case.op)
    assert torch.cuda.current_device() == 0
    expected, found = case.run(backend, device="cuda:0"), Prepared(case, backend, "cuda:1")
    results = found()
    assert torch.cuda.current_device() == 0, "the current device was changed"
    assert {value.device for value in results} == {torch.device("cuda:1")}
    again = case.run(backend, device="cuda:1")
    alike = torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1)
    for name, value in expected.items():
        if alike:
            assert torch.equal(again[name], value), f"{name} differs between two equal GPUs"
        else:
            torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-4)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error for every operation that makes the CPU wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_check_detects_synchronisation() -> None:
    value = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()


def test_neither_pass_synchronises_with_the_gpu(small_case: Callable[..., Case], backend_of: BackendOf) -> None:
    case = small_case()
    call = Prepared(case, backend_of(case.op))
    call()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        call()


def test_a_gradient_is_the_same_if_only_it_is_requested(small_case: Callable[..., Case], backend_of: BackendOf) -> None:
    case = small_case()
    call = Prepared(case, backend_of(case.op))
    results = call._forward()
    together = torch.autograd.grad(results, call.wanted, call.seeds, allow_unused=True)
    for index, expected in enumerate(together):
        for place, value in enumerate(call.wanted):
            value.requires_grad_(place == index)
        pairs = [(out, seed) for out, seed in zip(call._forward(), call.seeds, strict=True) if out.requires_grad]
        outputs, seeds = zip(*pairs, strict=True)
        (found,) = torch.autograd.grad(outputs, [call.wanted[index]], seeds, allow_unused=True)
        assert expected is not None
        assert found is not None, f"argument {index} got no gradient"
        torch.testing.assert_close(found, expected, msg=lambda m, index=index: f"argument {index}: {m}")


# Memory


def peak(function: Callable[[], object]) -> int:
    """Return the peak memory of a call in bytes, in addition to what is allocated before it."""
    function()  # workspaces of libraries, compiled kernels
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("severity", [True, False], ids=["severity", "plain"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward-and-backward"])
def test_window_attention_takes_less_than_a_third_of_the_memory_of_eager(
    gradients: bool, severity: bool, backend_of: BackendOf
) -> None:
    backend = backend_of("window_attention")
    case = window_attention_case(
        torch.bfloat16, window=16, shift=8, rows=16, columns=16, heads=6, head_dim=24, severity=severity
    )
    found = {}
    for name in (backend, "eager"):
        given = {n: None if v is None else v.cuda().requires_grad_(gradients) for n, v in case.arguments.items()}

        def call(name: str = name, given: dict[str, Tensor | None] = given) -> object:
            out = window_attention(**given, **case.options, kernels=settings_for(case, name))  # type: ignore[arg-type]
            wanted = [value for value in given.values() if value is not None]
            return torch.autograd.grad(out, wanted, torch.ones_like(out)) if gradients else out

        found[name] = peak(call)
    assert found[backend] < found["eager"] / 3, {name: f"{size / 2**20:.0f} MiB" for name, size in found.items()}
