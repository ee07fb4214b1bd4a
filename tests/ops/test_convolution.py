"""Convolution: its formula part by part, sizes that no tile divides, dtypes under autocast, and refused arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from savl.ops import KernelSettings, convolution
from savl.ops.library import EXTENSION_UNAVAILABLE

pytestmark = pytest.mark.usefixtures("one_thread")

EAGER, FUSED = KernelSettings.of(False), KernelSettings.of("cpp")
needs_extension = pytest.mark.skipif(EXTENSION_UNAVAILABLE is not None, reason=str(EXTENSION_UNAVAILABLE))
BACKENDS = pytest.mark.parametrize(
    "kernels", [pytest.param(EAGER, id="eager"), pytest.param(FUSED, id="fused", marks=needs_extension)]
)


# The formula


def written_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str = "none",
    slope: float = 0.01,
    eps: float = 1e-5,
) -> Tensor:
    """Compute the op one shifted image at a time, with elementary operations."""
    height, width = x.shape[1:3]
    if norm_weight is not None and norm_bias is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight + norm_bias
    taps = weight.reshape(*weight.shape[:2], -1).unbind(-1)
    side = math.isqrt(len(taps))
    margin = side // 2 * dilation
    padded = F.pad(x, (0, 0, margin, margin, margin, margin))
    y = torch.zeros(*x.shape[:3], weight.shape[0], dtype=x.dtype)
    for index, tap in enumerate(taps):
        top, left = index // side * dilation, index % side * dilation
        y = y + torch.einsum("bhwc,oc->bhwo", padded[:, top : top + height, left : left + width], tap)
    if bias is not None:
        y = y + bias
    if activation == "gelu":
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    elif activation == "leaky_relu":
        y = torch.where(y > 0, y, slope * y)
    if gate is not None:
        rows, columns = gate.shape[1:3]
        y = y * gate.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
    if gamma is not None:
        y = (1 + gamma) * y
    if beta is not None:
        y = y + beta
    return y if residual is None else residual + y


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


IMAGE, CHANNELS, OUTPUTS = (2, 6, 10), 5, 7
NORM = ("norm_weight", "norm_bias")
SHAPES: dict[str, tuple[int, ...]] = {
    "bias": (OUTPUTS,),
    "norm_weight": (CHANNELS,),
    "norm_bias": (CHANNELS,),
    "residual": (*IMAGE, OUTPUTS),
    "gamma": (*IMAGE, OUTPUTS),
    "beta": (*IMAGE, OUTPUTS),
    "gate": (2, 3, 2, OUTPUTS),
}


@BACKENDS
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)], ids=["linear", "1x1", "3x3"])
@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ((), {}),
        (("bias",), {}),
        (NORM, {}),
        (NORM, {"eps": 0.5}),
        (("bias", *NORM), {"activation": "gelu"}),
        (("bias",), {"activation": "leaky_relu"}),
        (("bias",), {"activation": "leaky_relu", "slope": 0.2}),
        (("bias", "residual"), {}),
        (("residual", "gamma"), {}),
        (("bias", "residual", "gamma", "beta"), {"activation": "gelu"}),
        (("bias", "residual", "gate"), {}),
        (("bias", *NORM, "residual", "gate"), {"activation": "leaky_relu"}),
    ],
    ids=lambda part: "-".join(
        map(str, part if isinstance(part, tuple) else [each for item in part.items() for each in item])
    ),
)
def test_the_op_is_its_formula(
    parts: tuple[str, ...], options: dict[str, Any], kernel: tuple[int, ...], kernels: KernelSettings
) -> None:
    arguments = {name: numbers(*SHAPES[name]) for name in parts}
    x, weight = numbers(*IMAGE, CHANNELS), numbers(OUTPUTS, CHANNELS, *kernel)
    found = convolution(x, weight, **arguments, **options, kernels=kernels)
    torch.testing.assert_close(found, written_out(x, weight, **arguments, **options), rtol=1e-12, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("dilation", [1, 2, 5, 9, 12])
def test_a_dilated_kernel_skips_pixels_even_those_beyond_the_image(dilation: int, kernels: KernelSettings) -> None:
    x, weight, line = numbers(*IMAGE, CHANNELS), numbers(OUTPUTS, CHANNELS, 3, 3), numbers(CHANNELS)
    arguments: dict[str, Any] = {"norm_weight": line, "norm_bias": line, "dilation": dilation}
    found = convolution(x, weight, **arguments, kernels=kernels)
    torch.testing.assert_close(found, written_out(x, weight, **arguments), rtol=1e-12, atol=1e-12)


@BACKENDS
def test_the_pixels_around_the_normalised_image_are_zero(kernels: KernelSettings) -> None:
    # Every pixel is normalised to the bias of the norm, 1. A pixel that were padded before would be too.
    x, ones = torch.full((1, 3, 4, 5), 7.0), torch.ones(5)
    out = convolution(x, torch.ones(2, 5, 3, 3), None, ones, ones, kernels=kernels)
    rows, columns = torch.tensor([2.0, 3, 2]), torch.tensor([2.0, 3, 3, 2])
    inside = rows[:, None] * columns  # pixels of the kernel that lie within the image
    assert torch.equal(out, 5 * inside[None, :, :, None].expand(1, 3, 4, 2))


@BACKENDS
def test_images_of_a_batch_do_not_affect_each_other(kernels: KernelSettings) -> None:
    x, weight, residual, gate = numbers(3, 9, 33, 5), numbers(7, 5, 3, 3), numbers(3, 9, 33, 7), numbers(3, 3, 1, 7)
    together = convolution(x, weight, residual=residual, gate=gate, kernels=kernels)
    alone = [
        convolution(x[i : i + 1], weight, residual=residual[i : i + 1], gate=gate[i : i + 1], kernels=kernels)
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


# Sizes that no tile, vector or group of output channels divides. With small integers every dtype gives the exact sums.


def integers(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(-1, 2, shape).to(dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])


def assert_exact(
    dtype: torch.dtype, image: tuple[int, int, int], channels: int, outputs: int, side: int, **options: Any
) -> None:
    arguments = {
        "x": integers(dtype, *image, channels),
        "weight": integers(dtype, outputs, channels, side, side),
        "bias": integers(dtype, outputs),
        "residual": integers(dtype, *image, outputs),
    }
    if "gate" in options:
        arguments["gate"] = 2 * integers(dtype, image[0], *options.pop("gate"), outputs)
    out = convolution(**arguments, **options, kernels=FUSED)
    expected = written_out(**{name: value.double() for name, value in arguments.items()}, **options)
    assert expected.abs().max() <= 256, "bfloat16 does not hold these sums"
    assert torch.equal(out.double(), expected)


@DTYPES
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (1, 64), (65, 1), (2, 31), (7, 9), (8, 32), (9, 33), (16, 63), (17, 65)], ids=str
)
def test_images_of_all_sizes_are_convolved(
    dtype: torch.dtype, side: int, size: tuple[int, int], instruction_set: str
) -> None:
    for batch, dilation in ((1, 1), (2, 1), (1, 3)):
        assert_exact(dtype, (batch, *size), 6, 9, side, dilation=dilation)
    assert_exact(dtype, (2, *size), 6, 9, side, gate=size)
    assert_exact(dtype, (2, *size), 6, 9, side, gate=(1, 1), activation="leaky_relu", slope=2.0)


@DTYPES
@pytest.mark.parametrize("side", [1, 3])
def test_all_numbers_of_channels_are_convolved(dtype: torch.dtype, side: int, instruction_set: str) -> None:
    # Vectors have 2 to 16 channels, panels up to 3 vectors, and pairs of bfloat16 are packed by 32.
    counts = sorted({multiple + off for multiple in (2, 4, 8, 16, 24, 32, 48, 64, 96) for off in (-1, 0, 1)})
    for index, count in enumerate(counts):
        other = counts[(7 * index + 5) % len(counts)]
        assert_exact(dtype, (1, 3, 5), count, other, side)
        assert_exact(dtype, (1, 3, 5), other, count, side, dilation=2)


@DTYPES
@pytest.mark.parametrize("channels", [1, 2, 7, 15, 16, 17, 31, 33, 48, 65])
def test_any_number_of_channels_is_normalised_in_any_number_of_pixels(
    dtype: torch.dtype, channels: int, instruction_set: str
) -> None:
    eye, weight, bias = torch.eye(channels, dtype=dtype), integers(dtype, channels), integers(dtype, channels)
    for width in (1, 2, 3, 7, 15, 16, 17, 65):
        x = torch.randn(1, 1, width, channels).to(dtype)
        out = convolution(x, eye, None, weight, bias, eps=0.1, kernels=FUSED)
        expected = F.layer_norm(x.double(), (channels,), weight.double(), bias.double(), 0.1)
        error = (out.double() - expected).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * max(float(expected.abs().max()), 1.0), width


# Dtypes


@BACKENDS
def test_autocast_computes_float32_arguments_in_bfloat16(kernels: KernelSettings) -> None:
    x, weight, bias, line = (
        value.float() for value in (numbers(*IMAGE, 5), numbers(7, 5, 3, 3), numbers(7), numbers(5))
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = convolution(x, weight, bias, line, line, activation="gelu", kernels=kernels)
    assert out.dtype == torch.bfloat16
    exact = written_out(x.double(), weight.double(), bias.double(), line.double(), line.double(), activation="gelu")
    error = float((out.double() - exact).abs().max()) / float(exact.abs().max())
    assert 1e-4 < error < 2e-2


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_autocast_takes_every_mixture_of_dtypes(
    dtype: torch.dtype, other: torch.dtype, kernels: KernelSettings
) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "gate"}
    arguments = {
        name: numbers(*shape).to(other if name in ("norm_weight", "beta") else dtype) for name, shape in shapes.items()
    }
    x, weight = numbers(*IMAGE, CHANNELS).to(other), numbers(OUTPUTS, CHANNELS).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = convolution(x, weight, **arguments, kernels=kernels)
        gated = convolution(
            x,
            weight,
            residual=arguments["residual"].to(other),
            gate=numbers(*SHAPES["gate"]).to(dtype),
            kernels=kernels,
        )
    assert gated.dtype in (torch.bfloat16, torch.float32)
    wide = {name: value.double() for name, value in arguments.items()}
    exact = written_out(x.double(), weight.double(), **wide)
    narrow = (torch.bfloat16,) if arguments["residual"].dtype == torch.bfloat16 else (torch.float32, torch.float16)
    assert out.dtype in (narrow if kernels is FUSED else (torch.bfloat16, torch.float32)), "dtype of the residual"
    assert float((out.double() - exact).abs().max()) < 2e-2 * float(exact.abs().max())


@BACKENDS
def test_autocast_leaves_float64_alone(kernels: KernelSettings) -> None:
    x, weight, line = numbers(*IMAGE, CHANNELS), numbers(OUTPUTS, CHANNELS, 3, 3), numbers(CHANNELS).float()
    plain = convolution(x, weight, None, line, line, kernels=kernels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convolution(x, weight, None, line, line, kernels=kernels), plain)
    assert plain.dtype == torch.float64


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_give_the_shape_and_dtype_of_the_result(dtype: torch.dtype, kernels: KernelSettings) -> None:
    x, weight = torch.empty(*IMAGE, 5, dtype=dtype, device="meta"), torch.empty(7, 5, 3, 3, device="meta")
    out = convolution(x, weight, kernels=KernelSettings.of(kernels is FUSED))
    assert (out.shape, out.dtype, out.device.type) == ((*IMAGE, 7), dtype, "meta")


# The sum before the activation, which is kept for the backward pass only


class Kept(TorchDispatchMode):
    """The numbers of elements of the second results of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.savl.convolution.default:
            self.sizes.append(out[1].numel())
        return out


