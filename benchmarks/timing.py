"""How anything is measured: every variant checked first, then timed in turn, round after round.

A variant is checked against eager in float64 (attention of 16-bit tensors and networks: float32): results and gradients
may be `SLACK` times as far off as eager in the dtype at hand. What computes something else is not timed. A variant that
fails, is out of memory or misses a library has its reason in the record, and the others go on.

On a CUDA GPU times are those of CUDA events, with the L2 cache overwritten before every call; elsewhere wall clock. The
first call of a variant, which compiles what there is to compile, is timed by itself.
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
from benchmarks.cases import BenchmarkCase, NotHereError, Run

SLACK = 4
"""How many times eager's error a variant may have. What computes something else is further off; `savl.ops.equivalence`
holds the fused kernels to 2."""
FLUSHED = 2**29
"""Bytes written before a timing on a GPU. No cache holds more."""
LEAD = 8
"""How often they are written: an H200 should need about 1.4 ms for that, and meanwhile the host launches what is timed.
Once was most likely too little, 0.2 ms: attention then took 0.69 ms, of which its kernel was 0.46."""
COPY = "copy"
"""A copy of as many bytes as a case moves, in memory at hand."""

Call = Callable[[], list[Tensor]]


def computation(case: BenchmarkCase, variant: str, inputs: tuple[Tensor, ...]) -> Call:
    """A call that computes a variant's results, then its gradients where the case has them."""
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
    """Run every variant once and compare: the calls that may be timed, and what is known of all.

    A variant's record has ``error`` and ``allowed`` for each result, as shares of its largest value, ``peak_bytes``
    where memory can be read off, and the seconds of its first call; or ``failed`` and why.
    """
    calls: dict[str, Call] = {}
    records: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in case.absent.items()}
    reference, eager_errors = None, None
    if case.wide is not None:
        try:
            reference = computation(case, "eager", tuple(each.to(case.wide) for each in case.inputs))()
        except Exception as error:  # whatever a device or a library raises: the rest goes on
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
            if peak is not None and (run.cuda or not variant.startswith(("compile", "flex"))):
                record["peak_bytes"] = peak
            if reference is None and case.wide is None and variant == "eager":
                reference = found  # what the others are held against
            if reference is None:
                record["unchecked"] = "there is no reference"
            else:
                errors = [_error(one, exact) for one, exact in zip(found, reference, strict=True)]
                eager_errors = errors if variant == "eager" else eager_errors
                # Without a finer reference eager's own rounding is not known: a thousand of its units.
                units = 1 if case.wide is not None else 1000
                least = [units * torch.finfo(run.dtype if case.wide is None else one.dtype).eps for one in found]
                bases = eager_errors or [0.0] * len(errors)
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
    """A failure in a line."""
    said = str(error).strip().splitlines()
    kind = "not on this device" if isinstance(error, NotHereError) else type(error).__name__
    return f"{kind}: {said[0][:300] if said else ''}"


def release_memory(run: Run) -> None:
    """Give memory back that nobody uses."""
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed is resident no more, and counts again when it is used again


def peak_of(run: Run, call: Call) -> tuple[list[Tensor], int | None]:
    """Results of a call and the most memory, in bytes, that it held at once on top of what was held before.

    Of a CPU that is the process's resident memory, and None where the operating system does not tell (it is not Linux).
    """
    if run.cuda:
        torch.cuda.synchronize(run.device)
        before = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        found = _done(run, call)
        return found, torch.cuda.max_memory_allocated(run.device) - before
    try:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    found = call()
    return found, max(_resident("VmHWM") - before, 0)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], run: Run, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in turn, round after round, with cold caches; and why calls that fail are left out."""
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
    for _ in range(LEAD):  # while the GPU is at it, the CPU gets ahead with its launches
        cold.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def ceilings(run: Run) -> dict[str, float]:
    """What this device does at best: bytes copied a second, read and written counted, and operations of a product."""
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
    """Check a case and time it: a record of each variant.

    Args:
        case: What to measure.
        run: Where.
        rounds: How often each variant is timed; 0 where the call that checks it is the measurement, because it is long.
        ceilings: What `ceilings` found, or nothing.

    Returns:
        By variant what `check` says; and ``seconds``, those of every round; ``tflops`` and ``gb_per_second`` of what
        must be computed and moved; shares of the ceilings, and ``of_roofline``, the share of what the ceilings allow
        for so many operations and bytes. Or ``failed`` and why.
    """
    calls, records = check(case, run)
    release_memory(run)
    timed: dict[str, Callable[[], object]] = dict(calls)
    if case.copied:
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
    """What a time means: operations and bytes a second, and shares of the ceilings."""
    found: dict[str, float] = {}
    if case.flops and computes:
        found["tflops"] = case.flops / seconds / 1e12
    if case.moved:
        found["gb_per_second"] = case.moved / seconds / 1e9
    return found | shares(found, ceilings)


def shares(rates: Mapping[str, float], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Rates as shares of the ceilings, where both are known; of the roofline, the share of the nearer one."""
    found: dict[str, float] = {}
    for share, rate, ceiling in (
        ("of_product_tflops", "tflops", "product_tflops"),
        ("of_copy_bandwidth", "gb_per_second", "copy_gb_per_second"),
    ):
        if rate in rates and ceiling in ceilings:
            found[share] = rates[rate] / ceilings[ceiling]
    return {**found, "of_roofline": max(found.values())} if found else {}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread in milliseconds."""
    ordered = sorted(1000 * each for each in seconds)
    quarter = len(ordered) // 4
    return {
        "median_ms": statistics.median(ordered),
        "quartiles_ms": [ordered[quarter], ordered[-1 - quarter]],
        "min_ms": ordered[0],
        "max_ms": ordered[-1],
    }
