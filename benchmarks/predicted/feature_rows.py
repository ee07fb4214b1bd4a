"""Compilations of the kernels that process features pixel by pixel, on the shapes of the named networks.

`benchmarks.predicted.triton_resources` adds them to those of attention. The launches of an op on a small image are
recorded and compiled for each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from savl.kernels.configs import code_hash
from savl.kernels.targets import Architecture, target_of
from savl.network import CONFIGS
from savl.ops.convolution import ACTIVATIONS
from savl.ops.op import OPS

if TYPE_CHECKING:
    from savl.kernels.compile_ahead_of_time import Launch, Resources

KERNELS = Path(import_module("savl.kernels").__path__[0])
FILES: dict[str, tuple[str, ...]] = {
    "layer_norm": ("layer_norm",),
    "convolution": ("convolution", "convolution_3x3", "linear", "tiles"),
    "channel_gate": ("channel_gate",),
    "guided_projection": ("guided_projection", "linear", "tiles"),
    "projection_mlp": ("projection_mlp", "convolution_3x3", "linear", "tiles"),
}
"""Files in kernels/ that decide the machine code of each op."""
_IMAGE = {"batch": 1, "height": 21, "width": 27}
"""Size of the images. Neither their sides nor their pixels are multiples of 16, the most general case."""
_GRID = (3, 3)


@dataclass(frozen=True)
class Shape:
    """Channels and parts of one call of an op."""

    op: str
    label: str
    """Distinguishes the shape from others of the op in tables."""
    settings: dict[str, Any] = field(hash=False)
    """Keyword arguments of `savl.ops.op.Op.case`, except for the size of the image."""
    kernels: tuple[str, ...]
    """Names of the kernels to compile, of those that the op launches."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    """Names of the dtypes that the Triton kernel serves."""


def _norms() -> list[Shape]:
    channels = dict.fromkeys(config.channels for config in CONFIGS.values())
    kernels = ("normalise_pixels", "normalise_pixels_backward")
    return [Shape("layer_norm", f"{number}", {"channels": number}, kernels) for number in channels]


def _convolution(label: str, kernel: str, channels: int, outputs: int, **settings: Any) -> Shape:
    kernels = ("pack", "contract") if kernel == "contract" else (kernel,)
    side = 1 if kernel == "linear" else 3
    settings |= {"channels": channels, "outputs": outputs, "side": side}
    return Shape("convolution", f"{channels}→{outputs}{label}", settings, kernels)


def _block_end(channels: int) -> dict[str, Any]:
    return {"inner": channels, "channels": channels, "expanded": 2 * channels}


_MLP = {"norm": True, "activation": "gelu"}
SHAPES: tuple[Shape, ...] = (
    *_norms(),
    _convolution(" norm", "linear", 144, 432, norm=True),
    _convolution(" norm, GELU", "linear", 144, 288, **_MLP),
    _convolution(" residual", "linear", 288, 144, residual=True),
    _convolution(" modulation", "linear", 144, 144, modulation=True, bias=False),
    _convolution(" norm", "linear", 180, 540, norm=True),
    _convolution(" residual", "linear", 360, 180, residual=True),
    _convolution(" norm, GELU", "contract", 144, 6, **_MLP),
    _convolution("", "contract", 256, 12),
    _convolution("", "expand", 3, 144),
    _convolution(" gate", "expand", 6, 144, gate=_GRID),
    Shape(
        "channel_gate",
        "6→144",
        {"channels": 6, "outputs": 144, "rows": _GRID[0], "columns": _GRID[1], "neighbourhood": 5},
        ("sums", "gates"),
    ),
    Shape("guided_projection", "144, 64 of mu", {"inner": 144, "channels": 144, "latent": 64}, ("project_guided",)),
    Shape("projection_mlp", "144, gate", _block_end(144) | {"convolved": 6, "grid": _GRID}, ("finish_block",)),
    Shape("projection_mlp", "180", _block_end(180), ("finish_block",), ("bfloat16", "float16")),
)
"""The shapes: what the networks call most, and what needs most registers or shared memory."""


@dataclass(frozen=True)
class FeatureRow:
    """One compilation."""

    kernel: str
    shape: Shape
    dtype: str
    architecture: Architecture

    def facts(self) -> dict[str, Any]:
        """Return what identifies the compilation, as JSON values."""
        return {
            "kernel": self.kernel,
            "op": self.shape.op,
            "dtype": self.dtype,
            "shape": self.shape.label,
            "gpu": target_of(self.architecture).name,
            "source": "rule",
            "config": None,
        }

    def resources(self) -> Resources:
        """Compile the kernel."""
        from savl.kernels import compile_ahead_of_time

        launched = launches(self.shape, self.dtype, self.architecture)[self.kernel]
        return compile_ahead_of_time.read_resources(compile_ahead_of_time.compile_launch(launched, self.architecture))


def rows(
    architectures: Iterable[Architecture],
    dtypes: Iterable[str],
    wanted: Callable[[FeatureRow], bool] = lambda row: True,
) -> list[FeatureRow]:
    """Return the compilations.

    Args:
        architectures: Architectures to compile for.
        dtypes: Names of the dtypes.
        wanted: Whether to keep a compilation.
    """
    dtypes = tuple(dtypes)
    found = (
        FeatureRow(kernel, shape, dtype, architecture)
        for architecture in architectures
        for dtype in dtypes
        for shape in SHAPES
        if dtype in shape.dtypes
        for kernel in shape.kernels
    )
    return [row for row in found if wanted(row)]


def launches(shape: Shape, dtype: str, architecture: Architecture) -> dict[str, Launch]:
    """Return the launches of an op on tensors of the CPU, by name of the kernel.

    Args:
        shape: The shape.
        dtype: Name of the dtype of features and parameters; the parameters of layer normalisation are float32, as under
            autocast.
        architecture: Architecture of the GPU to choose block sizes for.
    """
    from savl.kernels.compile_ahead_of_time import recorded

    module = import_module(f"savl.kernels.{shape.op}")
    case = OPS[shape.op].case(getattr(torch, dtype), **_IMAGE, **shape.settings)
    arguments, options = case.arguments, dict(case.options)
    if shape.op == "layer_norm":
        x, *parameters = arguments.values()
        weight, bias = (each.float() for each in parameters if each is not None)

        def both(launch: Callable[..., None]) -> None:
            out, *kept = module.layer_norm(x, weight, bias, 1e-5, False, launch=launch)
            module.layer_norm_backward(torch.empty_like(out), x, weight, bias, *kept, launch=launch)

        return recorded(both)
    if shape.op == "convolution":
        options |= {
            "activation": ACTIVATIONS.index(options["activation"]),
            "slope": 0.01,
            "keep": False,
            "narrow": False,
        }
    if shape.op in ("convolution", "projection_mlp"):
        options |= {"eps": 1e-5}
    if shape.op != "channel_gate":
        options |= {"architecture": architecture}
    return recorded(lambda launch: getattr(module, shape.op)(**arguments, **options, launch=launch))


def hashes() -> dict[str, str]:
    """Return the `code_hash` of the kernels of each op."""
    return {op: code_hash(*(KERNELS / f"{name}.py" for name in names)) for op, names in FILES.items()}
