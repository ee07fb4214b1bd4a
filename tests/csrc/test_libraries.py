"""What csrc/ is compiled to: symbols, other releases of torch, other processors."""

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
    # Of every source and header, the file names in error messages: no folder above csrc/ or torch/ in them.
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
def test_a_kernel_that_gets_no_memory_says_so_as_torch_does(built_extension: ModuleType) -> None:
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
    """Run a program with this savl in an interpreter that has another torch, and return what it prints."""
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


# Other processors


def compile_kernels(compiler: str, source: str, folder: Path) -> Path:
    target = folder / f"{source}.o"
    command = [compiler, "-std=c++20", "-O2", "-fPIC", "-ffp-contract=fast", "-I", str(ROOT / "csrc")]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "csrc/cpu" / source), "-o", str(target)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_the_kernels_compile_for_arm64(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here (Debian: apt-get install g++-aarch64-linux-gnu)")
    compile_kernels(compiler, "kernels_portable.cpp", tmp_path)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86-64")
def test_nothing_compiled_for_avx512_can_stand_in_for_a_baseline_function(tmp_path: Path) -> None:
    # An inline function of the standard library that two files define is kept once: the copy that was compiled for
    # AVX-512 might be the one, and would crash a processor without it. Such copies are weak symbols.
    compiler, nm = shutil.which(os.environ.get("CXX", "g++")), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs a compiler and nm")
    listing = subprocess.run(
        [nm, "-C", str(compile_kernels(compiler, "kernels_avx512.cpp", tmp_path))],
        capture_output=True,
        text=True,
        check=True,
    )
    weak = [line for line in listing.stdout.splitlines() if re.search(r" W ", line)]
    assert not weak, f"these may replace the baseline's: {weak}"
