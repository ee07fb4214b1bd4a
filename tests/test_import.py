"""`import savl` in a fresh interpreter: what it needs, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import savl


def run_python(code: str, folder: Path) -> str:
    """Run a program in a fresh interpreter, outside the source tree, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


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


def test_kernels_package_imports_without_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import savl.kernels; print(savl.kernels.__name__)"
    assert run_python(code, tmp_path) == "savl.kernels"
