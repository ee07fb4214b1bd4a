"""`export`: make the file, compare it with the network, and write it atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from savl.atomic_write import check_writable, write_atomically
from savl.export import aot_package, onnx_file
from savl.export.check import SizeCheck, check_file, require_agreement
from savl.export.errors import ExportError
from savl.export.program import Upscale, capture, frozen_copy, name_of
from savl.inference.device import checked_dtype
from savl.inference.enlarge import check_strength
from savl.inference.network import accelerated, as_network
from savl.network.savl import SAVL
from savl.network.upscaling import UpscalingNetwork
from savl.version import version

FORMATS = {".onnx": "ONNX", ".pt2": "AOTInductor"}
"""Formats by the suffix of the file."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how it compares with the network.

    Attributes:
        path: The file.
        format: "ONNX" or "AOTInductor".
        architecture: Architecture of the network, such as "SAVL" or "SwinIR".
        bytes: Size of the file.
        opset: Version of ONNX's operators; None for AOTInductor.
        dtype: As given: "float32", "float16" (weights of an ONNX file) or "bfloat16" (AOTInductor).
        fused_ops: Names of savl's fused ops that the file calls; empty for ONNX.
        checks: The comparison with the network, for each size; empty if it was not checked.
    """

    path: Path
    format: str
    architecture: str
    bytes: int
    opset: int | None
    dtype: str
    fused_ops: tuple[str, ...]
    checks: tuple[SizeCheck, ...]

    @property
    def difference(self) -> float | None:
        """Largest difference from the network in PyTorch at any size; None if it was not checked."""
        return max((check.difference for check in self.checks), default=None)

    def __str__(self) -> str:
        kind = f"{self.format}, opset {self.opset}" if self.opset else self.format
        lines = [f"{self.path}: {self.architecture} as {kind}, {self.dtype}, {self.bytes / 1e6:.1f} MB"]
        if self.fused_ops:
            lines.append(f"  fused ops: {', '.join(self.fused_ops)}")
        lines += [
            f"  {check!s:<14} largest difference from PyTorch {check.difference:.1e} "
            f"(error {check.error:.1e}, allowed {check.allowed:.1e})"
            for check in self.checks
        ]
        lines.append("  not checked" if not self.checks else f"  largest difference: {self.difference:.1e}")
        return "\n".join(lines)


def export(
    model: Any,
    path: str | os.PathLike[str],
    *,
    strength: float | str = "auto",
    dtype: str | torch.dtype = "float32",
    opset: int = onnx_file.OLDEST_OPSET,
    check: bool = True,
    overwrite: bool = True,
) -> ExportReport:
    """Export a network to an ONNX file (``.onnx``) or a package of AOTInductor (``.pt2``).

    The input of the file, ``lr``, is ``(B, 3, h, w)`` in [0, 1], and its output ``(B, 3, scale·h, scale·w)``, both
    float32, for any B, h and w from 1 up. The file is compared with the network at five sizes before it is written.

    Args:
        model: Any network that `savl.Upscaler` takes, such as the result of `savl.load` or a model of spandrel, also
            wrapped or compiled. It is not modified. A package is compiled for its device.
        path: The file to write. Its suffix chooses the format.
        strength: "auto": the strength that the network has learned for each pixel, or 1 if none. A number from 0
            (bicubic interpolation) to 1 is fixed in the file.
        dtype: "float32". Or for ONNX "float16": weights are stored in float16, and computations are in float32,
            because networks of this family overflow in float16. Or for AOTInductor "bfloat16": computations are under
            autocast.
        opset: Version of ONNX's operators, from 20; not used for ``.pt2``.
        check: Whether to compare the file with the network.
        overwrite: Replace an existing file.

    Returns:
        The report. ``print(report)`` shows it.

    Raises:
        ExportError: The network cannot be exported, or the file does not compute what the network does. Nothing is
            written then.
        ExportUnavailable: A package or a compiler is missing; a `ValueError`.
        ValueError: An argument has a wrong value.
        TypeError: ``model`` is not a network.
        OSError: The file exists and ``overwrite`` is False, or cannot be written.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"path must end in {' or '.join(FORMATS)}, got {str(target)!r}")
    found = as_network(model)
    if found is None:
        raise TypeError(f"model must be a network that savl.Upscaler takes, got {type(model).__name__}")
    wanted = check_strength(strength)
    fixed = None if isinstance(wanted, str) else wanted
    name = _checked_dtype(dtype, suffix)
    if not onnx_file.OLDEST_OPSET <= opset <= onnx_file.NEWEST_OPSET:
        raise ValueError(f"opset must be from {onnx_file.OLDEST_OPSET} to {onnx_file.NEWEST_OPSET}, got {opset}")
    if suffix == ".onnx":
        onnx_file.require_packages()
    check_writable(target, overwrite=overwrite)

    network = frozen_copy(found.model).float()
    metadata = _metadata(network, wanted, name)
    if suffix == ".onnx":
        content, checks = _onnx(network.cpu(), fixed, name, opset, metadata, check)
        ops: tuple[str, ...] = ()
    else:
        content, checks, ops = _package(network, fixed, name, metadata, check)
    write_atomically(target, content, overwrite=overwrite)
    return ExportReport(
        target,
        FORMATS[suffix],
        name_of(network),
        len(content),
        opset if suffix == ".onnx" else None,
        name,
        ops,
        tuple(checks),
    )


