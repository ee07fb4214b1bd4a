"""Facts about how this installation of savl was built: its C++ extension and its CUDA library."""

from __future__ import annotations

import json
import mmap
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

import torch

from savl.version import version

CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")
"""Path of the CUDA library."""


class BuildInfo(TypedDict):
    """Facts about the installation. A library that is missing has None, or an empty tuple, for its facts.

    ``version`` and ``torch`` are the versions that run; ``extension_version`` and ``cuda_version`` those of the savl
    whose sources a library was compiled from; ``stable_abi`` and ``cuda_stable_abi`` the oldest torch that can load it.
    """

    version: str
    torch: str
    extension: bool
    """Whether the C++ extension can be used."""
    reason: str | None
    """Why it cannot be used, and what to do; None if it can."""
    extension_version: str | None
    compiler: str | None
    cxx_standard: int | None
    """Value of ``__cplusplus``: 202002 is C++20."""
    stable_abi: str | None
    built_against_torch: str | None
    """Torch release whose headers the extension was compiled with. It need not be the one that is running."""
    cuda: bool
    """Whether the CUDA library was built. `savl.kernel_report` says whether it can be used."""
    cuda_version: str | None
    cuda_architectures: tuple[str, ...]
    """Compute capabilities it has code for, such as ``"90"``; drivers compile ``"80+PTX"`` for newer ones too."""
    cuda_compiler: str | None
    cuda_stable_abi: str | None
    instruction_sets: tuple[str, ...]
    """Instruction sets of this processor that the kernels distinguish: ``"avx2"``, ``"neon"`` and so on."""
    kernel_instruction_set: str | None
    """Instruction set that the CPU kernels use: ``"amx"``, ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or
    ``"portable"``."""


def build_info() -> BuildInfo:
    """Return how savl was built, as a plain dictionary.

    Never raises: a missing or broken extension is a fact too, explained in ``reason``.
    """
    facts, reason = extension_facts()
    cuda = cuda_facts()
    return BuildInfo(
        version=version(),
        torch=str(torch.__version__),
        extension=reason is None,
        reason=reason,
        extension_version=facts.get("version"),
        compiler=facts.get("compiler"),
        cxx_standard=facts.get("cxx_standard"),
        stable_abi=facts.get("stable_abi"),
        built_against_torch=facts.get("torch"),
        cuda=bool(cuda),
        cuda_version=cuda.get("version"),
        cuda_architectures=tuple(cuda.get("architectures", ())),
        cuda_compiler=cuda.get("compiler"),
        cuda_stable_abi=cuda.get("stable_abi"),
        instruction_sets=facts.get("instruction_sets", ()),
        kernel_instruction_set=facts.get("kernel_instruction_set"),
    )


def extension_facts() -> tuple[dict[str, Any], str | None]:
    """Load the C++ extension; return its facts, and why it cannot be used, or None if it can."""
    try:
        # Imported by name, so that type checking does not depend on what was built here. The extension finds libtorch
        # because torch is imported already.
        facts = import_module("savl._C").build_facts()
    except ModuleNotFoundError:
        return (
            {},
            "savl was installed without its C++ extension savl._C (`pip install -v` shows the output of the build)",
        )
    except Exception as error:  # savl must import whatever is wrong with the extension
        return {}, f"the C++ extension could not be loaded ({type(error).__name__}: {error}); install savl again"
    if facts["version"] != version():
        return facts, f"the C++ extension is of version {facts['version']}, savl of {version()}; install savl again"
    return facts, None


def cuda_facts() -> dict[str, Any]:
    """Return the facts of the CUDA library, read from the file: a torch without CUDA could not load it.

    Returns:
        version, stable_abi, architectures and compiler as in `BuildInfo`, and ``runtime``, the version of CUDA that the
        library needs (13000 is 13.0). Empty if there is no library, or it contains no facts.
    """
    mark = b"savl_cuda_facts="
    try:
        with CUDA_LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(mark) + len(mark)
            facts: dict[str, Any] = json.loads(content[start : content.find(b"\0", start)])
            return facts
    except (OSError, ValueError):
        return {}
