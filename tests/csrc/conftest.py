"""Fixtures of the tests of csrc: the CUDA kernels compiled for the host, in place of savl's ops."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.predicted import cuda_resources
from savl.ops import KernelSettings, channel_modulation, gaussian_posterior
from savl.ops.library import EAGER
from savl.ops.op import OPS, Op

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def twin_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled and loaded csrc/twin, with the sanitizers that SAVL_SANITIZE names."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("twin") / "twin.so"
    torch_root = Path(torch.__file__).parent
    wanted = os.environ.get("SAVL_SANITIZE")
    sanitizers = (
        [f"-fsanitize={wanted}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"] if wanted else []
    )
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden"]
    command += [*sanitizers, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{torch_root / 'include'}", str(ROOT / "csrc/twin/twin.cpp")]
    command += [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))
    for op in (gaussian_posterior, channel_modulation):  # as savl's own are
        record = OPS[op.__name__]
        name = f"savl_twin::{record.name}"
        torch.library.register_autograd(name, record.backward, setup_context=record.setup_context)
    return ctypes.CDLL(str(library))


@pytest.fixture
def twin(twin_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The twin in place of savl's ops, for every dtype, wherever the kernel settings are not eager."""

    def serves(op: Op, kernels: KernelSettings, *tensors: torch.Tensor | None) -> bool:
        return bool(getattr(kernels, op.name) != EAGER)

    monkeypatch.setattr(torch.ops, "savl", torch.ops.savl_twin)
    for function in (gaussian_posterior, channel_modulation):
        monkeypatch.setitem(function.__globals__, "serves", serves)
    return torch.ops.savl_twin


@pytest.fixture(scope="session")
def toolkit() -> Any:
    """The CUDA toolkit. The test is skipped where there is none."""
    found = cuda_resources.nvcc.Toolkit.find()
    if found is None:
        pytest.skip("no nvcc found: set CUDA_HOME, or put nvcc on the PATH")
    return found


@pytest.fixture(scope="session")
def cuda_objects() -> Path:
    """The folder of compiled kernels. An editable install leaves objects there, which are used again if up to date."""
    return ROOT / "build/cuda"
