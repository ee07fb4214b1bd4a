"""Packages of AOTInductor: compiled programs that call savl's fused ops, for Python and C++."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from savl.export.errors import ExportError, ExportUnavailable, reason_of
from savl.export.program import quiet, sizes_of_one
from savl.ops.op import OPS

SCHEMAS = "savl.schemas"
"""Key of the metadata with the schemas of the fused ops in a package, one a line."""


def compile_package(program: ExportedProgram, name: str, path: Path, metadata: dict[str, str]) -> None:
    """Compile a program to a package.

    Args:
        program: From `savl.export.program.capture`.
        name: Name of the network, for errors.
        path: The file to write, whose name ends in ``.pt2``.
        metadata: Text to store in the package. The schemas of savl's ops are added, so that a C++ program can register
            them.

    Raises:
        ExportUnavailable: There is no C++ compiler.
        ExportError: The program cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    schemas = [OPS[op].schema for op in fused_ops(program)]
    options = {"aot_inductor.metadata": {**metadata, SCHEMAS: "\n".join(schemas)}}
    try:
        with quiet(), sizes_of_one():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:  # the compiler raises errors of every kind
        if isinstance(error, InvalidCxxCompiler) or isinstance(error.__cause__, InvalidCxxCompiler):
            raise ExportUnavailable("packages of AOTInductor need a C++ compiler, such as g++ or clang++") from error
        raise ExportError(f"{name} cannot be compiled by AOTInductor: {reason_of(error)}") from error


def fused_ops(program: ExportedProgram) -> list[str]:
    """Return the names of savl's fused ops that a program calls, sorted."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return sorted({target.split(".")[1] for target in targets if target.startswith("savl.")})


def runner(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that computes a package.

    Args:
        path: The package.
        device: Device that it was compiled for.

    Raises:
        ExportError: It cannot be loaded.
    """
    from torch._inductor import aoti_load_package

    try:
        program = aoti_load_package(str(path))
    except Exception as error:  # such as a library that lacks a symbol
        raise ExportError(f"the package cannot be loaded: {' '.join(str(error).split())}") from error

    def run(lr: Tensor) -> Tensor:
        with torch.no_grad():
            sr: Tensor = program(lr.to(device))
        return sr.cpu()

    return run
