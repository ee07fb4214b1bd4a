"""Measure how time and memory grow with image area, batch size, window size and threads, for fused and eager.

    python -m benchmarks.scaling                       # results/<machine>/scaling.json
    python -m benchmarks.scaling --only area threads   # some of the series
    python -m benchmarks.scaling --limit 8             # memory limit of a point in GiB

Every point is measured in a separate process. On a CPU, the operating system reports the peak memory of the process and
enforces the memory limit, which requires Linux. On a GPU (``--device cuda``), PyTorch's allocator reports the peak
memory. A point that runs out of memory is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from savl.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("eager", "fused")


@dataclass(frozen=True)
class Point:
    """One measurement."""

    series: str
    subject: str
    """``"window attention"``, an op with the shapes of savl-base; or a network."""
    variant: str
    side: int
    """LR pixels along a side."""
    batch: int = 1
    window: int = 16
    threads: int = 2
    tile: int | None = 0
    """Side of the tiles in LR pixels; 0 means that the image is processed without tiles."""
    device: str = "cpu"


def points(threads: int, device: str) -> Iterator[Point]:
    """Yield the points of all series: image area without tiles, 4 megapixels in tiles, batch, window and threads."""
    base = Point("", "", "", 128, threads=threads, device=device)
    for variant in VARIANTS:
        for side in (64, 128, 256, 512, 1024):
            yield replace(base, series="area", subject="window attention", variant=variant, side=side)
        for side in (64, 128, 256, 512, 1024):
            yield replace(base, series="area", subject="savl-tiny", variant=variant, side=side)
        yield replace(base, series="area", subject="savl-tiny", variant=variant, side=2048, tile=256)
        for side in (64, 128):
            yield replace(base, series="area", subject="savl-base", variant=variant, side=side)
        for batch in (1, 2, 4, 8):
            yield replace(base, series="batch", subject="savl-tiny", variant=variant, side=64, batch=batch)
        for window in (4, 8, 16, 32):
            yield replace(base, series="window", subject="window attention", variant=variant, side=256, window=window)
        for number in sorted({1, threads}):
            for subject, side in (("window attention", 256), ("savl-tiny", 256)):
                yield replace(base, series="threads", subject=subject, variant=variant, side=side, threads=number)


def measure(point: Point, limit_gib: float, patience: float = 900) -> dict[str, Any]:
    """Measure a point in a new process.

    Args:
        point: The point to measure.
        limit_gib: Memory in GiB that the measurement may allocate, in addition to network and image; CPU only.
        patience: Time in seconds after which the measurement is aborted.

    Returns:
        The point, with ``seconds`` (median), ``rounds`` and ``peak_bytes``; or with the reason as ``failed``.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        "--point",
        json.dumps(asdict(point)),
        "--limit",
        str(limit_gib),
    ]
    known = asdict(point)
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return known | {"failed": f"took longer than {patience:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return known | {"failed": said[-1][:300] if said else f"ended with code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return known | found


def here(point: Point, limit_gib: float) -> dict[str, Any]:
    """Measure a point in this process; arguments and result are those of `measure`."""
    import torch

    import savl
    from benchmarks import timing
    from benchmarks.cases import CHANNELS, Run
    from savl import ops
    from savl.ops.settings import KernelSettings

    torch.set_num_threads(point.threads)
    torch.set_grad_enabled(False)
    run = Run(torch.device(point.device), torch.bfloat16 if point.device == "cuda" else torch.float32, point.side)
    settings = KernelSettings(**run.fused_in_networks()) if point.variant == "fused" else KernelSettings.of(False)
    if point.subject == "window attention":
        heads = CHANNELS // 24
        qkv = run.draw(point.batch, point.side, point.side, 3 * CHANNELS, seed=0)
        table = run.draw((2 * point.window - 1) ** 2, heads, seed=1)
        severity = 2 * run.draw(point.batch, point.side, point.side, seed=2, uniform=True)

        def call() -> list[torch.Tensor]:
            shift = point.window // 2
            return [ops.window_attention(qkv, table, severity, window=point.window, shift=shift, kernels=settings)]
    else:
        torch.manual_seed(0)
        model = savl.build(point.subject).eval().to(run.device)
        savl.use_fused_kernels(model=model, **vars(settings))
        lr = Run(run.device, torch.float32, point.side).draw(
            point.batch, 3, point.side, point.side, seed=3, uniform=True
        )
        upscaler = savl.Upscaler(model, tile=point.tile, dtype=run.dtype)

        def call() -> list[torch.Tensor]:
            return [upscaler(image[None]).sr for image in lr] if point.tile else [model(lr)]

    if not run.cuda:
        _allow(limit_gib)
    try:
        start = time.perf_counter()
        _, peak = timing.peak_of(run, call)
        first = time.perf_counter() - start
        rounds = 0 if first > 10 else 1 if first > 3 else 3 if first > 0.5 else 9
        times, failed = timing.time_in_turn({point.variant: call}, run, rounds) if rounds else ({}, {})
    except (RuntimeError, MemoryError) as error:
        if "alloc" in str(error) or "memory" in str(error).lower() or isinstance(error, MemoryError):
            return {"failed": "out of memory", "limit_gib": limit_gib}
        raise
    if failed:
        raise RuntimeError(str(failed))
    seconds = times[point.variant] if rounds else [first]
    return {"seconds": statistics.median(seconds), "rounds": len(seconds), "peak_bytes": peak}


def _allow(gib: float) -> None:
    """Limit the address space of this process to its current size plus `gib` GiB."""
    import resource

    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    most = int(held.split()[1]) * 1024 + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def growth(rows: Sequence[dict[str, Any]], figure: str = "seconds") -> float | None:
    """Return the exponent of the growth with the area, by least squares of logarithms; None for fewer than 3 points."""
    known = [(math.log(row["side"] ** 2), math.log(row[figure])) for row in rows if row.get(figure) and not row["tile"]]
    if len(known) < 3:
        return None
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*known, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in known) / sum((x - mean_x) ** 2 for x, _ in known)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all points and write the results after each one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write (default: results/<machine>/)")
    parser.add_argument(
        "--only", nargs="+", choices=("area", "batch", "window", "threads"), help="series to measure (default: all)"
    )
    parser.add_argument(
        "--limit", type=float, default=8, metavar="GIB", help="memory limit of a point in GiB (default: 8)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.point is not None:
        print(json.dumps(here(Point(**json.loads(given.point)), given.limit)))
        return 0
    import torch

    from benchmarks import machine

    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA GPU", file=sys.stderr)
        return 1
    facts = machine.device_facts(torch.device(given.device))
    path = given.json or machine.folder_of(facts) / "scaling.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        point
        for point in points(torch.get_num_threads(), given.device)
        if given.only is None or point.series in given.only
    ]
    report: dict[str, Any] = {"machine": facts, "limit_gib": given.limit, "points": []}
    for point in wanted:
        row = measure(point, given.limit)
        report["points"].append(row)
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
        said = row.get("failed") or f"{row['seconds']:.3f} s, {(row['peak_bytes'] or 0) / 2**20:.0f} MiB"
        print(f"{point.series}: {point.subject}, {point.side}², batch {point.batch}, window {point.window}, "
              f"{point.threads} threads, {point.variant}: {said}", flush=True)  # fmt: skip
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
