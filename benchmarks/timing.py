"""Check every variant of a benchmark case, then time the variants in turn, round after round.

A variant is compared with eager in float64 (float32 for attention of 16-bit tensors and for networks). The errors of
its results and gradients may be `SLACK` times those of eager in the dtype at hand; a variant with larger errors is not
timed. The errors of a variant in a lower precision than that of the inputs may be `SLACK` times those of eager under
autocast in that precision. If a variant fails, runs out of memory or lacks a library, its record has the reason, and
the others continue.

On a CUDA GPU, times are those of CUDA events, and the L2 cache is overwritten before every call. Elsewhere they are
wall clock times. The first call of a variant, which may compile code, is timed separately.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import FUSED_COMPILED, BenchmarkCase, NotAvailableError, Run
from benchmarks.peak_memory import resident_bytes
from benchmarks.peers import runtimes

SLACK = 4
"""Largest error of a variant as a multiple of eager's error. Wrong results have far larger errors.
`savl.ops.equivalence` allows the fused kernels a factor of 2."""
FLUSHED = 2**29
"""Bytes written before each timing on a GPU, more than any cache holds."""
LEAD = 8
"""Number of times that these bytes are written. An H200 should need about 1.4 ms for that, during which the host
launches the timed call. Writing them once, in 0.2 ms, was probably too short: attention then took 0.69 ms, its kernel
0.46 ms."""
COMPILED = ("compile", "flex", FUSED_COMPILED, *runtimes.VARIANTS)
"""Beginnings of the names of variants whose first call compiles a graph."""
COPY = "copy"
"""Name of the variant that copies as many bytes as a case moves."""

Call = Callable[[], list[Tensor]]


def computation(case: BenchmarkCase, variant: str, inputs: tuple[Tensor, ...]) -> Call:
    """Return a call that computes the results of a variant, and its gradients if the case has them."""
    call = case.variants[variant]
    if not case.backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                found = call(*inputs)
            return [found] if isinstance(found, Tensor) else list(found)

        return forward
    inputs = tuple(each.detach().clone().requires_grad_() for each in inputs)
    kept: list[Tensor] = []

    def gradients_of(outputs: Sequence[Tensor]) -> list[Tensor]:
        if not kept:  # the same numbers for every variant
            generator = torch.Generator().manual_seed(13)
            own = case.inputs[0].dtype
            for out in outputs:
                drawn = torch.randn(out.shape, generator=generator)
                kept.append((drawn.to(own) if own != torch.float32 else drawn).to(out.device, out.dtype))
        return kept

    def forward_and_backward() -> list[Tensor]:
        with torch.enable_grad():
            found = call(*inputs)
            outputs = [found] if isinstance(found, Tensor) else list(found)
            gradients = torch.autograd.grad(outputs, inputs, gradients_of(outputs))
        return [*(out.detach() for out in outputs), *gradients]

    return forward_and_backward


def check(case: BenchmarkCase, run: Run) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """Run every variant once and compare results; return the calls to time, and a record of each variant.

    A record has ``error`` and ``allowed`` for each result as shares of its largest value, ``peak_bytes`` where memory
    can be measured, and ``first_call_seconds``; or ``failed`` with the reason.
    """
    calls: dict[str, Call] = {}
    records: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in case.skipped.items()}
    reference, eager_errors = None, None
    if case.reference_dtype is not None:
        try:
            reference = computation(case, "eager", tuple(each.to(case.reference_dtype) for each in case.inputs))()
        except Exception as error:  # any error of a device or a library: the others continue
            records["reference"] = {"failed": reason(error)}
    for variant in case.variants:
        record: dict[str, Any] = {}
        records[variant] = record
        release_memory(run)
        try:
            call = computation(case, variant, case.inputs)
            start = time.perf_counter()
            found, peak = peak_of(run, call)
            record["first_call_seconds"] = time.perf_counter() - start
            if run.cuda:  # the first call may have compiled, tuned or captured something
                found, peak = peak_of(run, call)
            if peak is not None and (run.cuda or not variant.startswith(COMPILED)):
                record["peak_bytes"] = peak
            if reference is None and case.reference_dtype is None and variant == "eager":
                reference = found  # the others are compared with it
            if reference is None:
                record["unchecked"] = "there is no reference"
            else:
                errors = [_error(one, exact) for one, exact in zip(found, reference, strict=True)]
                eager_errors = errors if variant == "eager" else eager_errors
                # Without a more precise reference the rounding of eager is unknown: allow a thousand units.
                units = 1 if case.reference_dtype is not None else 1000
                least = [
                    units * torch.finfo(run.dtype if case.reference_dtype is None else one.dtype).eps for one in found
                ]
                bases, own_dtype = eager_errors or [0.0] * len(errors), case.precisions.get(variant)
                if own_dtype is not None:  # it may round whatever it stores to this dtype, also the result
                    least = [torch.finfo(own_dtype).eps for _ in found]
                    with torch.autocast(run.device.type, own_dtype):
                        rounded = computation(case, "eager", case.inputs)()
                    bases = [_error(one, exact) for one, exact in zip(rounded, reference, strict=True)]
                allowed = [SLACK * own + eps for own, eps in zip(bases, least, strict=True)]
                record |= {"error": errors, "allowed": allowed}
                if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
                    raise ArithmeticError(f"computes something else: errors {errors}, allowed {allowed}")
            del found
            calls[variant] = call
        except Exception as error:
            record["failed"] = reason(error)
    return calls, records


def _done(run: Run, call: Call) -> list[Tensor]:
    found = call()
    if run.cuda:
        torch.cuda.synchronize(run.device)
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    scale = float(exact.abs().max())
    return float((found.to(exact.dtype) - exact).abs().max()) / scale if scale else float(found.abs().max())


def reason(error: Exception) -> str:
    """Return the reason of a failure in one line."""
    said = str(error).strip().splitlines()
    kind = "not on this device" if isinstance(error, NotAvailableError) else type(error).__name__
    return f"{kind}: {said[0][:300] if said else ''}"


def release_memory(run: Run) -> None:
    """Return unused memory to the device or the operating system."""
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed memory is not resident any more, and counts when it is used again


def peak_of(run: Run, call: Call) -> tuple[list[Tensor], int | None]:
    """Return the results of a call and its peak memory in bytes, in addition to the memory in use before.

    On a CPU this is resident memory of the process, and None on operating systems other than Linux.
    """
    if run.cuda:
        torch.cuda.synchronize(run.device)
        before = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        found = _done(run, call)
        return found, torch.cuda.max_memory_allocated(run.device) - before
    try:
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    found = call()
    return found, max(resident_bytes("VmHWM") - before, 0)


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], run: Run, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return seconds of each call in every round, the calls in turn and with cold caches; and reasons of failures."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    cold = torch.empty(FLUSHED if run.cuda else 0, dtype=torch.int8, device=run.device)
    warm_up = 2 if run.cuda else 1 if rounds > 2 else 0  # the check has called all of them
    for number in range(rounds + warm_up):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                seconds = _timed(call, run, cold)
            except Exception as error:
                failed[name] = reason(error)
                continue
            if number >= warm_up:
                times[name].append(seconds)
    return {name: values for name, values in times.items() if name not in failed and values}, failed


def _timed(call: Callable[[], object], run: Run, cold: Tensor) -> float:
    if not run.cuda:
        return machine.seconds(call)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(run.device)
    for _ in range(LEAD):  # meanwhile the CPU launches the call
        cold.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def ceilings(run: Run) -> dict[str, float]:
    """Measure the device: bytes per second of a copy, counting reads and writes, and FLOPs of a product."""
    count, size = (2**29, 8192) if run.cuda else (2**27, 1536)
    source = torch.ones(count // 4, device=run.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=run.device).to(run.dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times, failed = time_in_turn(calls, run, 10 if run.cuda else 5)
    if failed:
        raise RuntimeError(f"no ceilings: {failed}")
    return {
        "copy_gb_per_second": 2 * count / statistics.median(times["copy"]) / 1e9,
        "product_tflops": 2 * size**3 / statistics.median(times["product"]) / 1e12,
    }


def check_and_time(
    case: BenchmarkCase, run: Run, rounds: int, ceilings: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Check and time all variants of a case; return a record of each.

    Args:
        case: The case.
        run: Device and dtype.
        rounds: Timings of each variant; 0 to use the time of the call that checks it, where that takes long.
        ceilings: Result of `ceilings`, or an empty mapping.

    Returns:
        By variant, the record of `check` with: ``seconds`` of every round; ``tflops`` and ``gb_per_second``, counting
        the operations and bytes that the case requires; shares of the ceilings; and ``of_roofline``, the share of the
        speed that the ceilings allow for these operations and bytes. Or ``failed`` with the reason.
    """
    calls, records = check(case, run)
    release_memory(run)
    timed: dict[str, Callable[[], object]] = dict(calls)
    if case.bandwidth_bound:
        source = torch.ones(int(case.moved) // 8, device=run.device)
        target = torch.empty_like(source)
        timed[COPY] = lambda: target.copy_(source)
        records[COPY] = {}
    if rounds:
        times, failed = time_in_turn(timed, run, rounds)
    else:
        times, failed = {name: [records[name]["first_call_seconds"]] for name in calls}, {}
    for variant, why in failed.items():
        records[variant]["failed"] = why
    for variant, seconds in times.items():
        records[variant]["seconds"] = seconds
        records[variant] |= rates(case, statistics.median(seconds), ceilings, variant != COPY)
    return records


def rates(
    case: BenchmarkCase, seconds: float, ceilings: Mapping[str, float], computes: bool = True
) -> dict[str, float]:
    """Convert a time to operations and bytes per second, and to shares of the ceilings."""
    found: dict[str, float] = {}
    if case.flops and computes:
        found["tflops"] = case.flops / seconds / 1e12
    if case.moved:
        found["gb_per_second"] = case.moved / seconds / 1e9
    return found | shares(found, ceilings)


def shares(rates: Mapping[str, float], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Return rates as shares of the ceilings where both are known; ``of_roofline`` is the larger share."""
    found: dict[str, float] = {}
    for share, rate, ceiling in (
        ("of_product_tflops", "tflops", "product_tflops"),
        ("of_copy_bandwidth", "gb_per_second", "copy_gb_per_second"),
    ):
        if rate in rates and ceiling in ceilings:
            found[share] = rates[rate] / ceilings[ceiling]
    return {**found, "of_roofline": max(found.values())} if found else {}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median and spread in milliseconds."""
    ordered = sorted(1000 * each for each in seconds)
    quarter = len(ordered) // 4
    return {
        "median_ms": statistics.median(ordered),
        "quartiles_ms": [ordered[quarter], ordered[-1 - quarter]],
        "min_ms": ordered[0],
        "max_ms": ordered[-1],
    }
