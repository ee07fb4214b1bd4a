"""docs/adding-an-op.md: its code, put where the page says, adds an op that everything else knows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import savl
from savl.ops.library import EXTENSION_UNAVAILABLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/adding-an-op.md"
OP = "pixel_scale"

# The kernels of the new op alone, for the instructions that every processor has: one file, compiled in seconds.
SOURCE = f"""
#include "cpu/kernels_portable.cpp"
#include "cpu/{OP}.cpp"
namespace savl::cpu {{
const KernelTable& kernels() {{ return portable::kKernels; }}
}}
"""

QUESTIONS = f"""
import json, sys, torch
if len(sys.argv) > 1:
    torch.ops.load_library(sys.argv[1])
import savl
from savl import ops
from savl.ops.equivalence import verify
from savl.ops.op import OPS
x, scale = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
report = savl.kernel_report()
with savl.use_fused_kernels():
    serving = savl.kernel_report().serving({OP!r})
verdicts = list(verify({OP!r}, "cpp", quick=True)) if serving == "cpp" else []
json.dump({{
    "file": savl.__file__,
    "ops": list(OPS),
    "reference": torch.equal(ops.{OP}(x, scale), x * scale[..., None]),
    "setting": ops.KernelSettings({OP}="cpp").{OP},
    "report": [status.backend for status in report.statuses if status.op == {OP!r}],
    "overview": str(report).count({OP!r}),
    "serving": serving,
    "dtypes": [str(verdict.dtype) for verdict in verdicts],
    "wrong": [str(verdict.worst) for verdict in verdicts if not verdict.worst.kept],
}}, sys.stdout)
"""


def blocks() -> list[tuple[str, str, str]]:
    """Return language, file and code of each block of the page that names a file."""
    return re.findall(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)


def changed(text: str, diff: str) -> str:
    """Return the text after a change, written as lines that begin with a space, ``-`` or ``+``."""
    lines = diff.splitlines()
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
    assert text.count(before) == 1, f"the file has {text.count(before)} places like this:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the code of the page in it."""
    root = tmp_path_factory.mktemp("copy")
    package = Path(savl.__file__).parent
    shutil.copytree(package, root / "savl", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "kernels"))
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "savl/kernels").symlink_to(root / "kernels")
    shutil.copytree(ROOT / "csrc", root / "csrc")
    for language, name, code in blocks():
        file = root / name
        if language == "diff":
            file.write_text(changed(file.read_text(), code))
        else:  # the blocks of a file follow each other, two empty lines apart
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{file.read_text()}\n\n{code}" if file.exists() else code)
    return root


def compiled(root: Path) -> list[str]:
    """Return the path of a library with the CPU kernels of the new op; nothing where they cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or EXTENSION_UNAVAILABLE is not None:
        return []
    table = root / "csrc/cpu/kernel_table.h"
    table.write_text(
        re.sub(r"(#define SAVL_FOR_EACH_OP\(X\)).*?(X\(pixel_scale)", r"\1 \2", table.read_text(), flags=re.S)
    )
    source, library = root / "new_op.cpp", root / "new_op.so"
    source.write_text(SOURCE)
    includes = [f"-I{root / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    links = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    flags = [
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command = [compiler, *flags, *includes, str(source), *links, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [str(library)]


def test_the_page_says_how_many_code_files_the_op_touches() -> None:
    count = re.search(r"touches (\d+) code files", PAGE.read_text())
    assert count is not None
    named = {name for _, name, _ in blocks()}
    assert named == set(re.findall(r"^\| `(\S+)` \|", PAGE.read_text(), re.MULTILINE))
    assert len(named) == int(count[1]) <= 12


def test_the_switch_the_report_verification_and_the_reference_know_the_op_of_the_page(copy: Path) -> None:
    libraries = compiled(copy)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SAVL_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS, *libraries],
        cwd=copy,
        env={**environment, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["file"] == str(copy / "savl/__init__.py"), "another savl was imported"
    assert found["ops"][-1] == OP
    assert found["reference"]
    assert found["setting"] == "cpp"
    assert found["report"] == ["triton", "cpp", "eager"]
    assert found["overview"] == 3
    if libraries:
        assert found["serving"] == "cpp"
        assert sorted(set(found["dtypes"])) == ["torch.bfloat16", "torch.float32", "torch.float64"]
        assert found["wrong"] == []
    else:
        assert found["serving"] == "eager"


def test_the_tests_and_the_triton_kernels_of_the_page_are_python(copy: Path) -> None:
    for _, name, _ in blocks():
        if name.endswith(".py"):
            compile((copy / name).read_text(), name, "exec")