def _onnx(
    network: UpscalingNetwork, strength: float | None, dtype: str, opset: int, metadata: dict[str, str], check: bool
) -> tuple[bytes, list[SizeCheck]]:
    if dtype == "float16":
        onnx_file.round_weights(network)
    module = Upscale(network, strength)
    program = capture(module, fused=False)
    model = onnx_file.translate(program, name_of(network), opset, network.scale)
    if dtype == "float16":
        onnx_file.store_as_float16(model)
    content = onnx_file.serialize(model, metadata, name_of(network))
    return content, _checks(onnx_file.runner(content, name_of(network)), module) if check else []


def _package(
    network: UpscalingNetwork, strength: float | None, dtype: str, metadata: dict[str, str], check: bool
) -> tuple[bytes, list[SizeCheck], tuple[str, ...]]:
    compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    device = next(network.parameters()).device
    module = Upscale(network, strength, compute)
    program = None
    if not isinstance(network, SAVL):
        with suppress(ExportError):  # the original blocks may be exported where the accelerated ones are not
            program = capture(Upscale(accelerated(network)[0], strength, compute), fused=True)
    if program is None:
        program = capture(module, fused=True)
    with tempfile.TemporaryDirectory(prefix="savl-export-") as folder:
        path = Path(folder, "network.pt2")
        aot_package.compile_package(program, name_of(network), path, metadata)
        checks = _checks(aot_package.runner(path, device), module) if check else []
        return path.read_bytes(), checks, tuple(aot_package.fused_ops(program))


def _checks(run: Callable[[Tensor], Tensor], module: Upscale) -> list[SizeCheck]:
    checks = check_file(run, module, frozen_copy(module.network))
    require_agreement(checks, module)
    return checks


def _checked_dtype(dtype: str | torch.dtype, suffix: str) -> str:
    """Return the name of the dtype.

    Raises:
        ValueError: The format does not have it.
    """
    name = str(dtype).removeprefix("torch.")
    if suffix == ".onnx":
        if name in ("float32", "float16"):
            return name
        reason = (
            "; ONNX Runtime has no bfloat16 convolution on CPUs, so the file could not be checked: export float32, "
            "and let the runtime choose its precision"
        )
        raise ValueError(
            f"dtype of an ONNX file must be float32 or float16 (of the weights), got {name!r}"
            f"{reason if name == 'bfloat16' else ''}"
        )
    return str(checked_dtype(name)).removeprefix("torch.")


def _metadata(network: UpscalingNetwork, strength: float | str, dtype: str) -> dict[str, str]:
    """Return what is stored in a file about the network and its input."""
    return {
        "savl.version": version(),
        "savl.architecture": name_of(network),
        "savl.scale": str(network.scale),
        "savl.strength": str(strength),
        "savl.dtype": dtype,
        "savl.input": "lr: RGB in [0, 1], float32, (batch, 3, height, width), any size from 1x1",
        "savl.output": f"sr: not clamped, (batch, 3, {network.scale}*height, {network.scale}*width)",
    }
