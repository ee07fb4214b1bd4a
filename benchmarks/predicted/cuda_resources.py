"""Report registers, stack, spills and shared memory of the CUDA C++ kernels for every architecture of a build.

    python -m benchmarks.predicted.cuda_resources    # print a table
    python -m benchmarks.predicted.cuda_resources --json csrc/cuda/resources.json    # update the committed figures
    python -m benchmarks.predicted.cuda_resources --page    # update docs/kernel-resources.md from the committed figures

Needs nvcc but no GPU. A kernel that spills registers or has a stack frame waits for memory instead of computing.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from savl.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "csrc/cuda/resources.json"
PAGE = ROOT / "docs/kernel-resources.md"
BEGIN, END = "<!-- begin: cuda -->\n", "<!-- end: cuda -->\n"

nvcc = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc/cuda/nvcc.py"), run_name="nvcc"))

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<gpu>\S+)'.*?"
    r"(?P<stack_frame>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_NOISE = ("no noise", "eps", "seed")


def measure(toolkit: Any, folder: Path) -> dict[str, Any]:
    """Compile every source for every default architecture.

    Args:
        toolkit: A `Toolkit` of csrc/cuda/nvcc.py.
        folder: The folder for the objects. Objects of an earlier compilation are used again where they are up to date.

    Returns:
        The contents of csrc/cuda/resources.json. Sizes are in bytes, registers are per thread.
    """
    sources = [ROOT / "csrc/cuda" / name for name in nvcc.SOURCES]
    architectures = toolkit.architectures()
    compiled = toolkit.compile(sources, folder, [nvcc.gencode(architectures)])
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for source, (_, said) in zip(sources, compiled, strict=True):
        entries = [match.groupdict() for match in _ENTRY.finditer(said)]
        for entry, name in zip(entries, readable([entry["name"] for entry in entries]), strict=True):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            kernels.setdefault(f"{source.name}: {name}", {})[entry["gpu"]] = {
                "registers": int(entry["registers"]),
                "shared": int(shared[1]) if shared else 0,
                **{key: int(entry[key]) for key in ("stack_frame", "spill_stores", "spill_loads")},
            }
    return {
        "nvcc": toolkit.version,
        "architectures": [f"sm_{each.number}" for each in architectures],
        "kernels": {name: kernels[name] for name in sorted(kernels)},
    }


def readable(names: list[str]) -> list[str]:
    """Return short, demangled names of kernels, or the names themselves where c++filt is missing."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    plain = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_shortened(line) for line in plain.splitlines()]


def _shortened(name: str) -> str:
    name = re.sub(r"^void savl::gpu::kernel<(.*?)>\s*\(.*$", r"\1", name).replace("savl::gpu::", "").strip()
    name = re.sub(r"\(NoiseSource\)(\d)", lambda match: _NOISE[int(match[1])], name)
    if name.startswith("GaussianPosterior"):
        return name.replace("true", "planar").replace("false", "interleaved")
    return name.replace("true", "beta").replace("false", "no beta")


def problems(report: dict[str, Any]) -> list[str]:
    """Return a message for every spill, every stack frame, and every kernel that is missing for an architecture."""
    found = []
    for name, gpus in report["kernels"].items():
        if missing := set(report["architectures"]) - set(gpus):
            found.append(f"{name} is missing for {', '.join(sorted(missing))}")
        for gpu, used in gpus.items():
            for what in ("stack_frame", "spill_stores", "spill_loads"):
                if used[what]:
                    found.append(f"{name} on {gpu}: {used[what]} bytes of {what.replace('_', ' ')}")
    return found


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table: registers for each architecture, shared memory, and the sum of stack and spills."""
    gpus = report["architectures"]
    lines = [
        f"The kernels were compiled with nvcc {report['nvcc']}. The columns of the architectures list registers per",
        "thread. Blocks have 256 threads, and shared memory is the static shared memory of a block.\n",
        f"| kernel | {' | '.join(gpus)} | shared | stack and spills |",
        f"|---|{'---:|' * len(gpus)}---:|---:|",
    ]
    for name, used in report["kernels"].items():
        registers = " | ".join(str(used[gpu]["registers"]) for gpu in gpus)
        shared = max(each["shared"] for each in used.values())
        spilt = sum(each[what] for each in used.values() for what in ("stack_frame", "spill_stores", "spill_loads"))
        lines.append(f"| `{name.partition(': ')[2]}` | {registers} | {shared / 1024:.1f} KiB | {spilt} |")
    return "\n".join(lines) + "\n"


def write_page(report: dict[str, Any]) -> None:
    """Put the table between the markers of docs/kernel-resources.md."""
    write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), report).encode())


def with_table(page: str, report: dict[str, Any]) -> str:
    """Return the page with the table between its markers."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + table(report) + page[end:]


def main() -> int:
    """Run the command line: measure and print, and write what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument(
        "--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)} from the committed figures"
    )
    arguments = parser.parse_args()
    if arguments.page:
        write_page(json.loads(COMMITTED.read_text(encoding="utf-8")))
        return 0
    toolkit = nvcc.Toolkit.find()
    if toolkit is None:
        print("no nvcc found: set CUDA_HOME, or put nvcc on the PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        report = measure(toolkit, Path(folder))
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))
    for problem in problems(report):
        print(problem, file=sys.stderr)
    return 1 if problems(report) else 0


if __name__ == "__main__":
    sys.exit(main())
