"""Time a kernel with given block sizes on a GPU, and check its results, for `savl.kernels.tune`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from savl.kernels import launch
from savl.kernels.configs import STAGES, KernelConfig, as_pair, default_config
from savl.kernels.gpu import architecture_of
from savl.kernels.tune import CannotRunError, TuningProblem

SIDE = 256
"""Approximate height and width, in pixels, of the image in measurements: enough windows for the largest GPUs."""
REPETITIONS = 7
"""Number of runs in one measurement."""


class Gpu:
    """A CUDA GPU, an implementation of `savl.kernels.tune.Machine`.

    Args:
        index: Index of the CUDA device.
    """

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self.architecture = architecture_of(index)
        self.triton = triton.__version__
        # Writing twice the size of the L2 cache removes the tensors from it. It also takes the GPU longer than the host
        # needs to launch the measured kernel.
        size = max(2 * torch.cuda.get_device_properties(index).L2_cache_size, 2**28)
        self._cold = torch.empty(size, dtype=torch.int8, device=self.device)
        # A small cache, because each graph keeps its results in memory.
        self._graph = lru_cache(maxsize=16)(self._capture)
        self._data = lru_cache(maxsize=1)(partial(inputs, side=SIDE, device=self.device))

    def measure(self, stage: str, tuning_problem: TuningProblem, config: KernelConfig) -> float:
        """Return the median time of a kernel with cold caches, in microseconds.

        Args:
            stage: The kernel.
            tuning_problem: The problem that it computes.
            config: Its block sizes.

        Raises:
            CannotRunError: The kernel does not compile, launch or run.
        """
        try:
            with torch.cuda.device(self.device):
                graph, _ = self._graph(stage, tuning_problem, config)
                graph.replay()
                times = []
                for _ in range(REPETITIONS):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    self._cold.zero_()
                    start.record()
                    graph.replay()
                    end.record()
                    times.append((start, end))
                torch.cuda.synchronize()
                return 1000 * median(start.elapsed_time(end) for start, end in times)
        except Exception as error:  # torch's, Triton's or the assembler's; a lost GPU fails the rule's block sizes too
            reason = str(error).partition("\n")[0]
            raise CannotRunError(f"{type(error).__name__}: {reason}") from error

    def disagreement(
        self, stage: str, tuning_problem: TuningProblem, config: KernelConfig, rule: KernelConfig
    ) -> str | None:
        """Return how results differ from those with the rule's block sizes; None if only by rounding errors.

        Args:
            stage: The kernel.
            tuning_problem: The problem that it computes.
            config: Its block sizes.
            rule: Block sizes of the rule.
        """
        return disagreement(stage, tuning_problem, config, rule, self.device)

    def _capture(
        self, stage: str, tuning_problem: TuningProblem, config: KernelConfig
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture a kernel, with whatever else depends on its block sizes, in a CUDA graph, to exclude host time.

        Returns the graph, and an object that keeps the tensors that it writes to alive.
        """
        _, kernel = run(stage, self._data(tuning_problem), config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            try:
                kernel()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph, kernel


@dataclass(frozen=True)
class _Tried(launch.Attention):
    """A call with given block sizes that records its launches."""

    tried: Mapping[str, KernelConfig] = field(default_factory=dict)
    recorded: dict[str, tuple[Callable[[], None], dict[str, Any]]] = field(default_factory=dict)
    """By name of the kernel: a function that repeats its launch, and its arguments."""

    def config(self, stage: str) -> KernelConfig:
        return self.tried[stage]

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        again = partial(super().launch, kernel, programs, *arguments, **constants)
        named = dict(zip(kernel.arg_names, arguments, strict=False))  # constants follow
        self.recorded[kernel.fn.__name__] = again, named
        again()


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem, as `savl.kernels.launch` takes them, with the results of the forward pass."""

    call: launch.Attention
    out: Tensor
    lse: Tensor
    grad_out: Tensor


def inputs(tuning_problem: TuningProblem, *, side: int, device: torch.device) -> Inputs:
    """Return random tensors in the layout of those of networks.

    Args:
        tuning_problem: The problem.
        side: Side of the square image in pixels, rounded down to whole windows, but to at least one.
        device: Device of the tensors.
    """
    problem = tuning_problem.problem
    dtype = getattr(torch, problem.dtype)
    window, key_window = as_pair(problem.window), as_pair(problem.key_window)
    size = [max(1, side // each) * each for each in window]
    channels = tuning_problem.heads * problem.head_dim
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    qkv = draw(1, *size, 3 * channels).to(dtype)
    spans = [outer + inner - 1 for outer, inner in zip(window, key_window, strict=True)]
    call = launch.Attention(
        *qkv.chunk(3, dim=-1),
        draw(spans[0] * spans[1], tuning_problem.heads).to(dtype),
        draw(1, *size).abs().to(dtype) if tuning_problem.severity else None,
        window,
        key_window,
        tuning_problem.heads,
        shift=(window[0] // 2, window[1] // 2) if tuning_problem.shifted else (0, 0),
        margin=(key_window[0] - window[0]) // 2,
    )
    out, lse = launch.forward(_with(call, {}))
    return Inputs(call, out, lse, draw(out.shape).to(dtype))


def run(stage: str, data: Inputs, config: KernelConfig) -> tuple[dict[str, Tensor], Callable[[], object]]:
    """Run the pass that a kernel is part of, with given block sizes for it and those of the rule for the others.

    Args:
        stage: The kernel.
        data: Inputs of the pass.
        config: Its block sizes.

    Returns:
        All results of the pass, by name; and a function that runs the kernel again, with whatever else depends on its
        block sizes.
    """
    call = _with(data.call, {stage: config})
    if stage == "forward":
        out, lse = launch.forward(call)
        results = {"out": out, "lse": lse}
    else:
        # Strides as the ops have them: one tensor, or queries apart.
        parts = 3 if call.window == call.key_window else 2
        size = [*data.out.shape[:3], parts * data.out.shape[3]]
        grads = list(torch.empty(size, dtype=data.out.dtype, device=data.out.device).chunk(parts, dim=-1))
        if parts == 2:
            grads.insert(0, torch.empty_like(data.out))
        table, severity, _ = launch.backward(call, data.out, data.lse, data.grad_out, *grads)
        results = dict(zip(("d q", "d k", "d v", "d bias_table", "d severity"), (*grads, table, severity), strict=True))
    kernel, arguments = call.recorded[stage]
    if stage != "backward_bias":
        return results, kernel
    # The number of chunks, which are summed afterwards, depends on its block sizes.
    sums = arguments["grad_logits_sum"]
    return results, lambda: (kernel(), sums.sum(0))


def disagreement(
    stage: str, tuning_problem: TuningProblem, config: KernelConfig, rule: KernelConfig, device: torch.device
) -> str | None:
    """Return how results differ from those with the rule's block sizes; None if only by rounding errors.

    Rounding may cause eight units in the dtype of the tensors (of products with severity, of weights or gradients of
    logits, and of results, on both sides), and 2 √T units in float32 from sums of T numbers in two orders.

    Args:
        stage: The kernel.
        tuning_problem: The problem that it computes, on three by three windows.
        config: Its block sizes.
        rule: Block sizes of the rule.
        device: Device to compute on.
    """
    problem = tuning_problem.problem
    data = inputs(tuning_problem, side=3 * max(as_pair(problem.window)), device=device)
    expected, _ = run(stage, data, rule)
    with _nan_in_new_tensors():
        found, _ = run(stage, data, config)
    terms = data.call.windows * max(problem.queries, problem.keys) + problem.head_dim
    for name, reference in expected.items():
        if reference.numel() == 0:
            continue
        bound = 8 * torch.finfo(data.out.dtype).eps + 2 * math.sqrt(terms) * torch.finfo(torch.float32).eps
        allowed = bound * float(reference.double().abs().max())
        error = float((found[name].double() - reference.double()).abs().max())
        if not error <= allowed:  # NaN is not
            return f"the error of {name} is {error:.3g}, but at most {allowed:.3g} is allowed"
    return None


def _with(call: launch.Attention, configs: Mapping[str, KernelConfig]) -> _Tried:
    architecture = (9, 0) if call.q.is_cpu else architecture_of(call.q.device.index)
    every = {stage: default_config(stage, call.problem, architecture) for stage in STAGES} | dict(configs)
    given = {each.name: getattr(call, each.name) for each in fields(launch.Attention)}
    return _Tried(**given, tried=every)


@contextmanager
def _nan_in_new_tensors() -> Iterator[None]:
    """Fill new tensors with NaN, so that what a kernel fails to write is not the result of an earlier one."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