@needs_extension
@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),
        ({"residual": True}, False),
        ({"activation": "gelu"}, True),
        ({"activation": "leaky_relu"}, True),
        ({"residual": True, "gamma": True}, True),
        ({"residual": True, "gate": True}, True),
    ],
    ids=str,
)
def test_a_second_result_is_kept_only_for_gradients_that_need_it(options: dict[str, Any], needed: bool) -> None:
    arguments = {name: numbers(*SHAPES[name]) if value is True else value for name, value in options.items()}
    x, weight = numbers(*IMAGE, CHANNELS), numbers(OUTPUTS, CHANNELS)
    trained = weight.clone().requires_grad_()
    with Kept() as kept:
        convolution(x, trained, **arguments, kernels=FUSED)
        convolution(x, weight, **arguments, kernels=FUSED)
        with torch.no_grad():
            convolution(x, trained, **arguments, kernels=FUSED)
    assert kept.sizes == [math.prod(IMAGE) * OUTPUTS if needed else 0, 0, 0]


# Refused arguments. The fused kernel is called before the arguments are validated.

X, W, B, N = torch.randn(2, 4, 6, 5), torch.randn(7, 5, 3, 3), torch.randn(7), torch.randn(5)
R, G = torch.randn(2, 4, 6, 7), torch.randn(2, 2, 3, 7)
VALID: dict[str, Any] = {
    "x": X,
    "weight": W,
    "bias": B,
    "norm_weight": N,
    "norm_bias": N,
    "residual": R,
    "gamma": R,
    "beta": R,
    "activation": "gelu",
}
GATED = {**VALID, "gamma": None, "beta": None, "gate": G}

