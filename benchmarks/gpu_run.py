"""Run all that wants a GPU, in two calls of less than ten minutes that fit into a quarter of an hour together.

    .ci/gpu --plan                  # the parts and their limits; needs no GPU
    .ci/gpu                         # both calls
    .ci/gpu first                   # or second; or single parts, such as: .ci/gpu ratios blocks
    .ci/gpu tests memcheck          # the complete tests, which are in neither call

The order is that of what matters most. A part that fails or is cut off leaves the others their turn, and no part can
hang: at its limit, all its processes are killed. Results are in the folder as soon as a part has them, and parts.json
there says how each part ended. Tuned block sizes are stored in the folder too, where the parts after `tune` find them.

The part `install` builds savl for the GPU at hand only; everything that savl depends on must be installed. The exit
code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import processes

ROOT = Path(__file__).resolve().parents[1]
CALL_LIMIT, WHOLE_LIMIT = 600, 840
"""Limits in seconds of one call, and of both. A quarter of an hour leaves one minute to start the machine."""
FIRST, SECOND, ON_REQUEST = "first", "second", "on request"
FOLDER = "FOLDER"
"""Stands for the folder of the results in commands."""
PROFILE = ("python", "-m", "savl.profile", "--model", "savl-base", "--size", "512x512", "--dtype", "bfloat16",
           "--device", "cuda", "--warm-up", "2", "--steps", "3", "--top", "40", "--overwrite")  # fmt: skip
TUNE = ("python", "-m", "savl", "kernels", "tune", "--dtype", "bfloat16", "--network", "savl-base")
RATIOS = ("python", "-m", "benchmarks.gpu_ratios")
PYTEST = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")
DRIVER = ("--op", "layer_norm", "window_attention", "--dtype", "bfloat16")


@dataclass(frozen=True)
class Part:
    """One command with a limit.

    Attributes:
        name: Name on the command line.
        call: `FIRST`, `SECOND` or `ON_REQUEST`.
        seconds: Limit of the time, after which all its processes have been killed.
        command: The command; `FOLDER` stands for the folder of the results.
        answers: The question that it answers.
        environment: Changes of the environment.
    """

    name: str
    call: str
    seconds: int
    command: tuple[str, ...]
    answers: str
    environment: Mapping[str, str] = field(default_factory=dict)


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For tests, of which there are many, and which compute little on the CPU."""
PARTS = (
    Part("install", FIRST, 90, ("python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."),
         "build for this GPU"),
    Part("equivalence", FIRST, 50, (*PYTEST, "tests/gpu/test_equivalence.py"), "are the kernels right?", ONE_THREAD),
    Part("driver", FIRST, 25, ("python", "tests/gpu/sanitizer_driver.py", *DRIVER), "do they run on odd sizes?",
         ONE_THREAD),
    Part("profile-fused", FIRST, 20, (*PROFILE, "--backend", "fused", "--json", f"{FOLDER}/profile-fused.json"),
         "what does the network spend its time on?"),
    Part("profile-eager", FIRST, 20, (*PROFILE, "--backend", "eager", "--json", f"{FOLDER}/profile-eager.json"),
         "and without fused kernels?"),
    Part("tune-forward", FIRST, 60, (*TUNE, "--stage", "forward"), "which block sizes are fastest, forward?"),
    Part("tune", FIRST, 90, TUNE, "and backward?"),
    Part("ratios", FIRST, 85,
         (*RATIOS, "--only", "window", "overlapping", "network", "window-backward", "overlapping-backward",
          "layer-norm", "--json", f"{FOLDER}/gpu_ratios.json"),
         "are the targets reached? the network also as a CUDA graph"),
    Part("blocks", SECOND, 150,
         (*RATIOS, "--only", "dsca", "hab", "da-rhag", "other-layers", "dsca-max-autotune", "hab-max-autotune",
          "other-layers-max-autotune", "da-rhag-max-autotune", "--json", f"{FOLDER}/gpu_blocks.json"),
         "blocks against max-autotune and as CUDA graphs; the network from them"),
    Part("kernels", SECOND, 100,
         ("python", "-m", "benchmarks.gpu_kernels", "--ncu", f"{FOLDER}/ncu.txt", "--seconds", "90"),
         "what limits each kernel? Nsight Compute, with warp stalls"),
    Part("compile", SECOND, 75,
         (*RATIOS, "--only", "network-fused-compile", "network-compile", "--json", f"{FOLDER}/gpu_compile.json"),
         "is the fused network slower under torch.compile?"),
    Part("racecheck", SECOND, 60, (".ci/compute-sanitizer", "racecheck", "--", *DRIVER), "are there races?",
         ONE_THREAD),
    Part("tests", ON_REQUEST, 900, (*PYTEST, "tests/gpu"), "all tests that need a GPU", ONE_THREAD),
    Part("memcheck", ON_REQUEST, 600, (".ci/compute-sanitizer", "memcheck"), "accesses out of bounds, all ops",
         ONE_THREAD),
    Part("all-ratios", ON_REQUEST, 600, (*RATIOS, "--json", f"{FOLDER}/gpu_ratios.json"), "all targets"),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Part]:
    """Return the parts with these names or in these calls; both calls if there are none.

    Raises:
        ValueError: A name is unknown.
    """
    known = {FIRST, SECOND, *(part.name for part in PARTS)}
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is neither first, second nor one of {', '.join(p.name for p in PARTS)}")
    wanted = names or (FIRST, SECOND)
    return [part for part in PARTS if part.name in wanted or part.call in wanted]


