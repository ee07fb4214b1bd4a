"""How savl is built, installed and imported."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

import savl
from savl.build_info import BuildInfo, build_info

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, folder: Path) -> str:
    """Run a program in a fresh interpreter, outside the source tree, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def extension() -> ModuleType:
    """The extension module; the test is skipped where savl was installed without it."""
    return pytest.importorskip("savl._C", reason=str(build_info()["reason"]), exc_type=ImportError)


def project_version() -> str:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match, "pyproject.toml has no version line"
    return match[1]


# The facts


def test_build_info_has_every_fact_it_promises() -> None:
    assert set(build_info()) == set(BuildInfo.__annotations__)


def test_version_is_the_one_in_pyproject() -> None:
    assert savl.__version__ == project_version(), "the installed metadata is old: install savl again"
    assert build_info()["version"] == project_version()


def test_extension_is_either_loaded_or_explained() -> None:
    info = build_info()
    assert info["extension"] == (info["reason"] is None)
    assert info["torch"] == torch.__version__


def test_facts_of_the_extension_are_consistent(extension: ModuleType) -> None:
    info = build_info()
    assert info["extension"], info["reason"]
    assert info["extension_version"] == savl.__version__, "the extension is old: install savl again"
    assert re.fullmatch(r"(GCC|Clang|MSVC) \d.*", info["compiler"] or "")
    assert info["cxx_standard"] is not None
    assert info["cxx_standard"] >= 202002
    assert info["stable_abi"] == "2.10"
    assert re.match(r"2\.\d+\.\d+", info["built_against_torch"] or "")
    assert info["cuda"] is False


def test_instruction_sets_are_those_torch_sees(extension: ModuleType) -> None:
    found = build_info()["instruction_sets"]
    assert len(set(found)) == len(found)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert {"avx2", "fma", "avx512f"} <= set(found)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert {"avx2", "fma"} <= set(found)


def test_extension_uses_no_symbol_of_torch_outside_the_stable_shim(extension: ModuleType) -> None:
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("nm lists the symbols on Linux only")
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", str(extension.__file__)], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    # The shim is C; a C++ name begins with its namespace: _ZN5torch..., _ZNK3c10..., _ZTVN2at...
    unstable = [name for name in symbols if re.match(r"_Z(T[ISV])?N[VK]*(5torch|3c10|2at)\d", name)]
    assert not unstable, f"these bind the extension to one release of torch: {unstable}"


def test_the_extension_serves_another_release_of_torch(extension: ModuleType, tmp_path: Path) -> None:
    python = os.environ.get("SAVL_TEST_OTHER_PYTHON")
    if not python:
        pytest.skip("SAVL_TEST_OTHER_PYTHON names no interpreter with another torch (docs/environment.md)")
    code = """
import torch
from savl.ops.equivalence import verify
from savl.ops.switch import OPS
off = [verdict for op in OPS for verdict in verify(op, "cpp") if not verdict.worst.kept]
assert not off, off
print(torch.__version__)
"""
    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != torch.__version__, "the other interpreter has the same torch: nothing was shown"


# The sources


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


# Without the extension


def test_build_info_says_why_when_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "savl._C", None)
    info = build_info()
    assert not info["extension"]
    assert "savl._C" in (info["reason"] or "")
    assert info["compiler"] is None
    assert info["instruction_sets"] == ()


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: torch_new_thing"), OSError("not a library"), RuntimeError("bad")]
)
def test_build_info_reports_a_broken_extension_and_does_not_raise(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib.import_module("savl.build_info"), "import_module", fail)
    info = build_info()
    assert not info["extension"]
    assert str(error) in (info["reason"] or "")


def test_savl_imports_without_the_extension(tmp_path: Path) -> None:
    code = "import sys; sys.modules['savl._C'] = None; import savl; print(savl.__version__)"
    assert run_python(code, tmp_path) == savl.__version__


def test_importing_savl_loads_no_optional_or_slow_package(tmp_path: Path) -> None:
    # Compared with torch alone, which may load Triton for itself.
    code = """
import json, sys, torch
before = set(sys.modules)
import savl
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    loaded = set(json.loads(run_python(code, tmp_path)))
    assert "savl" in loaded
    assert not loaded & {"triton", "pyvips", "matplotlib", "typer", "rich", "torchmetrics", "PIL"}


# The packages


def setup_arguments(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """Run setup.py with `setup` replaced, and return what it was called with."""
    arguments: dict[str, Any] = {}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_setup_maps_kernels_to_savl_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = setup_arguments(monkeypatch, SAVL_NO_EXTENSION="1")
    assert arguments["package_dir"]["savl.kernels"] == "kernels"
    assert {"savl", "savl.network", "savl.ops", "savl.kernels"} <= set(arguments["packages"])
    assert all(name.partition(".")[0] == "savl" for name in arguments["packages"])


def test_no_extension_is_built_when_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ext_modules" not in setup_arguments(monkeypatch, SAVL_NO_EXTENSION="1")
    assert "SAVL_NO_EXTENSION" in capsys.readouterr().err


def test_extension_targets_the_stable_abi_and_links_only_libtorch_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pybind11")
    (module,) = setup_arguments(monkeypatch, SAVL_NO_EXTENSION="0")["ext_modules"]
    assert module.name == "savl._C"
    assert ("TORCH_TARGET_VERSION", "0x020a000000000000") in module.define_macros
    assert module.libraries == ["torch_cpu"]
    assert module.optional


def test_sanitizers_are_compiled_in_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    arguments = setup_arguments(monkeypatch, SAVL_NO_EXTENSION="0", SAVL_SANITIZE="address,undefined")
    (module,) = arguments["ext_modules"]
    assert "-fsanitize=address,undefined" in module.extra_compile_args
    assert "-fsanitize=address,undefined" in module.extra_link_args


def test_installed_package_holds_the_kernels_and_no_top_level_kernels() -> None:
    kernels = importlib.import_module("savl.kernels")
    assert kernels.__name__ == "savl.kernels"
    assert (metadata.distribution("savl").read_text("top_level.txt") or "").split() == ["savl"]


def test_kernels_package_imports_without_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import savl.kernels; print(savl.kernels.__name__)"
    assert run_python(code, tmp_path) == "savl.kernels"


def test_build_without_a_compiler_warns_and_still_gives_the_package(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for name in ("savl", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    nothing = str(tmp_path / "no-such-compiler")
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "built"],
        cwd=tree,
        env={**os.environ, "CC": nothing, "CXX": nothing, "SAVL_NO_EXTENSION": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WITHOUT its C++ extension" in built.stderr
    assert (tree / "built/savl/__init__.py").exists()
    assert (tree / "built/savl/kernels/__init__.py").exists()
    assert not list((tree / "built").rglob("_C*"))


def test_triton_is_never_pinned() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert not [pin for pin in pins if pin.startswith("triton")]
