"""Measure whether other block sizes of the C++ attention kernels are faster on this machine.

    python -m benchmarks.cpu_blocks                 # results/<machine>/cpu_blocks.json, about a minute a variant
    python -m benchmarks.cpu_blocks --rounds 40

Block sizes are constants of the build: the number of query rows whose logits are in the cache at the same time, and the
number of values. Each variant is built into its own folder and timed in its own process. The processes take turns, and
a speedup is the median of the ratios of neighbouring turns. A gain below `LEAST_GAIN` is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from savl.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (16, 64)
VARIANTS = (SHIPPED, (8, 64), (32, 64), (16, 32), (16, 128))
"""Numbers of query rows and of values in a block."""
LEAST_GAIN = 0.03
CASES = ("window", "window-backward", "overlapping", "overlapping-backward")


def build(rows: int, values: int, folder: Path) -> None:
    """Build the extension with other block sizes.

    Raises:
        RuntimeError: The build failed; the message ends with the output of the compiler.
    """
    flags = f"{os.environ.get('CFLAGS', '')} -DSAVL_ROW_BLOCK={rows} -DSAVL_KEY_BLOCK={values}"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(folder / "base")]
    command += ["--build-lib", str(folder / "lib")]
    environment = os.environ | {"SAVL_NO_CUDA": "1", "CFLAGS": flags.strip()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not list((folder / "lib/savl").glob("_C*")):
        raise RuntimeError(f"blocks of {rows} and {values} cannot be built: {done.stderr[-2000:]}")


class Worker:
    """A process that times the kernels of one build when asked."""

    def __init__(self, library: Path) -> None:
        # Passive: threads that wait for work by spinning would take the processors from the process whose turn it is.
        environment = os.environ | {"PYTHONPATH": f"{library}{os.pathsep}{ROOT}", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        loaded = self._ask("where")
        if not loaded.startswith(str(library)):
            raise RuntimeError(f"{loaded} was loaded in place of {library}")

    def seconds(self, case: str) -> float:
        """Return the time of one call in seconds."""
        return float(self._ask(case))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, question: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the process ended with code {self._process.wait()}")
        return answer


def serve() -> None:
    """Answer the requests of `Worker` until its input is closed."""
    import torch

    import savl
    from benchmarks import cases, timing

    run = cases.Run(torch.device("cpu"), torch.float32, 64, compiled=False)
    calls = {}
    for name in CASES:
        op = "window_attention" if name.startswith("window") else "overlapping_window_attention"
        case = cases.op_case(run, op, backward=name.endswith("backward"))
        calls[name] = timing.computation(case, "fused", case.inputs)
    for line in sys.stdin:
        if line.strip() == "where":
            print(savl.__file__, flush=True)
            continue
        call = calls[line.strip()]
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


def compare(workers: dict[tuple[int, int], Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the median time of the shipped build in milliseconds and the speedup of each variant, by case."""
    found = {}
    for case in CASES:
        times: dict[tuple[int, int], list[float]] = {blocks: [] for blocks in workers}
        for turn in range(rounds + 2):
            for blocks, worker in workers.items():
                seconds = worker.seconds(case)
                if turn >= 2:
                    times[blocks].append(seconds)
        gains = {
            f"{rows}x{values}": statistics.median(
                ours / theirs for ours, theirs in zip(times[SHIPPED], times[rows, values], strict=True)
            )
            for rows, values in workers
            if (rows, values) != SHIPPED
        }
        found[case] = {"shipped_ms": 1000 * statistics.median(times[SHIPPED]), "times_as_fast": gains}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure, write and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write (default: results/<machine>/)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        serve()
        return 0
    import torch

    from benchmarks import machine

    facts = machine.device_facts(torch.device("cpu"))
    path = given.json or machine.folder_of(facts) / "cpu_blocks.json"
    workers: dict[tuple[int, int], Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rows, values in VARIANTS:
                print(f"building blocks of {rows} rows and {values} values", file=sys.stderr)
                build(rows, values, Path(folder) / f"{rows}x{values}")
                workers[rows, values] = Worker(Path(folder) / f"{rows}x{values}/lib")
            found = compare(workers, given.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    best = max(gain for case in found.values() for gain in case["times_as_fast"].values())
    report = {"machine": facts, "shipped": list(SHIPPED), "rounds": given.rounds, "cases": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))
    print(f"best: {best - 1:+.1%}; less than {LEAST_GAIN:.0%} is noise")
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
