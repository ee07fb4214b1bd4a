"""examples/run_package.cpp: a package of AOTInductor with fused ops in a program without Python code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from small_savl import small_savl

import savl

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "run_package.cpp"
TORCH = Path(torch.__file__).parent


def compile_program(folder: Path) -> Path:
    """Compile the example as docs/export.md shows."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = Path(str(sysconfig.get_config_var("LIBDIR")), str(sysconfig.get_config_var("LDLIBRARY")))
    if library.suffix != ".so":
        pytest.skip("this Python has no shared library, which savl's extension needs in a program without Python")
    program = folder / "run_package"
    includes = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    libraries = ["-Wl,--no-as-needed", f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10", str(library), "-ldl"]
    paths = f"-Wl,-rpath,{TORCH}/lib:{library.parent}"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, "-std=c++20", "-O0", abi, str(SOURCE), "-o", str(program), *includes, *libraries, paths]
    subprocess.run(command, check=True)
    return program


@pytest.mark.slow
def test_a_program_in_cpp_upscales_an_image_as_python_does(built_extension: ModuleType, tmp_path: Path) -> None:
    model = small_savl()
    package = tmp_path / "network.pt2"
    report = savl.export(model, package)
    assert "window_attention" in report.fused_ops
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    image, result = tmp_path / "lr.ppm", tmp_path / "sr.ppm"
    Image.fromarray(pixels).save(image)
    program, extension = compile_program(tmp_path), str(built_extension.__file__)
    run = subprocess.run([program, package, extension, image, result], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "[1, 3, 9, 14] -> [1, 3, 36, 56]" in run.stdout
    lr = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        sr = (model(lr)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    difference = np.abs(np.asarray(Image.open(result), dtype=np.float64) - sr)
    assert difference.max() <= 0.501  # half a step of rounding
