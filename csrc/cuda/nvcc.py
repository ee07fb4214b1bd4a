"""Compiles the CUDA kernels: which nvcc, for which GPUs, with what. Shared by setup.py and the resource table.

nvcc is called directly: torch's CUDAExtension wants a torch with CUDA, and these kernels compile beside any torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "SAVL_CUDA_ARCHS"
DEFAULT = "80+PTX;86;89;90;100;120"
"""Code for every GPU from Ampere on. The PTX is for those to come, and for 11.0."""

CSRC = Path(__file__).resolve().parents[1]
SOURCES = (  # the one that takes longest comes first
    "gaussian_posterior.cu",
    "gaussian_posterior_backward.cu",
    "channel_modulation.cu",
    "gaussian_posterior_statistics.cu",
)
# What the assembler says of registers and spills costs nothing and goes into the resource table.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-Xcompiler=-ffile-prefix-map={CSRC.parent}/=",  # no message names a folder of the machine that compiled it
    "-Xptxas=-v",
    f"-I{CSRC}",
)


@dataclass(frozen=True)
class Architecture:
    """A compute capability to compile for, such as 90, and whether its PTX is kept too."""

    number: int
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.number}+PTX" if self.ptx else str(self.number)


def gencode(architectures: Sequence[Architecture]) -> str:
    """What nvcc wants to hear.

    All machine code is made from the PTX of the lowest: nothing in these kernels gains from a newer one, and making it
    takes longer than any one GPU's code.
    """
    lowest = f"compute_{architectures[0].number}"
    kept = [lowest] if architectures[0].ptx else []
    return f"-gencode=arch={lowest},code=[{','.join([*kept, *(f'sm_{each.number}' for each in architectures)])}]"


def parse_architectures(text: str) -> tuple[Architecture, ...]:
    """Read a list of architectures.

    Args:
        text: Numbers such as ``90`` or ``9.0``, separated by semicolons, commas or spaces. ``+PTX`` after any of them
            keeps the PTX, from which a driver compiles for newer GPUs; it is that of the lowest.

    Returns:
        The architectures, the lowest first, which has the PTX.

    Raises:
        ValueError: It says something else, or names nothing.
    """
    numbers: set[int] = set()
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", item, re.IGNORECASE)
        number = int(match[1] + match[2]) if match else 0
        if match is None or number < 80:
            raise ValueError(
                f"{VARIABLE} must be a list of compute capabilities from 8.0 on such as '90' or '80;90+PTX', "
                f"got {text!r}" + (f" ({item!r} is none)" if item else "")
            )
        numbers.add(number)
    ptx = "+ptx" in text.lower()
    return tuple(Architecture(number, ptx and number == min(numbers)) for number in sorted(numbers))


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, by its compiler."""

    nvcc: str
    version: str
    """Such as ``"13.0.88"``."""
    known: tuple[int, ...]
    """The architectures that it compiles for."""

    @property
    def runtime(self) -> int:
        """The version as CUDA packs it: 13000 is 13.0."""
        major, minor, *_ = (int(part) for part in self.version.split("."))
        return 1000 * major + 10 * minor

    @classmethod
    def find(cls) -> Toolkit | None:
        """The toolkit of ``CUDA_HOME`` or ``CUDA_PATH``, the one on the PATH, or the one in /usr/local/cuda.

        Raises:
            OSError: There is a compiler that does not run.
            subprocess.SubprocessError: It says that it failed.
            ValueError: It does not say its version.
        """
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        nvcc = next(
            filter(
                None, [*(_executable(home) for home in homes), shutil.which("nvcc"), _executable("/usr/local/cuda")]
            ),
            None,
        )
        if nvcc is None:
            return None
        version = re.search(r"V(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
        if version is None:
            raise ValueError(f"{nvcc} --version names no version")
        known = re.findall(r"compute_(\d+)\b", _output(nvcc, "--list-gpu-arch"))
        return cls(nvcc, version[1], tuple(sorted(map(int, known))))

    def architectures(self, wanted: str | None = None) -> tuple[Architecture, ...]:
        """What to compile for.

        Args:
            wanted: What ``SAVL_CUDA_ARCHS`` says; None or nothing for the default, of which an architecture is left
                out that this toolkit does not know.

        Raises:
            ValueError: Something else is wanted than this toolkit can compile.
        """
        if wanted and wanted.strip():
            chosen = parse_architectures(wanted)
            if unknown := [str(each.number) for each in chosen if each.number not in self.known]:
                raise ValueError(
                    f"{VARIABLE} must name architectures that nvcc {self.version} compiles for "
                    f"({', '.join(str(number) for number in self.known if number >= 80)}), got {wanted!r}: "
                    f"not {', '.join(unknown)}"
                )
            return chosen
        chosen = tuple(each for each in parse_architectures(DEFAULT) if each.number in self.known)
        if not chosen:
            raise ValueError(f"nvcc {self.version} compiles for none of {DEFAULT}")
        return (Architecture(chosen[0].number, ptx=True), *chosen[1:])

    def compile(
        self, sources: Sequence[Path], folder: Path, flags: Sequence[str], *, jobs: int | None = None
    ) -> list[tuple[Path, str]]:
        """Compile sources side by side. What was compiled before from the same text in the same way is kept.

        Args:
            sources: Files under csrc.
            folder: Where the objects go.
            flags: For nvcc, beside `FLAGS`.
            jobs: Compilers at once; None for one per processor, or ``MAX_JOBS``.

        Returns:
            For each source the object, and what the compiler said.

        Raises:
            OSError: The compiler does not run.
            RuntimeError: It failed; the message is what it said.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if jobs is None:
            jobs = int(os.environ.get("MAX_JOBS") or 0) or len(os.sched_getaffinity(0))
        threads = max(1, jobs // len(sources))
        headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
        text = b"".join(path.read_bytes() for path in headers)

        def compile_one(source: Path) -> tuple[Path, str]:
            target = folder / f"{source.stem}.o"
            said = folder / f"{source.stem}.txt"
            stamp = folder / f"{source.stem}.sha256"
            command = [self.nvcc, *self._host_compiler(), *FLAGS, *flags, "-c", str(source), "-o", str(target)]
            digest = hashlib.sha256(repr((command, self.version)).encode() + text + source.read_bytes()).hexdigest()
            if not (target.exists() and said.exists() and stamp.exists() and stamp.read_text() == digest):
                stamp.unlink(missing_ok=True)
                said.write_text(_run([*command, f"--threads={threads}"]))
                stamp.write_text(digest)
            return target, said.read_text()

        with ThreadPoolExecutor(max(1, min(jobs, len(sources)))) as pool:
            return list(pool.map(compile_one, sources))

    def link(self, objects: Sequence[Path], target: Path, torch_library_folder: Path, folder: Path) -> None:
        """Make the library. The runtime of CUDA is linked in, torch's libraries are those that a process has loaded.

        libtorch_cuda must be named, or the loader would not look for the stream there; a torch for the CPU has none to
        link with, so an empty library stands in for it.

        Raises:
            OSError: The linker does not run.
            RuntimeError: It failed; the message is what it said.
        """
        empty, stand_in = folder / "empty.cpp", folder / "libtorch_cuda.so"
        empty.write_text("")
        shared = [self.nvcc, *self._host_compiler(), "-shared"]
        _run([*shared, "-cudart=none", "-Xlinker=-soname,libtorch_cuda.so", str(empty), "-o", str(stand_in)])
        libraries = [
            f"-L{torch_library_folder}",
            "-ltorch_cpu",
            f"-L{folder}",
            "-Xlinker=--no-as-needed",
            "-ltorch_cuda",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        _run(
            [
                *shared,
                "-cudart=static",
                "-Xlinker=--exclude-libs,ALL",
                "-Xlinker=-s",
                *map(str, objects),
                *libraries,
                "-o",
                str(target),
            ]
        )

    @staticmethod
    def _host_compiler() -> list[str]:
        compiler = os.environ.get("CXX", "").strip()
        return [f"-ccbin={compiler}"] if compiler and " " not in compiler else []


def _executable(home: str) -> str | None:
    return shutil.which("nvcc", path=str(Path(home, "bin")))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{said.strip()}")
    return said
