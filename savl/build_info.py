"""How this installation of savl was built: the facts of the C++ extension and of the CUDA library."""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypedDict

import torch

import savl
from savl.cuda_facts import cuda_facts


class BuildInfo(TypedDict):
    """What `build_info` returns. What is not there has None (or nothing) for its facts."""

    version: str
    """Version of the installed package."""
    torch: str
    """Version of the torch that is running."""
    extension: bool
    """Whether the C++ extension is loaded."""
    reason: str | None
    """Why it is not, and what to do; None when it is."""
    extension_version: str | None
    """Version of savl whose sources the extension was compiled from."""
    compiler: str | None
    """Name and version of the compiler, such as ``"GCC 12.2.0"``."""
    cxx_standard: int | None
    """Value of ``__cplusplus``: 202002 is C++20."""
    stable_abi: str | None
    """Oldest torch release that can load the extension, such as ``"2.10"``."""
    built_against_torch: str | None
    """Torch release whose headers it was compiled with. It need not be the one that is running."""
    cuda: bool
    """Whether the CUDA library was built. What keeps it from being used is in ``savl.kernel_report()``."""
    cuda_version: str | None
    """Version of savl whose sources the CUDA library was compiled from."""
    cuda_architectures: tuple[str, ...]
    """Compute capabilities it has code for, such as ``"90"``; drivers compile ``"80+PTX"`` for newer ones too."""
    cuda_compiler: str | None
    """What compiled it, such as ``"nvcc 13.0.88"``."""
    cuda_stable_abi: str | None
    """Oldest torch release that can load it."""
    instruction_sets: tuple[str, ...]
    """Those this processor has, of the ones the kernels care about: ``"avx2"``, ``"neon"`` and so on."""
    kernel_instruction_set: str | None
    """The one the CPU kernels use: ``"avx512"``, ``"avx2"`` or ``"portable"``."""


def build_info() -> BuildInfo:
    """Report how savl was built.

    Returns:
        The facts, as a plain dictionary. Never raises: a missing or broken extension is a fact too, told in
        ``reason``.
    """
    facts, reason = _extension_facts()
    cuda = cuda_facts()
    return BuildInfo(
        version=savl.__version__,
        torch=str(torch.__version__),
        extension=reason is None,
        reason=reason,
        extension_version=facts.get("version"),
        compiler=facts.get("compiler"),
        cxx_standard=facts.get("cxx_standard"),
        stable_abi=facts.get("stable_abi"),
        built_against_torch=facts.get("torch"),
        cuda=cuda is not None,
        cuda_version=None if cuda is None else cuda["version"],
        cuda_architectures=() if cuda is None else tuple(cuda["architectures"]),
        cuda_compiler=None if cuda is None else cuda["compiler"],
        cuda_stable_abi=None if cuda is None else cuda["stable_abi"],
        instruction_sets=facts.get("instruction_sets", ()),
        kernel_instruction_set=facts.get("kernel_instruction_set"),
    )


def _extension_facts() -> tuple[dict[str, Any], str | None]:
    """Return what ``savl._C`` says of itself, and why it says nothing."""
    try:
        # Imported by name, so that type checking does not depend on what was built here. The library finds
        # libtorch because the import of torch above has loaded it.
        return import_module("savl._C").build_facts(), None
    except ModuleNotFoundError as error:
        return {}, (
            f"{error}: savl was installed without its C++ extension, for want of a compiler or because "
            "SAVL_NO_EXTENSION was set. `pip install -v` shows what the build says."
        )
    except Exception as error:  # whatever is wrong with the library, the report must come out
        return {}, f"{type(error).__name__}: {error}. The C++ extension does not load: install savl again."
