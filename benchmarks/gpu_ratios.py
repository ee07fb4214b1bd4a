"""The ratios promised for a GPU, all in one run: variants in turn, round after round, medians.

    python -m benchmarks.gpu_ratios                                   # results/<name of the GPU>/gpu_ratios.json
    python -m benchmarks.gpu_ratios --only window network             # some parts
    python -m benchmarks.gpu_ratios --only max-autotune               # against torch.compile at its best, minutes
    python -m benchmarks.gpu_ratios --device cpu --side 32 --no-compile --network savl-tiny   # whether it runs at all

Every variant is checked before it is timed: results and gradients, against eager in float64 (attention of 16-bit
tensors and networks: float32), may be four times as far off as eager in the dtype at hand. A variant that fails, is
out of memory or misses a library says so in the result and the others go on. Results are written after every part.
Exit code 0 whatever the table says: it reports.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.gpu_cases import COPY, ON_REQUEST, PARTS, Case, Run
from savl.atomic_write import write_atomically

SLACK = 4
"""How many times eager's error a variant may have. What computes something else is further off; `savl.ops.equivalence`
holds the fused kernels to 2."""
FLUSHED = 2**29
"""Bytes written before a timing. No cache holds more, and a GPU takes longer to write them than the host to launch what
follows."""


class NotHereError(RuntimeError):
    """Something that this device does not have."""


@dataclass
class Report:
    """What is written, after every part."""

    path: Path | None
    content: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write what there is."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


# How it is measured


def computation(case: Case, variant: str, inputs: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
    """A call that computes a variant's results, then its gradients where the case has them."""
    call = case.variants[variant]
    if not case.backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                found = call(*inputs)
            return [found] if isinstance(found, Tensor) else list(found)

        return forward
    inputs = tuple(each.detach().clone().requires_grad_() for each in inputs)
    generator = torch.Generator().manual_seed(13)
    shape = (*inputs[0].shape[:3], 144)
    grad_out = torch.randn(shape, generator=generator).to(case.inputs[0].dtype).to(inputs[0].device, inputs[0].dtype)

    def forward_and_backward() -> list[Tensor]:
        with torch.enable_grad():
            out = call(*inputs)
            assert isinstance(out, Tensor)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]

    return forward_and_backward


def check(case: Case, run: Run) -> tuple[dict[str, Callable[[], list[Tensor]]], dict[str, dict[str, Any]]]:
    """Run every variant once and compare: the calls that may be timed, and what is known of all.

    A variant's record has ``error`` and ``allowed`` for each result, as shares of its largest value, and the seconds
    of its first call, which compiles what there is to compile; or ``failed`` and why.
    """
    calls, records = {}, {}
    reference, eager_errors = None, None
    try:
        reference = computation(case, "eager", tuple(each.to(case.wide) for each in case.inputs))()
    except Exception as error:  # whatever a device or a library raises: the rest goes on
        records["reference"] = {"failed": _reason(error)}
    for variant in case.variants:
        record: dict[str, Any] = {}
        records[variant] = record
        _free(run)
        try:
            call = computation(case, variant, case.inputs)
            base = _allocated(run)
            record["first_call_seconds"] = machine.seconds(lambda call=call: _finish(run, call()))
            if run.cuda:
                torch.cuda.reset_peak_memory_stats(run.device)
            found = call()
            if run.cuda:
                torch.cuda.synchronize(run.device)
                record["peak_bytes"] = torch.cuda.max_memory_allocated(run.device) - base
            if reference is None:
                record["unchecked"] = "there is no reference"
            else:
                errors = [_error(one, exact) for one, exact in zip(found, reference, strict=True)]
                eager_errors = errors if variant == "eager" else eager_errors
                finest = [torch.finfo(one.dtype).eps for one in found]
                bases = eager_errors or [0.0] * len(errors)
                allowed = [SLACK * own + eps for own, eps in zip(bases, finest, strict=True)]
                record |= {"error": errors, "allowed": allowed}
                if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
                    raise ArithmeticError(f"computes something else: errors {errors}, allowed {allowed}")
            del found
            calls[variant] = call
        except Exception as error:
            record["failed"] = _reason(error)
    return calls, records


def _error(found: Tensor, exact: Tensor) -> float:
    scale = float(exact.abs().max())
    return float((found.to(exact.dtype) - exact).abs().max()) / scale if scale else float(found.abs().max())


def _reason(error: Exception) -> str:
    said = str(error).strip().splitlines()
    kind = "not on this device" if isinstance(error, NotHereError) else type(error).__name__
    return f"{kind}: {said[0][:300] if said else ''}"


