"""The gate of HAT's channel attention, computed before the convolution that it is applied to.

    pooled = average of convolution(x, weight) + bias
    gate = scale · sigmoid(excite(relu(squeeze(pooled))))

In the channel attention block of HAT, the gate depends on the average of the features that it multiplies. Convolution
is linear: the average of its output equals its weight times the averages of the nine shifted inputs, plus the bias. So
the gate can be computed first, and the convolution (`savl.ops.convolution`) applies it without another pass.

Source: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer" (2023); averages over neighbourhoods
of windows: Chu et al., "Improving Image Restoration by Revisiting Global Information Aggregation" (2022).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, TRITON
from savl.ops.op import Op, register
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import check_int, check_same_device, check_same_dtype_or_float32, check_shape, check_tensor

OP = "channel_gate"
MOST_CHANNELS, MOST_OUTPUTS = 1024, 4096
"""Largest numbers of channels of ``x`` and of the gate for the Triton kernels, which hold all of them in registers."""


def channel_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    *,
    rows: int = 1,
    columns: int = 1,
    neighbourhood: int = 1,
    scale: float = 1.0,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Compute the gate of HAT's channel attention without computing the convolution that it multiplies.

    The gate is ``scale · sigmoid(excite(relu(squeeze(pooled))))``, where ``pooled`` are the averages of the output of
    the convolution over windows or over neighbourhoods of windows.

    Args:
        x: ``(B, H, W, C)`` floating, input of the convolution, with zeros around it.
        weight: ``(O, C, 3, 3)``, dtype of ``x`` or float32; under autocast any floating one but float64. The same
            holds for the other parameters.
        bias: ``(O,)``.
        squeeze_weight: ``(S, O)``.
        squeeze_bias: ``(S,)``.
        excite_weight: ``(O, S)``.
        excite_bias: ``(O,)``.
        rows: Number of windows over which averages are taken from top to bottom; divides H.
        columns: The same from left to right; divides W.
        neighbourhood: Odd number n. Each average is taken over the n × n windows centred on its window; windows outside
            the image are ignored.
        scale: Factor of the gate.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`.

    Returns:
        ``(B, rows, columns, O)``, dtype of ``x``.

    Raises:
        TypeError: An argument is not a floating-point tensor, dtypes are incompatible, or an option is not a number.
        ValueError: Shapes, devices or numbers are incompatible.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    tensors = (x, weight, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias)
    options = (rows, columns, neighbourhood, scale)
    _validate(*tensors, *options)
    if serves(CHANNEL_GATE, kernels, *tensors):
        if x.dtype != torch.float16 and torch.float16 in {each.dtype for each in tensors}:  # parameters, under autocast
            tensors = tuple(each.float() if each.dtype == torch.float16 else each for each in tensors)  # type: ignore
        fused: Tensor = torch.ops.savl.channel_gate.default(*tensors, *options)
        return fused
    return _compute(*tensors, *options)


def channel_gate_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    *,
    rows: int = 1,
    columns: int = 1,
    neighbourhood: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """Compute `channel_gate` by operations of torch: the reference."""
    parameters = (weight, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias)
    return _compute(x, *parameters, rows, columns, neighbourhood, scale)


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    rows: int,
    columns: int,
    neighbourhood: int,
    scale: float,
) -> Tensor:
    averages = _box_average(_shifted_averages(x, rows, columns), neighbourhood)
    pooled = _linear(averages, weight.flatten(1), bias)
    squeezed = _linear(pooled, squeeze_weight, squeeze_bias).relu()
    return scale * _linear(squeezed, excite_weight, excite_bias).sigmoid().to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer whose parameters may have a wider dtype than ``x``, as they have under autocast."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # torch has no autocast for meta tensors
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _shifted_averages(x: Tensor, rows: int, columns: int) -> Tensor:
    """Average ``(B, H, W, C)``, shifted by −1, 0 and 1 pixels, over windows: ``(B, rows, columns, C · 9)``."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    down = torch.stack([padded[:, i : i + height].unflatten(1, (rows, -1)).mean(2) for i in range(3)], dim=-1)
    across = torch.stack([down[:, :, i : i + width].unflatten(2, (columns, -1)).mean(3) for i in range(3)], dim=-1)
    return across.flatten(3)


