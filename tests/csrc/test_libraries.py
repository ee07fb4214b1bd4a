"""The compiled libraries of csrc/: their symbols, other releases of torch, and other processors; and its headers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from savl.build_info import CUDA_LIBRARY as LIBRARY
from savl.out_of_memory import is_out_of_memory

ROOT = Path(__file__).resolve().parents[2]


def cuda_library() -> Path:
    """The CUDA library; the test is skipped where savl was installed without it."""
    if not LIBRARY.exists():
        pytest.skip("savl was installed without its CUDA library")
    return LIBRARY


@pytest.mark.parametrize("which", ["extension", "cuda"])
def test_no_library_uses_a_symbol_of_torch_outside_the_stable_shim(which: str, request: pytest.FixtureRequest) -> None:
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("nm lists the symbols on Linux only")
    file = cuda_library() if which == "cuda" else request.getfixturevalue("built_extension").__file__
    listing = subprocess.run([nm, "-D", "--undefined-only", str(file)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in symbols), "the search finds too little"
    # The shim is C; a C++ name begins with its namespace: _ZN5torch..., _ZNK3c10..., _ZTVN2at...
    unstable = [name for name in symbols if re.match(r"_Z(T[ISV])?N[VK]*(5torch|3c10|2at)\d", name)]
    assert not unstable, f"these bind the extension to one release of torch: {unstable}"


@pytest.mark.parametrize("which", ["extension", "cuda"])
def test_no_library_names_a_folder_of_the_machine_that_compiled_it(which: str, request: pytest.FixtureRequest) -> None:
    file = cuda_library() if which == "cuda" else Path(request.getfixturevalue("built_extension").__file__)
    # Error messages contain the names of source files and headers. None may begin with a folder of that machine.
    texts = re.findall(rb"\x00([\x21-\x7e]*/[\w.+-]+\.(?:cpp|h|cuh|cu|inl))\x00", file.read_bytes())
    assert any(text.startswith(b"csrc/") for text in texts), "the search finds too little"
    outside = {text.decode() for text in texts if not text.startswith((b"csrc/", b"torch/", b"pybind11/"))}
    assert not outside, f"an error message would name a folder of the machine that compiled savl: {outside}"


MEMORY_REFUSED = """
import resource, torch
from savl import ops
ops.use_fused_kernels()
x, weight = torch.randn(1, 128, 128, 144), torch.ones(144)  # 9 MiB
qkv, table = torch.randn(1, 64, 64, 3 * 144), torch.zeros(31 * 31, 6)
calls = {
    "layer_norm": lambda: ops.layer_norm(x, weight, weight),
    "channel_modulation": lambda: ops.channel_modulation(x, x[..., :1].expand_as(x), None, x),
}
for call in calls.values():
    call()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
for name, call in calls.items():
    try:
        kept = [call() for _ in range(64)]
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux limits a process's memory")
def test_a_kernel_without_memory_raises_the_error_of_torch(built_extension: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_REFUSED],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2, done.stdout
    for line in lines:
        assert is_out_of_memory(RuntimeError(line)), line
        assert "API call failed" not in line, line


def run_elsewhere(code: str, folder: Path) -> str:
    """Run a program with this savl in an interpreter that has another torch, and return its output."""
    python = os.environ.get("SAVL_TEST_OTHER_PYTHON")
    if not python:
        pytest.skip("SAVL_TEST_OTHER_PYTHON names no interpreter with another torch (docs/environment.md)")
    done = subprocess.run(
        [python, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cuda_library_registers_its_kernels_in_a_torch_with_cuda(tmp_path: Path) -> None:
    file = cuda_library()
    code = f"""
import torch
from savl.ops import library
from savl.ops.op import has_kernel
if torch.version.cuda is not None:
    torch.ops.load_library({str(file)!r})
    ops = "gaussian_posterior", "channel_modulation"
    assert all(has_kernel(op, "cuda") for op in ops), "no kernel"
    reason = library.CUDA_UNAVAILABLE
    assert (reason is None) == torch.cuda.is_available(), reason
print(torch.version.cuda)
"""
    if run_elsewhere(code, tmp_path) == "None":
        pytest.skip("SAVL_TEST_OTHER_PYTHON names an interpreter whose torch has no CUDA")


def test_the_extension_serves_another_release_of_torch(built_extension: ModuleType, tmp_path: Path) -> None:
    code = """
import torch
from savl.ops.equivalence import verify
from savl.ops.op import OPS
off = [verdict for op in OPS for verdict in verify(op, "cpp") if not verdict.worst.kept]
assert not off, off
print(torch.__version__)
"""
    assert run_elsewhere(code, tmp_path) != torch.__version__, "the other interpreter has the same torch"


# Headers and other processors


def compile_csrc(compiler: str, *arguments: str | Path) -> None:
    """Run a compiler with the flags that csrc needs, and fail with its messages."""
    done = subprocess.run(
        [compiler, "-std=c++20", "-fPIC", "-ffp-contract=fast", f"-I{ROOT / 'csrc'}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def compiler() -> str:
    """The C++ compiler; the test is skipped where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or sys.platform == "win32":
        pytest.skip("needs GCC or Clang, and on Windows savl is built without its extension")
    return found


@pytest.mark.parametrize("needs_torch", [False, True], ids=["kernels", "ops"])
def test_every_header_compiles_on_its_own(compiler: str, needs_torch: bool) -> None:
    folders = [ROOT / "csrc", ROOT / "csrc/cpu", ROOT / "csrc/cuda"]
    headers = [header for folder in folders for header in sorted(folder.glob("*.h"))]
    ops = {"torch_errors.h", "layouts.h", "tensors.h", "attention_cosine.h"}
    chosen = [header for header in headers if (header.name in ops or header.stem.endswith("_op")) == needs_torch]
    assert len(chosen) > 6, "the search finds too little"
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{Path(torch.__file__).parent / 'include'}"]
    if not needs_torch and platform.machine() == "x86_64":
        flags = ["-DSAVL_INSTRUCTION_SET=avx2", "-DSAVL_VECTOR_BYTES=32", '-DSAVL_TARGET="avx2,fma"']
    # One call: the compiler reads each file on its own. -w: a #pragma once in a main file is a warning.
    compile_csrc(compiler, *flags, "-w", "-fsyntax-only", "-x", "c++", *chosen)


def test_the_kernels_compile_for_arm64(tmp_path: Path) -> None:
    cross_compiler = shutil.which("aarch64-linux-gnu-g++")
    if cross_compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here (Debian: apt-get install g++-aarch64-linux-gnu)")
    compile_csrc(cross_compiler, "-O1", "-c", ROOT / "csrc/cpu/kernels_portable.cpp", "-o", tmp_path / "kernels.o")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86-64")
@pytest.mark.parametrize("kernels", ["avx512", "avx512_bf16", "amx"])
def test_no_function_compiled_for_avx512_can_replace_a_baseline_function(
    kernels: str, compiler: str, tmp_path: Path
) -> None:
    # The linker keeps one copy of an inline function that two files define. If that were the copy compiled for AVX-512,
    # it would crash a processor without AVX-512. Such copies are weak symbols.
    nm, target = shutil.which("nm"), tmp_path / "kernels.o"
    if nm is None:
        pytest.skip("needs nm")
    compile_csrc(compiler, "-O1", "-c", ROOT / f"csrc/cpu/kernels_{kernels}.cpp", "-o", target)
    listing = subprocess.run([nm, "-C", str(target)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listing.splitlines() if re.search(r" W ", line)]
    assert not weak, f"these may replace functions of the baseline: {weak}"