REFUSED: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # types, dtypes and ranks
    ({"x": [1.0]}, TypeError, ["x must be a torch.Tensor of shape (B, H, W, C)", "list"]),
    ({"x": X.long()}, TypeError, ["x must have one of the dtypes", "int64"]),
    ({"x": X[0]}, ValueError, ["x must have 4 dimensions", "3"]),
    ({"weight": None}, TypeError, ["weight must be a torch.Tensor of shape (O, C, side, side)", "NoneType"]),
    ({"weight": [1.0]}, TypeError, ["weight must be a torch.Tensor", "list"]),
    ({"weight": W.int()}, TypeError, ["weight must have one of the dtypes", "int32"]),
    ({"weight": W[0]}, ValueError, ["weight must have 4 dimensions", "(5, 3, 3)"]),
    *(({name: [1.0]}, TypeError, [f"{name} must be a torch.Tensor", "list"]) for name in SHAPES),
    *(({name: (GATED | VALID)[name].long()}, TypeError, [f"{name} must have one of", "int64"]) for name in SHAPES),
    *(({name: (GATED | VALID)[name][None]}, ValueError, [f"{name} must have"]) for name in SHAPES),
    *(
        ({name: (GATED | VALID)[name].half()}, TypeError, [f"{name} must be torch.float32", "float16"])
        for name in SHAPES
    ),
    *(
        ({name: (GATED | VALID)[name].bfloat16()}, TypeError, [f"{name} must be torch.float32", "bfloat16"])
        for name in ("weight", *SHAPES)
    ),
    ({"weight": W.double()}, TypeError, ["weight must be torch.float32", "float64"]),
    ({"x": X.double()}, TypeError, ["residual must be torch.float64 like x", "float32"]),
    # shapes
    ({"x": X[..., :0]}, ValueError, ["x and weight must have one channel or more"]),
    ({"weight": W[:0]}, ValueError, ["x and weight must have one channel or more"]),
    ({"weight": W[:, :4]}, ValueError, ["weight must have shape (7, 5, 3, 3)", "(7, 4, 3, 3)"]),
    ({"weight": W[:, :4, 0, 0]}, ValueError, ["weight must have shape (7, 5, 1, 1)", "(7, 4, 1, 1)"]),
    ({"weight": W[..., :1]}, ValueError, ["weight must have shape (7, 5, 1, 1)", "(7, 5, 3, 1)"]),
    ({"weight": W[..., :2, :2]}, ValueError, ["(O, C), (O, C, 1, 1) or (O, C, 3, 3)", "(7, 5, 2, 2)"]),
    ({"weight": torch.randn(7, 5, 5, 5)}, ValueError, ["(O, C), (O, C, 1, 1) or (O, C, 3, 3)", "(7, 5, 5, 5)"]),
    ({"bias": B[:3]}, ValueError, ["bias must have shape (7,)", "(3,)"]),
    ({"norm_weight": N[:3]}, ValueError, ["norm_weight must have shape (5,)", "(3,)"]),
    ({"norm_bias": B}, ValueError, ["norm_bias must have shape (5,)", "(7,)"]),
    ({"residual": R[:1]}, ValueError, ["residual must have shape (2, 4, 6, 7)", "(1, 4, 6, 7)"]),
    ({"gamma": R[:, :1]}, ValueError, ["gamma must have shape (2, 4, 6, 7)", "(2, 1, 6, 7)"]),
    ({"beta": R[..., :1]}, ValueError, ["beta must have shape (2, 4, 6, 7)", "(2, 4, 6, 1)"]),
    ({"gate": G[:1]}, ValueError, ["gate must have shape (2, 2, 3, 7)", "(1, 2, 3, 7)"]),
    ({"gate": G[..., :1]}, ValueError, ["gate must have shape (2, 2, 3, 7)", "(2, 2, 3, 1)"]),
    ({"gate": torch.randn(2, 3, 3, 7)}, ValueError, ["rows and columns that divide 4x6", "3x3"]),
    ({"gate": torch.randn(2, 2, 4, 7)}, ValueError, ["rows and columns that divide 4x6", "2x4"]),
    ({"gate": G[:, :0]}, ValueError, ["rows and columns that divide 4x6", "0x3"]),
    # parts that belong together
    ({"norm_bias": None}, ValueError, ["norm_weight and norm_bias must be given together"]),
    ({"norm_weight": None}, ValueError, ["norm_weight and norm_bias must be given together"]),
    ({"residual": None}, ValueError, ["gamma is accepted together with residual only"]),
    ({"gamma": None}, ValueError, ["beta is accepted together with gamma only"]),
    ({"gate": G, "gamma": R}, ValueError, ["gate is accepted together with residual and without gamma only"]),
    ({"gate": G, "residual": None}, ValueError, ["gate is accepted together with residual and without gamma only"]),
    # devices
    *(
        ({name: (GATED | VALID)[name].to("meta")}, ValueError, [f"{name} is on meta but x is on cpu"])
        for name in ("weight", *SHAPES)
    ),
    # options
    ({"dilation": 2.0}, TypeError, ["dilation must be an int", "float 2.0"]),
    ({"dilation": True}, TypeError, ["dilation must be an int", "bool True"]),
    ({"dilation": 0}, ValueError, ["dilation must be at least 1 pixel", "got 0"]),
    ({"activation": "relu"}, ValueError, ["activation must be one of none, gelu, leaky_relu", "'relu'"]),
    ({"activation": None}, ValueError, ["activation must be one of none, gelu, leaky_relu", "None"]),
    *(
        ({name: value}, TypeError, [f"{name} must be a number", repr(value)])
        for name in ("slope", "eps")
        for value in ("small", None, True, torch.tensor(0.1))
    ),
    *(
        ({"eps": value}, ValueError, ["eps must be finite and at least 0"])
        for value in (-1e-5, math.nan, math.inf, 10**400)
    ),
]


@BACKENDS
@pytest.mark.parametrize(("changes", "error", "fragments"), REFUSED, ids=lambda value: "")
def test_invalid_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], fragments: list[str], kernels: KernelSettings
) -> None:
    arguments = {**(GATED if "gate" in changes else VALID), **changes}
    with pytest.raises(error) as caught:
        convolution(**arguments, kernels=kernels)
    missing = [part for part in ["convolution", *fragments] if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


@BACKENDS
@pytest.mark.parametrize("name", ["weight", *SHAPES])
def test_under_autocast_float64_is_refused_unless_x_is_too(name: str, kernels: KernelSettings) -> None:
    arguments = GATED if name == "gate" else VALID
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"convolution: {name} must not be torch.float64 under autocast"),
    ):
        convolution(**{**arguments, name: arguments[name].double()}, kernels=kernels)
