"""Compile the CUDA kernels: find the toolkit, choose the architectures and the flags.

setup.py and benchmarks/predicted/cuda_resources.py use this module.

nvcc is called directly, because torch's CUDAExtension needs a torch with CUDA; these kernels compile with any torch.
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
"""Machine code for every GPU from Ampere on. Drivers compile the PTX for newer GPUs and for compute capability 11.0."""

CSRC = Path(__file__).resolve().parents[1]
SOURCES = (  # the one that takes longest comes first
    "gaussian_posterior.cu",
    "gaussian_posterior_backward.cu",
    "channel_modulation.cu",
    "gaussian_posterior_statistics.cu",
)
# -Xptxas=-v prints registers and spills, which go into the table of benchmarks/predicted/cuda_resources.py.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-Xcompiler=-ffile-prefix-map={CSRC.parent}/=",  # error messages name no folder of this machine
    "-Xptxas=-v",
    f"-I{CSRC}",
)


@dataclass(frozen=True)
class Architecture:
    """A compute capability to compile for, such as 90, and whether the library also holds its PTX."""

    number: int
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.number}+PTX" if self.ptx else str(self.number)


def gencode(architectures: Sequence[Architecture]) -> str:
    """Return the flag that tells nvcc what to compile for.

    All machine code is made from the PTX of the lowest architecture. These kernels gain nothing from the PTX of a newer
    one, and making another PTX takes longer than making the machine code of one GPU.
    """
    lowest = f"compute_{architectures[0].number}"
    kept = [lowest] if architectures[0].ptx else []
    return f"-gencode=arch={lowest},code=[{','.join([*kept, *(f'sm_{each.number}' for each in architectures)])}]"


def parse_architectures(text: str) -> tuple[Architecture, ...]:
    """Parse a list of architectures.

    Args:
        text: Numbers such as ``90`` or ``9.0``, separated by semicolons, commas or spaces. ``+PTX`` after any of them
            keeps the PTX of the lowest architecture, from which a driver compiles for newer GPUs.

    Returns:
        The architectures in ascending order. Only the first can have the PTX.

    Raises:
        ValueError: The text is not such a list, or names an architecture below 80.
    """
    numbers: set[int] = set()
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", item, re.IGNORECASE)
        number = int(match[1] + match[2]) if match else 0
        if match is None or number < 80:
            raise ValueError(
                f"{VARIABLE} must be a list of compute capabilities from 8.0 on such as '90' or '80;90+PTX', "
                f"got {text!r}" + (f" ({item!r} is not one)" if item else "")
            )
        numbers.add(number)
    ptx = "+ptx" in text.lower()
    return tuple(Architecture(number, ptx and number == min(numbers)) for number in sorted(numbers))


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, represented by its compiler."""

    nvcc: str
    version: str
    """The version of nvcc, such as ``"13.0.88"``."""
    known: tuple[int, ...]
    """The compute capabilities that nvcc compiles for, such as 90, in ascending order."""

    @property
    def runtime(self) -> int:
        """Return the version as CUDA's runtime reports it: 13000 is 13.0."""
        major, minor, *_ = (int(part) for part in self.version.split("."))
        return 1000 * major + 10 * minor

    @classmethod
    def find(cls) -> Toolkit | None:
        """Return the toolkit of ``CUDA_HOME`` or ``CUDA_PATH``, the one on the PATH, or the one in /usr/local/cuda.

        Returns:
            The first of these that is found, or None.

        Raises:
            OSError: nvcc was found, but cannot be run.
            subprocess.SubprocessError: nvcc returned an error.
            ValueError: nvcc did not print its version.
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
        """Return the architectures to compile for.

        Args:
            wanted: The value of ``SAVL_CUDA_ARCHS``. None or an empty string selects `DEFAULT`, without the
                architectures that this toolkit does not know.

        Raises:
            ValueError: The toolkit does not compile for one of the wanted architectures.
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
        """Compile sources in parallel. An object that is up to date, with the same flags, is not compiled again.

        Args:
            sources: Files of csrc/cuda.
            folder: The folder for the objects.
            flags: Flags for nvcc in addition to `FLAGS`.
            jobs: The number of compilers that run at the same time. None for ``MAX_JOBS``, or for one per processor
                where that is not set.

        Returns:
            For each source, the path of the object and the messages of the compiler.

        Raises:
            OSError: nvcc cannot be run.
            RuntimeError: nvcc returned an error. The message is that of nvcc.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if jobs is None:
            jobs = int(os.environ.get("MAX_JOBS") or 0) or _processors()
        threads = max(1, jobs // len(sources))
        headers = sorted(path for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in CSRC.glob(pattern))
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
        """Link the library. It contains the CUDA runtime, and uses the libraries of torch that a process has loaded.

        The library must name libtorch_cuda as a dependency, because the loader finds the function that returns the
        stream there. A torch without CUDA has no such library to link with, so an empty library of that name replaces
        it during linking.

        Raises:
            OSError: nvcc cannot be run.
            RuntimeError: nvcc returned an error. The message is that of nvcc.
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


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