def _box_average(x: Tensor, side: int) -> Tensor:
    """Average ``(B, rows, columns, K)`` over ``side`` × ``side`` neighbours, leaving out those beyond the border."""
    if side == 1:
        return x
    around = F.avg_pool2d(x.permute(0, 3, 1, 2), side, stride=1, padding=side // 2, count_include_pad=False)
    return around.permute(0, 2, 3, 1)


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    rows: int,
    columns: int,
    neighbourhood: int,
    scale: float,
) -> None:
    check_tensor(OP, "x", x, "(B, H, W, C)")
    check_tensor(OP, "weight", weight, "(O, C, 3, 3)")
    check_tensor(OP, "squeeze_weight", squeeze_weight, "(S, O)")
    _, height, width, channels = x.shape
    outputs, squeezed = weight.shape[0], squeeze_weight.shape[0]
    expected = {
        "weight": (weight, (outputs, channels, 3, 3)),
        "bias": (bias, (outputs,)),
        "squeeze_weight": (squeeze_weight, (squeezed, outputs)),
        "squeeze_bias": (squeeze_bias, (squeezed,)),
        "excite_weight": (excite_weight, (outputs, squeezed)),
        "excite_bias": (excite_bias, (outputs,)),
    }
    for name, (value, shape) in expected.items():
        check_tensor(OP, name, value, f"({', '.join(map(str, shape))})" if len(shape) > 1 else "(channels)")
        check_shape(OP, name, value, shape, "channels of x, outputs and squeezed channels")
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        check_same_dtype_or_float32(OP, "x", x, **{name: value for name, (value, _) in expected.items()})
    else:
        for name, (value, _) in expected.items():
            if value.dtype == torch.float64:
                raise TypeError(f"{OP}: {name} must not be torch.float64 under autocast, except together with x")
    check_same_device(OP, "x", x, **{name: value for name, (value, _) in expected.items()})
    for name, number, length in (("rows", rows, height), ("columns", columns, width)):
        check_int(OP, name, number)
        if number < 1 or length < 1 or length % number != 0:
            raise ValueError(f"{OP}: {name} must divide {length} pixels, got {number}")
    check_int(OP, "neighbourhood", neighbourhood)
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        raise ValueError(f"{OP}: neighbourhood must be an odd number of windows, got {neighbourhood}")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{OP}: scale must be a number, got {scale!r}")


# The op that the fused kernel implements.


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    rows, columns = others[5:7]
    return x.new_empty(x.shape[0], rows, columns, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.savl.channel_gate_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 4)


def _fake_backward(grad: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in others[:7])


