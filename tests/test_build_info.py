"""The build information that savl reports."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import savl
from savl.build_info import BuildInfo, build_info

ROOT = Path(__file__).resolve().parents[1]


def project_version() -> str:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match, "pyproject.toml has no version line"
    return match[1]


def test_build_info_has_every_fact_it_promises() -> None:
    assert set(build_info()) == set(BuildInfo.__annotations__)


def test_version_is_the_one_in_pyproject() -> None:
    assert savl.__version__ == project_version(), "the installed metadata is old: install savl again"
    assert build_info()["version"] == project_version()


def test_extension_is_either_loaded_or_explained() -> None:
    info = build_info()
    assert info["extension"] == (info["reason"] is None)
    assert info["torch"] == torch.__version__


def test_facts_of_the_extension_are_consistent(built_extension: ModuleType) -> None:
    info = build_info()
    assert info["extension"], info["reason"]
    assert info["extension_version"] == savl.__version__, "the extension is old: install savl again"
    assert re.fullmatch(r"(GCC|Clang|MSVC) \d.*", info["compiler"] or "")
    assert info["cxx_standard"] is not None
    assert info["cxx_standard"] >= 202002
    assert info["stable_abi"] == "2.10"
    assert re.match(r"2\.\d+\.\d+", info["built_against_torch"] or "")


def test_facts_of_the_cuda_library_are_read_off_the_file() -> None:
    info = build_info()
    assert info["cuda"] == Path(savl.__file__).with_name("_cuda.so").exists()
    if not info["cuda"]:
        pytest.skip("savl was installed without its CUDA library")
    assert info["cuda_version"] == savl.__version__, "the CUDA library is old: install savl again"
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", info["cuda_compiler"] or "")
    assert info["cuda_stable_abi"] == "2.10"
    assert info["cuda_architectures"]
    assert all(re.fullmatch(r"\d{2,3}(\+PTX)?", each) for each in info["cuda_architectures"])


@pytest.mark.parametrize("content", [b"", b"no facts", b"savl_cuda_facts={not json\0", None], ids=repr)
def test_a_file_without_facts_is_no_cuda_library(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_cuda.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(importlib.import_module("savl.build_info"), "CUDA_LIBRARY", file)
    info = build_info()
    assert info["cuda"] is False
    assert info["cuda_architectures"] == ()
    assert info["cuda_compiler"] is None


def test_instruction_sets_are_those_torch_sees(built_extension: ModuleType) -> None:
    found = build_info()["instruction_sets"]
    assert len(set(found)) == len(found)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert {"avx2", "fma", "avx512f"} <= set(found)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert {"avx2", "fma"} <= set(found)


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