def plan() -> str:
    """Return the parts with their limits, call by call."""
    lines = []
    for call in (FIRST, SECOND, ON_REQUEST):
        parts = [part for part in PARTS if part.call == call]
        total = sum(part.seconds for part in parts)
        lines.append(f"{call}: " + (f"{total} s of {CALL_LIMIT} s" if call != ON_REQUEST else "in neither call"))
        until = 0
        for part in parts:
            until += part.seconds
            place = f"until {until:4} s" if call != ON_REQUEST else " " * 12
            lines.append(f"  {place}  {part.seconds:4} s  {part.name:14} {part.answers}")
            lines.append(f"{'':28}{' '.join(part.command)}")
    total = sum(part.seconds for part in PARTS if part.call != ON_REQUEST)
    lines.append(f"both calls: {total} s of {WHOLE_LIMIT} s")
    return "\n".join(lines)


def run(parts: Sequence[Part], folder: Path) -> dict[str, dict[str, Any]]:
    """Run parts one after the other; write how each ended to parts.json, and its output to log.txt, at once.

    Args:
        parts: The parts.
        folder: Where results go.

    Returns:
        By part, ``state``, ``code``, ``seconds`` and ``limit``; also those of earlier calls in the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "parts.json"
    ended: dict[str, dict[str, Any]] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for part in parts:
        print(f"=== {part.name}, at most {part.seconds} s", flush=True)
        with (folder / "log.txt").open("ab") as log:
            log.write(f"=== {part.name}: {' '.join(part.command)}\n".encode())
            log.flush()
            before = log.tell()
            outcome = processes.run(
                _command(part, folder), part.seconds, output=log, environment=_environment(part, folder), folder=ROOT
            )
        said = (folder / "log.txt").read_bytes()[before:].decode(errors="replace").rstrip().splitlines()
        print("\n".join(said[-25:]))
        print(f"--- {part.name}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
        ended[part.name] = {
            "state": outcome.state,
            "code": outcome.code,
            "seconds": round(outcome.seconds, 1),
            "limit": part.seconds,
        }
        record.write_text(json.dumps(ended, indent=1) + "\n", encoding="utf-8")
    return ended


def _command(part: Part, folder: Path) -> list[str]:
    words = [word.replace(FOLDER, str(folder)) for word in part.command]
    if words[0] == "python":
        words[0] = sys.executable
    if "pytest" in words and find_spec("xdist") is not None:  # most of the time of the tests goes into compiling
        words += ["-n", str(min(os.cpu_count() or 1, 12))]
    return words


def _environment(part: Part, folder: Path) -> dict[str, str]:
    environment = {"SAVL_CACHE_DIR": str(folder), "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **part.environment}
    if part.name == "install" and "SAVL_CUDA_ARCHS" not in os.environ:
        capability = _ask("import torch; print('{}{}'.format(*torch.cuda.get_device_capability()))")
        environment |= {"SAVL_CUDA_ARCHS": capability} if capability else {}
        environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    return environment


def _ask(code: str) -> str | None:
    """Return what Python code prints in another process, so that this one leaves the GPU alone; None if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip() if done.returncode == 0 else None


def default_folder() -> Path:
    """Return the folder for results of the GPU at hand, in benchmarks/results.

    Raises:
        RuntimeError: torch finds no GPU.
    """
    code = "import torch; from benchmarks import machine; print(machine.folder_of({'device': torch.cuda.get_device_name(), 'capability': ''}))"  # noqa: E501
    found = _ask(code)
    if not found:
        raise RuntimeError("torch finds no GPU, or savl cannot be imported; --plan prints the parts without a GPU")
    return Path(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts or print the plan; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=".ci/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="first, second, or names of parts; both if left out")
    parser.add_argument("--plan", action="store_true", help="print the parts with their limits, and run nothing")
    parser.add_argument("--folder", type=Path, help="where results go (default: benchmarks/results/<name of the GPU>)")
    given = parser.parse_args(arguments)
    try:
        parts = chosen(given.parts)
    except ValueError as error:
        parser.error(str(error))
    if given.plan:
        print(plan())
        return 0
    try:
        folder = (given.folder or default_folder()).resolve()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; parts would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = run(parts, folder)
    failed = [part.name for part in parts if ended[part.name]["state"] != processes.OK]
    for name in failed:
        print(f"FAILED: {name}, {ended[name]['state']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
