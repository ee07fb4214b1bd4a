"""Report registers, stack, shared memory and occupancy of the Triton kernels with the block sizes that savl ships.

    python -m benchmarks.predicted.triton_resources    # a table
    python -m benchmarks.predicted.triton_resources --json benchmarks/results/kernel-resources/triton.json
    python -m benchmarks.predicted.triton_resources --gpu sm_90 --dtype bfloat16   # with another release of Triton

This needs Triton, but no GPU: every kernel is compiled ahead of time for every architecture, dtype and network.
Attention has severity and, where networks shift windows, a shift, which needs most registers. Spilled registers cost
time.
`benchmarks.predicted.resource_page` writes docs/kernel-resources.md from the committed figures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.predicted import feature_rows
from benchmarks.predicted.feature_rows import FeatureRow
from savl.atomic_write import write_atomically
from savl.kernels.configs import (
    SHIPPED_FOLDER,
    KernelConfig,
    Problem,
    default_config,
    kernels_hash,
    read_store,
    stages_of,
)
from savl.kernels.targets import AMD, Architecture, named_target, target_of
from savl.network import CONFIGS

if TYPE_CHECKING:
    from savl.kernels.compile_ahead_of_time import Resources

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks/results/kernel-resources/triton.json"
OF_TRITON_3_6 = COMMITTED.with_name("triton-3.6-sm_90-bfloat16.json")
"""The figures of an older release, with which the kernels were measured on an H200."""
ARCHITECTURES: tuple[Architecture, ...] = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), *AMD)
DTYPES = ("bfloat16", "float16", "float32")


def dtypes_of(architecture: Architecture) -> tuple[str, ...]:
    """Return the dtypes in the table: for AMD's GPUs bfloat16 only, so that it compiles in a quarter of an hour."""
    return DTYPES if isinstance(architecture, tuple) else DTYPES[:1]


RULE = "rule"
_GPUS: dict[str, Architecture] = {
    r"A100|A30\b": (8, 0),
    r"RTX 30|RTX A\d|A10\b|A40\b": (8, 6),
    r"RTX 40|Ada|L4\b|L40": (8, 9),
    r"H100|H200|GH200|H800|H20\b": (9, 0),
    r"B200|GB200|B100": (10, 0),
    r"RTX 50|RTX PRO": (12, 0),
    r"MI300|MI325": "gfx942",
    r"RX 7900": "gfx1100",
}
"""Architectures of GPUs that block sizes may be shipped for, by patterns of their names."""


@dataclass(frozen=True)
class Row:
    """One compilation."""

    kernel: str
    problem: Problem
    heads: int
    architecture: Architecture
    config: KernelConfig | None
    """Block sizes; None for ``fold_bias``, which has none."""
    source: str = RULE
    """Source of the block sizes: `RULE`, or the name of a GPU."""

    @property
    def shifted(self) -> bool:
        """Whether windows are shifted: true where networks shift them."""
        return self.problem.window == self.problem.key_window

    def facts(self) -> dict[str, Any]:
        """Return what identifies the compilation, as JSON values."""
        config = self.config
        return {
            "kernel": self.kernel,
            "op": "window_attention" if self.shifted else "overlapping_window_attention",
            "dtype": self.problem.dtype,
            "head_dim": self.problem.head_dim,
            "heads": self.heads,
            "window": self.problem.window,
            "key_window": self.problem.key_window,
            "gpu": target_of(self.architecture).name,
            "source": self.source,
            "config": [config.block_m, config.block_n, config.warps, config.stages] if config else None,
        }

    def resources(self) -> Resources:
        """Compile the kernel with severity, and shifted where networks shift windows."""
        from savl.kernels import (
            compile_ahead_of_time,  # here: Triton's interpreter and its compiler exclude each other in a process
        )

        return compile_ahead_of_time.resources(
            self.kernel,
            self.problem,
            self.config,
            self.architecture,
            severity=True,
            shifted=self.shifted,
            heads=self.heads,
        )


