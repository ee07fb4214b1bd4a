"""setup.py: the packages, the extension, the CUDA library, and what is built without a compiler."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]

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


def nvcc() -> dict[str, Any]:
    """Return the names that csrc/cuda/nvcc.py defines."""
    return runpy.run_path(str(ROOT / "csrc/cuda/nvcc.py"), run_name="nvcc")


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
    assert "-fno-wrapv" in module.extra_compile_args, "Python's -fwrapv would hide what overflows"


# The CUDA library


class CudaBuild:
    """The build command of setup.py, up to where it builds the CUDA library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **environment: str) -> None:
        # Commands check that they get the Distribution of distutils, which setuptools replaces by its own. An import of
        # pip in this process, by whatever test, would have put the original back.
        monkeypatch.setitem(sys.modules, "distutils.dist", SimpleNamespace(Distribution=setuptools.Distribution))
        arguments = setup_arguments(monkeypatch, SAVL_NO_EXTENSION="0", **environment)
        self.command = arguments["cmdclass"]["build_ext"](setuptools.Distribution({"name": "savl", "version": "1.2.3"}))
        self.command.build_lib, self.command.build_temp = str(folder / "lib"), str(folder / "temp")
        self.library = folder / "lib/savl/_cuda.so"
        self.library.parent.mkdir(parents=True)
        self.library.write_text("from an earlier build")

    def run(self) -> None:
        self.command.build_cuda()


def fake_toolkit(folder: Path, compiles: str) -> str:
    """Create a CUDA toolkit whose nvcc runs the shell command `compiles` to compile. Return its folder."""
    script = folder / "cuda/bin/nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f"""#!/bin/sh
case "$*" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
*) {compiles} ;;
esac
""")
    script.chmod(0o755)
    return str(folder / "cuda")


def test_without_nvcc_the_build_warns_and_leaves_nothing_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pybind11")
    build = CudaBuild(monkeypatch, tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *given, **more: None)
    build.run()
    assert "WITHOUT its CUDA kernels: no nvcc found" in capsys.readouterr().err
    assert not build.library.exists()


def test_an_nvcc_that_fails_is_a_warning_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pybind11")
    home = fake_toolkit(tmp_path, "echo 'unsupported GNU version' >&2; exit 1")
    build = CudaBuild(monkeypatch, tmp_path, CUDA_HOME=home)
    build.run()
    said = capsys.readouterr().err
    assert "WITHOUT its CUDA kernels" in said
    assert "unsupported GNU version" in said
    assert not build.library.exists()


def test_no_cuda_library_is_built_when_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pybind11")
    build = CudaBuild(monkeypatch, tmp_path, CUDA_HOME=fake_toolkit(tmp_path, "exit 1"), SAVL_NO_CUDA="1")
    build.run()
    assert "SAVL_NO_CUDA is set" in capsys.readouterr().err
    assert not build.library.exists()


def test_an_architecture_that_the_toolkit_does_not_know_is_left_out_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path, "exit 1"))
    toolkit = nvcc()["Toolkit"].find()
    assert toolkit.version == "12.4.131"
    assert toolkit.runtime == 12040
    assert [str(each) for each in toolkit.architectures()] == ["80+PTX", "90"]
    assert [str(each) for each in toolkit.architectures("90")] == ["90"]
    with pytest.raises(ValueError, match=r"SAVL_CUDA_ARCHS must name .*\(80, 90\), got '90;120': not 120"):
        toolkit.architectures("90;120")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", ["90"]),
        ("9.0", ["90"]),
        ("80;90+PTX", ["80+PTX", "90"]),
        (" 12.0, 8.6 90+ptx ", ["86+PTX", "90", "120"]),
        ("90;90", ["90"]),
    ],
)
def test_architectures_are_read(text: str, expected: list[str]) -> None:
    assert [str(each) for each in nvcc()["parse_architectures"](text)] == expected


@pytest.mark.parametrize("text", ["hopper", "sm_90", "90a", "75", "9", "90;;x", "90+SASS", ";"])
def test_other_architectures_are_an_error_that_names_the_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    with pytest.raises(ValueError, match=rf"SAVL_CUDA_ARCHS must be .*'80;90\+PTX', got {re.escape(repr(text))}"):
        setup_arguments(monkeypatch, SAVL_NO_EXTENSION="0", SAVL_CUDA_ARCHS=text)


def test_machine_code_for_every_gpu_is_made_from_the_lowest_ptx() -> None:
    functions = nvcc()
    flag = functions["gencode"](functions["parse_architectures"]("80+PTX;90"))
    assert flag == "-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90]"


# The finished package


def test_installed_package_holds_the_kernels_and_no_top_level_kernels() -> None:
    kernels = importlib.import_module("savl.kernels")
    assert kernels.__name__ == "savl.kernels"
    assert (metadata.distribution("savl").read_text("top_level.txt") or "").split() == ["savl"]


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
