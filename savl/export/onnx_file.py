"""ONNX files: translation by `torch.onnx`, float16 weights, names, metadata, and the function that runs a file."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from savl.export.errors import INSTALL, ExportError, ExportUnavailable, reason_of
from savl.export.program import quiet

INPUT, OUTPUT = "lr", "sr"
"""Names of the image and of the upscaled image."""
OLDEST_OPSET, NEWEST_OPSET = 20, 23
_LARGEST_FILE = 2**31 - 1
_FEW = 64  # A smaller tensor saves nothing as float16, and may be a shape or a constant of a formula.


def require_packages() -> None:
    """Check that the packages which ONNX files need are installed.

    Raises:
        ExportUnavailable: The message says how to install them.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ExportUnavailable(f"ONNX files need {' and '.join(missing)}: {INSTALL}")


def translate(program: ExportedProgram, name: str, opset: int, scale: int) -> Any:
    """Translate a program to ONNX.

    Args:
        program: From `savl.export.program.capture`, without fused ops.
        name: Name of the network, for errors.
        opset: Version of ONNX's operators.
        scale: Upscaling factor, for the names of the sizes.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        ExportError: An op has no translation.
    """
    with quiet(), _silent_exporter():
        try:
            translated: Any = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, verbose=False, external_data=False, optimize=False
            )
            _simplify(translated.model)
            model = translated.model_proto
        except Exception as error:  # the exporter raises errors of every kind
            raise ExportError(f"{name} cannot be translated to ONNX opset {opset}: {reason_of(error)}") from error
    found = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(f"{name} cannot be translated to ONNX opset {opset}; PyTorch's exporter made opset {found}")
    _rename(model, scale)
    return model


def _simplify(model: Any) -> None:
    """Compute the constants of a model and remove what is then unused.

    The exporter's own optimization also searches for patterns, which takes a third of the time of the whole export, and
    which runtimes do themselves.

    Args:
        model: ``onnx_ir.Model``, which is changed.
    """
    optimizer: Any = importlib.import_module("onnxscript.optimizer")
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)


def _rename(model: Any, scale: int) -> None:
    """Give input, output and free sizes their names, and remove the sizes that the exporter noted for other tensors."""
    graph = model.graph
    names = {graph.input[0].name: INPUT, graph.output[0].name: OUTPUT}
    for node in graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                if value in names:
                    values[place] = names[value]
    graph.input[0].name, graph.output[0].name = INPUT, OUTPUT
    enlarged = ("height", "width") if scale == 1 else (f"{scale}*height", f"{scale}*width")
    for value, sizes in ((graph.input[0], ("height", "width")), (graph.output[0], enlarged)):
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip((dims[0], dims[2], dims[3]), ("batch", *sizes), strict=True):
            dim.dim_param = size
    del graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]  # places in the source code, which take more room than the graph


def round_weights(module: torch.nn.Module) -> None:
    """Round all parameters and floating-point buffers to float16, in place; their dtype stays.

    Raises:
        ExportError: A weight is too large for float16.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            rounded = tensor.detach().half().to(tensor.dtype)
            if not bool(torch.isfinite(rounded).all()):
                largest = float(tensor.detach().abs().max())
                raise ExportError(f"{name} has the value {largest:.3g}, and float16 ends at 65504; use float32")
            tensor.data = rounded


def store_as_float16(model: Any) -> None:
    """Store each float32 tensor whose values are all float16 numbers as float16, followed by a cast to float32.

    The values that the network computes with do not change. A runtime does these casts once, when it loads the file.

    Args:
        model: ``onnx.ModelProto``, which is changed.
    """
    onnx = importlib.import_module("onnx")
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _FEW:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.float16"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def serialize(model: Any, metadata: dict[str, str], name: str) -> bytes:
    """Return the content of the file, after a check by ``onnx.checker``.

    Raises:
        ExportError: The file would be larger than the 2 GB that protobuf allows, or is not valid.
    """
    onnx = importlib.import_module("onnx")
    onnx.helper.set_model_props(model, metadata)
    model.producer_name = "savl"
    if model.ByteSize() > _LARGEST_FILE:
        raise ExportError(
            f"{name} has {model.ByteSize() / 1e9:.1f} GB as an ONNX file, which may have 2 GB; use float16"
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the ONNX file made from {name} is not valid: {error}") from error
    content: bytes = model.SerializeToString()
    return content


def runner(content: bytes, name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that computes a file with ONNX Runtime on the CPU.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        reason = " ".join(str(error).split())
        raise ExportError(f"ONNX Runtime cannot load the file made from {name}: {reason}") from error
    return lambda lr: torch.from_numpy(session.run([OUTPUT], {INPUT: lr.numpy()})[0])


@contextlib.contextmanager
def _silent_exporter() -> Iterator[None]:
    """Keep the exporter's messages from the terminal."""
    logger = logging.getLogger("torch.onnx")
    onnxscript = logging.getLogger("onnxscript")
    levels = logger.level, onnxscript.level
    logger.setLevel(logging.ERROR)
    onnxscript.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(levels[0])
        onnxscript.setLevel(levels[1])