def networks() -> list[tuple[int, Problem]]:
    """Return heads and problem (without dtype) of every attention of the named networks, without repetition."""
    found = {}
    for config in CONFIGS.values():
        for key_window in (config.window, config.key_window):
            found[config.heads, Problem("", config.channels // config.heads, config.window, key_window)] = None
    return list(found)


def rows(
    architectures: Iterable[Architecture] = ARCHITECTURES, wanted: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Return all compilations: block sizes of the rule for the named networks, and those shipped for single GPUs.

    Args:
        architectures: Architectures to compile for.
        wanted: Whether to keep a compilation.
    """
    found = []
    for architecture in architectures:
        for dtype in dtypes_of(architecture):
            for heads, shape in networks():
                problem = Problem(dtype, shape.head_dim, shape.window, shape.key_window)
                found += [
                    Row(stage, problem, heads, architecture, default_config(stage, problem, architecture))
                    for stage in stages_of(problem, architecture)
                ]
                found.append(Row("fold_bias", problem, heads, architecture, None))
        found += [row for row in shipped() if row.architecture == architecture]
    return [row for row in found if wanted(row)]


def all_rows() -> list[Row | FeatureRow]:
    """Return the compilations of the committed table."""
    features = (feature_rows.rows((each,), dtypes_of(each)) for each in ARCHITECTURES)
    return [*rows(), *chain.from_iterable(features)]


def shipped(folder: Path = SHIPPED_FOLDER) -> Iterator[Row]:
    """Yield the block sizes in the files of single GPUs.

    Args:
        folder: Folder of the files.

    Raises:
        ValueError: The architecture of a GPU is not known here.
    """
    heads = {(shape.head_dim, shape.window): number for number, shape in networks()}
    for path in sorted(folder.glob("*.json")):
        gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
        architecture = next((one for pattern, one in _GPUS.items() if re.search(pattern, gpu)), None)
        if architecture is None:
            raise ValueError(f"{path.name}: what architecture has {gpu!r}? Add it to _GPUS in {__file__}")
        store = read_store(path, gpu)
        for (stage, problem), tuned in (store.tuned if store else {}).items():
            number = heads.get((problem.head_dim, problem.window), 6)
            yield Row(stage, problem, number, architecture, tuned.config, gpu)


def compile_row(row: Row | FeatureRow) -> dict[str, Any]:
    """Compile a kernel; return its facts with registers, bytes and programs per multiprocessor.

    Args:
        row: The compilation.
    """
    used = row.resources()
    return {
        **row.facts(),
        "registers": used.registers,
        "stack": used.stack,
        "shared": used.shared,
        "tensor_memory": used.tensor_memory,
        "programs": used.programs(row.architecture),
        "warps": used.warps,
    }


def compile_rows(
    wanted: Iterable[Row | FeatureRow],
    jobs: int | None = None,
    on_step: Callable[[], None] | None = None,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Call `compile_row` in several processes; return results in order.

    Args:
        wanted: The compilations.
        jobs: Number of processes; None for the number of processors.
        on_step: Callback after each compilation.
        cache: Folder of Triton's cache, to skip compilations in it; None for a new one.
    """
    with tempfile.TemporaryDirectory() as empty:
        pool = ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), _start, (str(cache or empty),))
        with pool:
            futures = [pool.submit(compile_row, row) for row in wanted]
            try:
                for future in as_completed(futures):
                    future.result()
                    if on_step is not None:
                        on_step()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _start(cache: str) -> None:
    import torch

    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def report(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the committed content."""
    import triton

    return {"triton": triton.__version__, "hashes": hashes(), "rows": measured}


def hashes() -> dict[str, str]:
    """Return hashes of the kernels' code, by op; those of both kinds of attention are one."""
    return {"attention": kernels_hash(), **feature_rows.hashes()}


def dump(content: dict[str, Any]) -> bytes:
    """Return the content as JSON with one line per row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    head = "".join(f' "{name}": {json.dumps(content[name])},\n' for name in ("triton", "hashes"))
    return f'{{\n{head} "rows": [\n{lines}\n ]\n}}\n'.encode()


def faults(measured: Iterable[dict[str, Any]]) -> list[str]:
    """Return what no kernel may have: a stack frame (spilled registers) or more shared memory than available."""
    found = []
    for row in measured:
        what = f"{named(row)} on {row['gpu']} with {tiles(row['config'])}"
        if row["stack"]:
            found.append(f"{what} spills: {row['stack']} bytes of stack, {row['registers']} registers")
        if row["shared"] > (limit := named_target(row["gpu"]).multiprocessor.shared_of_program):
            found.append(f"{what} wants {row['shared']} bytes of shared memory of {limit}")
        elif row["programs"] < 1:
            found.append(f"{what} does not fit on a multiprocessor")
    return found


def named(row: dict[str, Any]) -> str:
    """Return the name of a row without its architecture."""
    if "shape" in row:
        return f"{row['op']} {row['kernel']} {row['dtype']} {row['shape']}"
    return f"{row['kernel']} {row['dtype']} d={row['head_dim']} {row['window']}→{row['key_window']}"


def tiles(config: list[int] | None) -> str:
    """Format block sizes: queries × keys / warps, and stages unless there is one."""
    if config is None:
        return "none"
    block_m, block_n, warps, stages = config
    return f"{block_m}×{block_n}/{warps}" + (f"/{stages}" if stages > 1 else "")


def main() -> int:
    """Compile, print, and write if asked to."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: as many as there are processors)")
    parser.add_argument("--gpu", metavar="NAME", help="only this architecture, such as sm_90")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep compiled kernels here for the next run")
    arguments = parser.parse_args()
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is missing: install savl[triton]", file=sys.stderr)
        return 1
    wanted = [
        row
        for row in all_rows()
        if (arguments.gpu or row.facts()["gpu"]) == row.facts()["gpu"]
        and (arguments.dtype or row.facts()["dtype"]) == row.facts()["dtype"]
    ]
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        measured = compile_rows(wanted, arguments.jobs, lambda: progress.advance(task), arguments.cache)
    content = report(measured)
    if arguments.json:
        write_atomically(arguments.json, dump(content))
    table = Table(title=f"Triton {content['triton']}, {len(measured)} kernels, {time.perf_counter() - start:.0f} s")
    for name in ("kernel", "GPU", "tiles"):
        table.add_column(name)
    for name in ("registers", "stack", "shared", "programs"):
        table.add_column(name, justify="right")
    for row in measured:
        table.add_row(
            named(row),
            row["gpu"],
            tiles(row["config"]),
            *(str(row[name]) for name in ("registers", "stack", "shared", "programs")),
            style="bold red" if row["stack"] else None,
        )
    Console().print(table)
    found = faults(measured)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