def _allocated(run: Run) -> int:
    return torch.cuda.memory_allocated(run.device) if run.cuda else 0


def _free(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def _finish(run: Run, result: object) -> None:
    if run.cuda:
        torch.cuda.synchronize(run.device)


def timings(
    calls: Mapping[str, Callable[[], object]], run: Run, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in turn, round after round, with cold caches; and why calls that fail are left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    cold = torch.empty(FLUSHED if run.cuda else 0, dtype=torch.int8, device=run.device)
    warm_up = 2 if run.cuda else 1
    for number in range(rounds + warm_up):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                seconds = _timed(call, run, cold)
            except Exception as error:
                failed[name] = _reason(error)
                continue
            if number >= warm_up:
                times[name].append(seconds)
    return {name: values for name, values in times.items() if name not in failed and values}, failed


def _timed(call: Callable[[], object], run: Run, cold: Tensor) -> float:
    if not run.cuda:
        return machine.seconds(call)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(run.device)
    cold.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread in milliseconds."""
    ordered = sorted(1000 * each for each in seconds)
    quarter = len(ordered) // 4
    return {
        "median_ms": statistics.median(ordered),
        "quartiles_ms": [ordered[quarter], ordered[-1 - quarter]],  # type: ignore[dict-item]
        "min_ms": ordered[0],
        "max_ms": ordered[-1],
    }


def ceilings(run: Run) -> dict[str, float]:
    """What this device does at best: bytes copied a second, read and written counted, and operations of a product."""
    count, size = (2**29, 8192) if run.cuda else (2**24, 512)
    source = torch.ones(count // 4, device=run.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=run.device).to(run.dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times, failed = timings(calls, run, 10 if run.cuda else 3)
    if failed:
        raise RuntimeError(f"no ceilings: {failed}")
    return {
        "copy_gb_per_second": 2 * count / statistics.median(times["copy"]) / 1e9,
        "product_tflops": 2 * size**3 / statistics.median(times["product"]) / 1e12,
    }


def measure_part(name: str, run: Run, limits: Mapping[str, float]) -> dict[str, Any]:
    """One part: its variants, checked and timed, and its ratios.

    Args:
        name: One of `PARTS`.
        run: Where, on what and how often.
        limits: What `ceilings` found.
    """
    is_network = name in ("network", *ON_REQUEST, "network-compile")
    if "compile" in name or name in ON_REQUEST:
        if not run.cuda:
            raise NotHereError("torch.compile of a network is measured on CUDA GPUs")
        if not run.compiled:
            raise NotHereError("torch.compile was switched off")
    case = PARTS[name](run)
    calls, records = check(case, run)
    if "flex" in case.wanted and "flex" not in records:
        records["flex"] = {"failed": "torch.compile was switched off"}
    _free(run)
    timed: dict[str, Callable[[], object]] = dict(calls)
    if COPY in case.wanted:
        source = torch.ones(int(case.moved) // 8, device=run.device)
        target = torch.empty_like(source)
        timed[COPY] = lambda: target.copy_(source)
        records[COPY] = {}
    rounds = max(run.rounds // 4, min(run.rounds, 3)) if is_network else run.rounds
    times, failed = timings(timed, run, rounds)
    for variant, reason in failed.items():
        records[variant]["failed"] = reason
    for variant, seconds in times.items():
        median = statistics.median(seconds)
        records[variant] |= summary(seconds)
        if case.flops and limits:
            records[variant]["tflops"] = case.flops / median / 1e12
            records[variant]["of_product_tflops"] = records[variant]["tflops"] / limits["product_tflops"]
        if case.moved and limits:
            records[variant]["gb_per_second"] = case.moved / median / 1e9
            records[variant]["of_copy_bandwidth"] = records[variant]["gb_per_second"] / limits["copy_gb_per_second"]
    ratios = [ratio(case.what, against, wanted, records) for against, wanted in case.wanted.items()]
    if name == "network":
        memory = ratio(f"{case.what}, peak memory", "eager", 3, records, "peak_bytes")
        ratios.append(
            memory if run.cuda else memory | {"why": "not on this device: memory is read off CUDA's allocator"}
        )
    return {"state": "done", "what": case.what, "rounds": rounds, "variants": records, "ratios": ratios}


def ratio(
    what: str, against: str, wanted: float | None, records: Mapping[str, Any], figure: str = "median_ms"
) -> dict[str, Any]:
    """How many times the fused variant's figure is that of another, the best of those that are called alike."""
    rivals = {name: record for name, record in records.items() if name == against or name.startswith(f"{against}, ")}
    known = {name: record[figure] for name, record in rivals.items() if figure in record}
    row: dict[str, Any] = {"what": what, "against": against, "ratio": None, "wanted": wanted, "met": None}
    fused = records.get("fused", {})
    if known and figure in fused and fused[figure] > 0:
        best = min(known, key=lambda name: known[name])
        row |= {"against": best, "ratio": known[best] / fused[figure]}
        row["met"] = None if wanted is None else row["ratio"] >= wanted
    else:
        reasons = {name: record.get("failed", "not measured") for name, record in {**rivals, "fused": fused}.items()}
        missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if figure not in records.get(name, {}))
        row["why"] = missing or f"{against}: not measured"
    return row


# The run


def facts(run: Run) -> dict[str, Any]:
    """What the figures depend on."""
    if not run.cuda:
        return {"device": machine.cpu_name(), **machine.facts()}
    properties = torch.cuda.get_device_properties(run.device)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": triton,
        **machine.facts(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.CalledProcessError):
        return None


def slug(device: str) -> str:
    """Name of a device as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def measure(run: Run, parts: Iterable[str], report: Report) -> dict[str, Any]:
    """Measure part by part, and write after each.

    Args:
        run: Where, on what and how often.
        parts: Of `PARTS`.
        report: Where to write.

    Returns:
        The content of the report.
    """
    content = report.content
    content |= {
        "machine": facts(run),
        "settings": {
            "side": run.side,
            "dtype": str(run.dtype).removeprefix("torch."),
            "rounds": run.rounds,
            "compiled": run.compiled,
            "network": run.network,
        },
        "complete": False,
        "parts": {},
    }
    limits: dict[str, float] = {}
    try:
        limits = ceilings(run)
    except Exception as error:
        content["ceilings_failed"] = _reason(error)
    content["ceilings"] = limits
    report.write()
    for name in parts:
        start = time.perf_counter()
        try:
            part = measure_part(name, run, limits)
        except NotHereError as error:
            part = {"state": "not on this device", "why": str(error), "ratios": []}
        except Exception as error:
            part = {"state": "failed", "why": _reason(error), "ratios": []}
        content["parts"][name] = {**part, "seconds": time.perf_counter() - start}
        torch.compiler.reset()
        _free(run)
        report.write()
    content["complete"] = True
    report.write()
    return content


def table(content: Mapping[str, Any]) -> str:
    """Markdown: the ratios, and what became of parts without."""
    device, settings = content["machine"]["device"], content["settings"]
    lines = [f"{device}, {settings['side']}×{settings['side']} tokens, {settings['dtype']}", ""]
    if limits := content["ceilings"]:
        measured = "copies {copy_gb_per_second:.0f} GB/s, products {product_tflops:.2f} TFLOP/s"
        lines += [measured.format(**limits), ""]
    lines += ["| what | fused | against | ratio | wanted | |", "|---|---:|---|---:|---:|---|"]
    for name, part in content["parts"].items():
        if part["state"] != "done":
            lines.append(f"| {name} | | | | | {part['state']}: {part['why']} |")
            continue
        fused = part["variants"]["fused"]
        for row in part["ratios"]:
            key, unit = ("peak_bytes", 2**20) if "memory" in row["what"] else ("median_ms", 1)
            value = f"{fused[key] / unit:.3f} {'ms' if unit == 1 else 'MiB'}" if key in fused else ""
            found = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            wanted = "" if row["wanted"] is None else f"{row['wanted']:g}"
            verdict = row.get("why") or {True: "met", False: "missed", None: ""}[row["met"]]
            lines.append(f"| {row['what']} | {value} | {row['against']} | {found} | {wanted} | {verdict} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write (default: results/<device>/)")
    parser.add_argument("--side", type=int, default=512, help="tokens along a side, a multiple of 16 from 32 on")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=30, help="times each op is measured; networks a quarter of it")
    parser.add_argument("--network", default="savl-base", help="which to measure end to end")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--no-compile", action="store_true", help="nothing that torch.compile compiles")
    given = parser.parse_args(arguments)
    if given.side < 32 or given.side % 16:
        parser.error(f"--side must be a multiple of 16 from 32 on, got {given.side}")
    device = torch.device(given.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("torch finds no GPU", file=sys.stderr)
            return 1
        torch.cuda.set_device(device)
    run = Run(device, getattr(torch, given.dtype), given.side, given.rounds, not given.no_compile, given.network)
    parts = given.only or [name for name in PARTS if name not in ON_REQUEST]
    named = "gpu_ratios.json" if not given.only else f"gpu_ratios_{'_'.join(given.only)}.json"
    path = given.json
    if path is None:
        path = machine.ROOT / "benchmarks/results" / slug(facts(run)["device"]) / named
    print(table(measure(run, parts, Report(path))))
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
