"""The CUDA library is loaded if it can be used; otherwise the reason is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import savl
from savl.ops import gpu, library


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((9, 0), ["80", "90"], True),
        ((8, 7), ["86"], True),  # machine code serves its major version from its minor on
        ((8, 0), ["86"], False),
        ((10, 0), ["80", "90"], False),
        ((11, 0), ["80+PTX", "90"], True),  # a driver compiles PTX for what is newer
        ((7, 5), ["80+PTX"], False),
    ],
)
def test_a_gpu_is_served_by_its_own_code_or_older_ptx(
    capability: tuple[int, int], architectures: list[str], served: bool
) -> None:
    reason = gpu.why_no_code(capability, architectures)
    assert (reason is None) == served
    assert served or f"{capability[0]}.{capability[1]}" in (reason or "")


FACTS: dict[str, Any] = {
    "version": savl.__version__,
    "stable_abi": "2.10",
    "architectures": ["90"],
    "compiler": "nvcc 13.0.88",
    "runtime": 13000,
}


@pytest.fixture
def cuda_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Simulate torch with CUDA, a GPU, a CUDA library and a driver. Tests make one of them fail."""
    world: dict[str, Any] = {"gpu": True, "facts": FACTS, "driver": 13000, "loaded": []}
    (tmp_path / "_cuda.so").touch()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(library, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(world["gpu"]))
    monkeypatch.setattr(library, "cuda_facts", lambda: world["facts"])
    monkeypatch.setattr(library, "driver_version", lambda: world["driver"])
    monkeypatch.setattr(torch.ops, "load_library", world["loaded"].append)
    return world


def test_where_nothing_is_wrong_the_cuda_library_is_loaded(cuda_world: dict[str, Any]) -> None:
    assert library.load_cuda_library() is None
    assert cuda_world["loaded"] == [str(library.CUDA_LIBRARY)]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ({"gpu": False}, "no CUDA GPU"),
        ({"facts": {}}, "the CUDA library has an unknown version"),
        ({"facts": {**FACTS, "version": "0.0.9"}}, "has version 0.0.9, but savl has version"),
        ({"driver": 12080}, "the driver supports CUDA 12.8, but the CUDA library was built with CUDA 13.0"),
    ],
)
def test_an_unusable_cuda_library_is_reported_and_not_loaded(
    failure: dict[str, Any], reason: str, cuda_world: dict[str, Any]
) -> None:
    cuda_world.update(failure)
    assert reason in (library.load_cuda_library() or "")
    assert not cuda_world["loaded"]


def test_a_missing_or_broken_cuda_library_is_reported(
    cuda_world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError("undefined symbol: torch_new_thing")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert "could not be loaded (OSError: undefined symbol: torch_new_thing)" in (library.load_cuda_library() or "")
    library.CUDA_LIBRARY.unlink()
    assert "without its CUDA library" in (library.load_cuda_library() or "")


def test_a_torch_build_without_cuda_is_reported_first() -> None:
    if torch.version.cuda is None:
        assert "built without CUDA" in (library.CUDA_UNAVAILABLE or "")
    else:
        assert (library.CUDA_UNAVAILABLE is None) <= torch.cuda.is_available()