def _compute_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    rows: int,
    columns: int,
    neighbourhood: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Compute the gradients by operations of torch, in float64: then sums have no order to depend on."""
    given = (x, weight, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias)
    grad, x, weight, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias = (
        each.double().contiguous() for each in (grad, *given)
    )
    averages = _shifted_averages(x, rows, columns)
    near = _box_average(averages, neighbourhood).contiguous()
    pooled = F.linear(near, weight.flatten(1), bias)
    squeezed = F.linear(pooled, squeeze_weight, squeeze_bias).relu()
    gate = F.linear(squeezed, excite_weight, excite_bias).sigmoid()

    def products(gradient: Tensor, inputs: Tensor) -> Tensor:
        return gradient.flatten(0, 2).t() @ inputs.flatten(0, 2)

    grad_excited = grad * scale * gate * (1 - gate)
    grad_squeezed = (grad_excited @ excite_weight) * (squeezed > 0)
    grad_pooled = grad_squeezed @ squeeze_weight
    grad_near = grad_pooled @ weight.flatten(1)
    if neighbourhood > 1:
        side, around = [neighbourhood] * 2, [neighbourhood // 2] * 2
        planes = [each.permute(0, 3, 1, 2).contiguous() for each in (grad_near, averages)]
        grad_near = torch.ops.aten.avg_pool2d_backward(*planes, side, [1, 1], around, False, False, None)
        grad_near = grad_near.permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    tall, wide = height // rows, width // columns
    spread = (grad_near / (tall * wide)).unflatten(3, (channels, 3, 3))
    padded = x.new_zeros(batch, height + 2, width + 2, channels)
    for i in range(3):
        for j in range(3):
            part = spread[:, :, None, :, None, :, i, j].expand(batch, rows, tall, columns, wide, channels)
            padded[:, i : i + height, j : j + width] += part.reshape(batch, height, width, channels)
    gradients = (
        padded[:, 1:-1, 1:-1].contiguous(),
        products(grad_pooled, near).view(weight.shape),
        grad_pooled.sum((0, 1, 2)),
        products(grad_squeezed, pooled),
        grad_squeezed.sum((0, 1, 2)),
        products(grad_excited, squeezed),
        grad_excited.sum((0, 1, 2)),
    )
    return tuple(each.to(to.dtype) for each, to in zip(gradients, given, strict=True))


# Cases for tests and benchmarks


def channel_gate_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    height: int = 16,
    width: int = 24,
    channels: int = 12,
    outputs: int = 48,
    squeezed: int = 6,
    rows: int = 2,
    columns: int = 3,
    neighbourhood: int = 1,
    seed: int = 0,
) -> Case:
    """Return a case of the gate."""
    draw = Draw(dtype, seed)
    arguments: dict[str, Tensor | None] = {
        "x": draw.normal(batch, height, width, channels),
        "weight": draw.normal(outputs, channels, 3, 3),
        "bias": draw.normal(outputs),
        "squeeze_weight": draw.normal(squeezed, outputs) / outputs**0.5,
        "squeeze_bias": draw.normal(squeezed),
        "excite_weight": draw.normal(outputs, squeezed) / squeezed**0.5,
        "excite_bias": draw.normal(outputs),
    }
    options = {"rows": rows, "columns": columns, "neighbourhood": neighbourhood, "scale": 0.5}
    terms = height * width * 9 + 9 * channels + outputs + squeezed + batch * rows * columns
    label = f"{channels} to {outputs} channels, {rows}x{columns} windows, neighbourhood {neighbourhood}"
    return Case(OP, arguments, options, terms, label)


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """The gate of a block of savl-base."""
    windows = side // 16
    x = draw.normal(1, side, side, 6)
    arguments: dict[str, Tensor | None] = {
        "x": x,
        "weight": draw.normal(144, 6, 3, 3),
        "bias": draw.normal(144),
        "squeeze_weight": draw.normal(6, 144) / 12,
        "squeeze_bias": draw.normal(6),
        "excite_weight": draw.normal(144, 6),
        "excite_bias": draw.normal(144),
    }
    options = {"rows": windows, "columns": windows, "neighbourhood": 5, "scale": 0.01}
    moved = float(x.nbytes)
    return BenchmarkProblem(arguments, options, moved, 2 * moved, 9.0 * x.numel(), 9.0 * x.numel())


def _triton_limit(x: Tensor, weight: Tensor, *others: Tensor) -> str | None:
    for what, number, most in (("x", x.shape[-1], MOST_CHANNELS), ("the gate", weight.shape[0], MOST_OUTPUTS)):
        if number > most:
            return f"{what} has {number} channels, more than {most}"
    return None


_SMALL = {"batch": 1, "height": 6, "width": 10, "channels": 5, "outputs": 19, "squeezed": 3}
CHANNEL_GATE = register(
    Op(
        name=OP,
        function=channel_gate,
        reference=channel_gate_reference,
        backends={TRITON: _triton_limit, CPP: None},
        schema="channel_gate(Tensor x, Tensor weight, Tensor bias, Tensor squeeze_weight, Tensor squeeze_bias, "
        "Tensor excite_weight, Tensor excite_bias, SymInt rows, SymInt columns, int neighbourhood, "
        "float scale) -> Tensor",
        backward_schema="channel_gate_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, "
        "Tensor squeeze_weight, Tensor squeeze_bias, Tensor excite_weight, Tensor excite_bias, SymInt rows, "
        "SymInt columns, int neighbourhood, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        backward_in_torch=_compute_backward,
        decomposition=_compute,
        setup_context=_setup_context,
        backward=_backward,
        case=channel_gate_case,
        full_cases=(
            {"rows": 1, "columns": 1},
            {"height": 32, "width": 32, "rows": 4, "columns": 4, "neighbourhood": 5},
            {"channels": 6, "outputs": 144},
        ),
        quick_cases=(
            {**_SMALL, "rows": 1, "columns": 1},
            {"height": 16, "width": 16, "rows": 4, "columns": 4, "neighbourhood": 5},
            {**_SMALL, "rows": 2, "columns": 3, "width": 9},
        ),
        small_cases=({**_SMALL, "rows": 1, "columns": 1}, {**_SMALL, "rows": 3, "columns": 5, "neighbourhood": 3}),
        tiny_cases=({**_SMALL, "channels": 2, "outputs": 4, "rows": 3, "columns": 2, "neighbourhood": 3},),
        interpreter_cases=(
            {**_SMALL, "rows": 1, "columns": 1},
            {**_SMALL, "rows": 3, "columns": 5, "neighbourhood": 3},
        ),
        title="channel gate",
        benchmark=_benchmark,
    )
)
