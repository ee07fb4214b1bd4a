"""Baselines: whole networks in ONNX Runtime and OpenVINO on a CPU.

Both run the same ONNX file, which `torch.onnx.export` makes from the eager network for one image size. They use as
many threads as PyTorch. OpenVINO runs in float32, and in the precision that it chooses by itself, which is bfloat16 on
processors with instructions for it. ``pip install 'savl[peers]'`` installs the packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from unittest import mock

import torch
from torch import Tensor, nn

import savl
from savl.bicubic import bicubic_resize

ONNX_RUNTIME = "onnx runtime"
OPENVINO = "openvino, float32"
OPENVINO_DEFAULT = "openvino, default"
VARIANTS = (ONNX_RUNTIME, OPENVINO, OPENVINO_DEFAULT)

_PACKAGES = dict.fromkeys(VARIANTS[1:], ("onnx", "onnxscript", "openvino"))
_PACKAGES[ONNX_RUNTIME] = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "pip install 'savl[peers]'"


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def summary() -> str:
    """Return the versions of the packages in one line; it says which are missing and how to install them."""
    names = ("onnx", "onnxscript", "onnxruntime", "openvino")
    parts = [f"{name} {installed(name) or 'is not installed'}" for name in names]
    return f"{', '.join(parts)}{'' if all(map(installed, names)) else f'; {INSTALL}'}"


def unavailable() -> dict[str, str]:
    """Return, by variant, the reason why it cannot run or is not worth running on this machine."""
    found = {}
    for variant in VARIANTS:
        if missing := [name for name in _PACKAGES[variant] if installed(name) is None]:
            found[variant] = f"{' and '.join(missing)} not installed; {INSTALL}"
    if OPENVINO_DEFAULT not in found and default_precision() == torch.float32:
        found[OPENVINO_DEFAULT] = f"the default precision on this machine is that of {OPENVINO!r}"
    return found


@cache
def default_precision() -> torch.dtype:
    """Return the precision that OpenVINO chooses on this processor.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino

    chosen = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[chosen]


def calls(network: nn.Module, example: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return a function of the image for each variant that this machine can run.

    The first call of any of them exports the network, and the first call of each compiles it.

    Args:
        network: A float32 network in evaluation mode on the CPU.
        example: An image of the size to export for, ``(B, 3, h, w)``.
    """
    graph = cache(lambda: export(network, example))
    session = cache(lambda: _onnx_runtime(graph()))
    compiled = cache(lambda precision: _openvino(graph(), precision))
    every: dict[str, Callable[[Tensor], Tensor]] = {
        ONNX_RUNTIME: lambda lr: session()(lr),
        OPENVINO: lambda lr: compiled("f32")(lr),
        OPENVINO_DEFAULT: lambda lr: compiled(None)(lr),
    }
    left_out = unavailable()
    return {name: call for name, call in every.items() if name not in left_out}


def export(network: nn.Module, example: Tensor) -> bytes:
    """Return the eager network as an ONNX file for images of the size of ``example``."""
    with torch.no_grad(), savl.use_fused_kernels(False), _bicubic_as_products(*example.shape[-2:]):
        program = torch.onnx.export(network, (example,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


@contextmanager
def _bicubic_as_products(height: int, width: int) -> Iterator[None]:
    """Upscale bicubically with two matrix products while the context is active.

    PyTorch's antialiased bicubic interpolation leaves out pixels outside the image and scales the other weights to the
    sum 1. The exporter writes this as the attribute ``exclude_outside=1`` of ONNX's Resize, which OpenVINO 2026.4
    ignores (benchmarks/README.md). The products give the same result in every runtime.
    """

    def matrix(length: int, scale: int) -> Tensor:
        return bicubic_resize(torch.eye(length)[None, None], (scale * length, length))[0, 0]

    rows, columns = ({scale: matrix(length, scale) for scale in (2, 3, 4)} for length in (height, width))

    def upscale(image: Tensor, scale: int) -> Tensor:
        return rows[scale] @ image @ columns[scale].T

    with mock.patch("savl.network.savl.bicubic_upscale", upscale):
        yield


def _onnx_runtime(graph: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise still wait actively when the turn of the next variant begins.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda lr: torch.from_numpy(session.run(None, {name: lr.numpy()})[0])


def _openvino(graph: bytes, precision: str | None) -> Callable[[Tensor], Tensor]:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", options)
    return lambda lr: torch.from_numpy(compiled(lr.numpy())[0])
