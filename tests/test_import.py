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


def test_neither_import_savl_nor_upscaling_loads_packages_that_are_not_needed(tmp_path: Path) -> None:
    # Compared with torch alone, which may load Triton for itself.
    code = """
import json, sys, numpy, torch
before = set(sys.modules)
import savl
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
from savl.images.format import PNG
from savl.images.write import write_image
write_image("photo.png", numpy.zeros((24, 32, 3), numpy.uint8), image_format=PNG)
before = set(sys.modules)
from savl.cli import main
try:
    main(["upscale", "photo.png", "-o", "large.png"])
except SystemExit as stop:
    assert not stop.code
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    lines = run_python(code, tmp_path).splitlines()
    imported, loaded = set(json.loads(lines[0])), set(json.loads(lines[-1]))
    assert "savl" in imported
    assert not imported & {"triton", "pyvips", "matplotlib", "typer", "rich", "torchmetrics", "PIL"}
    assert (tmp_path / "large.png").exists()
    assert "savl.inference.upscaler" in loaded
    assert not loaded & {
        "torch._dynamo", "torch._inductor", "triton", "sympy", "torchmetrics", "torchvision", "matplotlib", "sklearn",
        "scipy", "kornia", "PIL", "pydantic",
    }  # fmt: skip
    assert not {name for name in loaded if name.startswith(("savl.analysis", "savl.evaluation", "savl.training"))}


def test_help_loads_neither_torch_nor_image_libraries(tmp_path: Path) -> None:
    code = """
import json, sys
from savl.cli import main
for command in ("", "upscale", "degrade", "kernels verify", "profile"):
    try:
        main([*command.split(), "--help"])
    except SystemExit as stop:
        assert not stop.code
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(json.loads(run_python(code, tmp_path).splitlines()[-1]))
    assert "savl.cli.app" in loaded
    assert not loaded & {"torch", "numpy", "pyvips", "PIL", "safetensors", "matplotlib", "kornia"}


def test_kernels_package_imports_without_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import savl.kernels; print(savl.kernels.__name__)"
    assert run_python(code, tmp_path) == "savl.kernels"
