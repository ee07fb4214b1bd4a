"""1×1 or 3×3 convolution over channels-last features, with the pixelwise operations around it.

    y = activation(convolution(layer_norm(x)) + bias)
    out = residual + (1 + gamma) · gate · y + beta

Every part except the convolution is optional. ``gate`` and ``gamma`` require ``residual`` and exclude each other;
``beta`` requires ``gamma``. A linear layer is a convolution with a 1×1 kernel. The fused kernel normalises while it
packs the input, and applies the other operations before it writes the result. No separate operations are then needed to
move or add features. The op computes everything between the attention ops of a transformer block.

Source: the fused epilogues of oneDNN and cuBLASLt; the operations are those of HAT and SAVL.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from savl import ops
from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.library import CPP, INTERPRETED, TRITON
from savl.ops.op import Op, register
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import (
    check_eps,
    check_int,
    check_same_device,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
)

OP = "convolution"
MOST_CHANNELS = 512
"""Largest number of channels for the Triton kernel of linear layers, whose programs hold all channels of a pixel."""
FEW_INPUTS, FEW_OUTPUTS = 8, 16
"""Largest numbers of channels on one side of a 3×3 kernel for the Triton kernels. cuDNN serves the others well."""
Activation = Literal["none", "gelu", "leaky_relu"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "gelu", "leaky_relu")


def convolution(
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
    activation: Activation = "none",
    slope: float = 0.01,
    eps: float = 1e-5,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Convolve features, with layer normalisation before and pixelwise operations after.

    Computes ``residual + (1 + gamma) · gate · activation(convolution(layer_norm(x)) + bias) + beta``. The
    input is zero-padded after normalisation. Parts whose arguments are None are left out.

    Args:
        x: ``(B, H, W, C)`` floating, C ≥ 1.
        weight: ``(O, C)`` for a 1×1 kernel, ``(O, C, 1, 1)`` or ``(O, C, 3, 3)``; dtype of ``x`` or float32. Under
            autocast any floating one, but float64 only together with ``x``, in which case autocast has no effect.
        bias: ``(O,)``, dtypes as for ``weight``.
        norm_weight: ``(C,)``, weight of the layer normalisation; dtypes as for ``weight``. None for no normalisation.
        norm_bias: ``(C,)``; given if and only if ``norm_weight`` is.
        residual: ``(B, H, W, O)``, dtype of ``x``, or float32 if ``x`` is float16 or bfloat16; under autocast any
            floating one. If it is float32, the output is float32, so that sums of residuals are not rounded to the
            lower precision.
        gamma: ``(B, H, W, O)``, dtype of ``x``; under autocast any floating one. Requires ``residual``.
        beta: ``(B, H, W, O)``, dtypes as for ``gamma``. Requires ``gamma``.
        gate: ``(B, rows, columns, O)``, one factor for each part of a regular grid of rows × columns parts, which
            divide H and W; dtypes as for ``weight``. Requires ``residual``, and excludes ``gamma``.
        dilation: Spacing between the elements of a 3×3 kernel, as in `torch.nn.Conv2d`, ≥ 1.
        activation: ``"none"``, ``"gelu"`` (the definition with the error function, not the tanh approximation) or
            ``"leaky_relu"``.
        slope: Slope of the leaky ReLU below zero.
        eps: Added to the variance in the normalisation, ≥ 0.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`. Where no fused kernel
            serves, `savl.ops.layer_norm` and `savl.ops.channel_modulation` may still be fused.

    Returns:
        ``(B, H, W, O)``. Dtype of ``residual`` if it is given, else of ``x``; under autocast, without a residual, the
        dtype of autocast.

    Raises:
        TypeError: An argument is not a floating-point tensor, or dtypes are incompatible.
        ValueError: Shapes, devices or options are incompatible.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    tensors = (x, weight, bias, norm_weight, norm_bias, residual, gamma, beta, gate)
    options = (dilation, activation, slope, eps)
    numbers = type(dilation) is int and type(slope) is float and type(eps) is float  # torch takes others too
    if not (isinstance(x, Tensor) and numbers) or torch.compiler.is_compiling():
        _validate(*tensors, *options)
    try:
        narrow, fits = False, True
        given: Any = tensors
        autocast = autocasts(x)
        if autocast:
            given = _cast(*tensors)
            fits, narrow = _fits_autocast(x), given[0].dtype == torch.float32
        if fits and serves(CONVOLUTION, kernels, *given):
            parameters = [each.dtype for each in (weight, bias, norm_weight, norm_bias, gate) if each is not None]
            if not autocast and x.dtype == torch.float32 and torch.bfloat16 in parameters:
                _validate(*tensors, *options)  # raises; the kernel takes these dtypes
            trained = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)
            keep = trained and (activation != "none" or gamma is not None or gate is not None)
            settings = (dilation, ACTIVATIONS.index(activation), slope, eps, keep, narrow)
            fused: Tensor = torch.ops.savl.convolution.default(*given, *settings)[0]
            return fused
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # The kernel checks its arguments; only the message is worth the time of a second check.
        _validate(*tensors, *options)
        raise
    _validate(*tensors, *options)
    return _compose(*tensors, *options, kernels)


def fuses_convolution(x: Tensor, kernels: KernelSettings | None = None) -> bool:
    """Return whether a fused kernel computes `convolution` for an input.

    If so, layer normalisation needs no separate pass over memory.
    """
    return (not autocasts(x) or _fits_autocast(x)) and serves(CONVOLUTION, kernels, x)


_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast has an effect. Torch leaves float64 alone, and has no autocast for meta tensors."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _fits_autocast(x: Tensor) -> bool:
    """Return whether the fused kernels multiply in the dtype of autocast."""
    return torch.get_autocast_dtype(x.device.type) == torch.bfloat16


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the tensors of `convolution`, in the order of its arguments, for the kernel under bfloat16 autocast.

    gamma and beta become bfloat16. Other float16 tensors become float32; float32 and bfloat16 tensors are not changed.
    """

    def cast(index: int, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype not in _AUTOCAST:
            return tensor
        if index in (6, 7):  # gamma and beta
            return tensor.to(torch.bfloat16)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return tuple(cast(index, tensor) for index, tensor in enumerate(tensors))


def convolution_reference(
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
    activation: Activation = "none",
    slope: float = 0.01,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `convolution` by operations of torch: the reference."""
    eager = KernelSettings.of(False)
    tensors = (x, weight, bias, norm_weight, norm_bias, residual, gamma, beta, gate)
    return _compose(*tensors, dilation, activation, slope, eps, eager)


def _compose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    dilation: int,
    activation: Activation,
    slope: float,
    eps: float,
    kernels: KernelSettings | None,
) -> Tensor:
    # These are the functions of the package, so that profilers find the calls of ops inside of this one.
    if norm_weight is not None and norm_bias is not None:
        if autocasts(x):
            norm_weight, norm_bias = norm_weight.float(), norm_bias.float()
        x = ops.layer_norm(x, norm_weight, norm_bias, eps=eps, kernels=kernels)
    y = _activate(_convolve(x, weight, bias, dilation), activation, slope)
    if residual is None:
        return y
    if gamma is not None:
        if autocasts(x):
            gamma, beta = gamma.to(y.dtype), None if beta is None else beta.to(y.dtype)
            residual = residual.to(torch.promote_types(residual.dtype, y.dtype))
        return ops.channel_modulation(y, gamma, beta, residual, kernels=kernels)
    if gate is None:
        return residual + y
    rows, columns = gate.shape[1:3]
    batch, height, width, outputs = y.shape
    cut = (batch, rows, height // rows, columns, width // columns, outputs)
    dtype = torch.promote_types(residual.dtype, y.dtype)
    terms = (residual.reshape(cut), y.reshape(cut), gate[:, :, None, :, None])
    return torch.addcmul(*(each.to(dtype) for each in terms)).reshape(y.shape)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve by torch. The dtype of the parameters may be wider than that of ``x``, as it is under autocast."""
    if not autocasts(x) and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    if weight.dim() == 2 or weight.shape[-1] == 1:
        # Contiguous, because torch multiplies other inputs in one of two ways: one for training, one for inference.
        return F.linear(x.contiguous(), weight.flatten(1), bias)
    padding = weight.shape[-1] // 2 * dilation
    planes = _planes(x, dilation, torch.is_grad_enabled() and weight.requires_grad)
    if planes.is_contiguous():  # torch computes in channels_last if either tensor has that layout
        weight = weight.contiguous()
    return F.conv2d(planes, weight, bias, padding=padding, dilation=dilation).permute(0, 2, 3, 1)


def _planes(x: Tensor, dilation: int, trained: bool) -> Tensor:
    """Return features as ``(B, C, H, W)`` for torch's convolution: a channels_last view, which needs no copy.

    The exception are dilated convolutions in bfloat16 whose weight is trained on a CPU. On processors without AMX,
    oneDNN computes the gradient of the weight with an AVX-512 kernel that reads beyond the end of its scratch memory
    and may crash the process. It does so in channels_last if the number of input channels is above 16 and no multiple
    of 16 (seen with torch 2.13). In the contiguous layout, oneDNN uses another kernel.
    """
    planes = x.permute(0, 3, 1, 2)
    narrow = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return planes.contiguous() if trained and dilation > 1 and x.is_cpu and narrow else planes


def _activate(y: Tensor, activation: Activation, slope: float) -> Tensor:
    if activation == "gelu":
        return F.gelu(y)
    return F.leaky_relu(y, slope) if activation == "leaky_relu" else y


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    dilation: int,
    activation: str,
    slope: float,
    eps: float,
) -> None:
    check_tensor(OP, "x", x, "(B, H, W, C)")
    if isinstance(weight, Tensor) and weight.dim() == 2:
        weight = weight[:, :, None, None]
    check_tensor(OP, "weight", weight, "(O, C, side, side)")
    batch, height, width, channels = x.shape
    outputs, side = weight.shape[0], weight.shape[-1]
    if 0 in (channels, outputs):
        raise ValueError(f"{OP}: x and weight must have one channel or more, got {tuple(x.shape)} and {weight.shape}")
    if side not in (1, 3):
        raise ValueError(f"{OP}: weight must be (O, C), (O, C, 1, 1) or (O, C, 3, 3), got {tuple(weight.shape)}")
    check_shape(OP, "weight", weight, (outputs, channels, side, side), "one plane per channel of x")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError(f"{OP}: norm_weight and norm_bias must be given together, got only one of them")
    lines = (("bias", bias, outputs), ("norm_weight", norm_weight, channels), ("norm_bias", norm_bias, channels))
    for name, value, length in lines:
        if value is not None:
            check_tensor(OP, name, value, "(channels)")
            check_shape(OP, name, value, (length,), "one value per channel")
    for name, value in (("residual", residual), ("gamma", gamma), ("beta", beta)):
        if value is not None:
            check_tensor(OP, name, value, "(B, H, W, O)")
            check_shape(OP, name, value, (batch, height, width, outputs), "that of the output")
    for name, value, needed, other in (("gamma", gamma, "residual", residual), ("beta", beta, "gamma", gamma)):
        if value is not None and other is None:
            raise ValueError(f"{OP}: {name} is accepted together with {needed} only, which is None")
    if gate is not None:
        check_tensor(OP, "gate", gate, "(B, rows, columns, O)")
        rows, columns = gate.shape[1:3]
        check_shape(OP, "gate", gate, (batch, rows, columns, outputs), "one value per part and output channel")
        if 0 in (rows, columns) or height % rows != 0 or width % columns != 0:
            raise ValueError(
                f"{OP}: gate must have rows and columns that divide {height}x{width}, got {rows}x{columns}"
            )
        if residual is None or gamma is not None:
            raise ValueError(f"{OP}: gate is accepted together with residual and without gamma only")
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "gate": gate}
    features = {"residual": residual, "gamma": gamma, "beta": beta}
    if autocasts(x):
        for name, value in (parameters | features).items():
            if value is not None and value.dtype == torch.float64:
                raise TypeError(f"{OP}: {name} must not be torch.float64 under autocast, except together with x")
    else:
        check_same_dtype_or_float32(OP, "x", x, **parameters)
        for name, value in features.items():
            wide = name == "residual" and x.dtype.itemsize == 2 and value is not None and value.dtype == torch.float32
            if value is not None and value.dtype != x.dtype and not wide:
                raise TypeError(f"{OP}: {name} must be {x.dtype} like x, got {value.dtype}")
    check_same_device(OP, "x", x, **parameters, **features)
    check_int(OP, "dilation", dilation)
    if dilation < 1:
        raise ValueError(f"{OP}: dilation must be at least 1 pixel, got {dilation}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if isinstance(slope, bool) or not isinstance(slope, int | float):
        raise TypeError(f"{OP}: slope must be a number, got {slope!r}")
    check_eps(OP, eps)


# The op that the fused kernel implements. Its second result is the sum before the activation, which the backward pass
# needs after an activation and for the gradients of gamma and gate; it is empty without ``keep``.


def _fake(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if any(each.device != x.device for each in (weight, *others) if isinstance(each, Tensor)):
        raise RuntimeError(f"savl::{OP}: tensors are on different devices")  # torch calls this if one of them is meta
    shape = (*x.shape[:3], weight.shape[0])
    residual, keep, narrow = others[3], others[-2], others[-1]
    dtype = torch.bfloat16 if narrow else x.dtype
    kept = x.new_empty(shape if keep else (0,), dtype=dtype)
    return x.new_empty(shape, dtype=dtype if residual is None else residual.dtype), kept


def _decomposition(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    *tensors, dilation, activation, slope, eps, keep, narrow = others
    if narrow:
        x = x.to(torch.bfloat16)
    named = ACTIVATIONS[activation]
    out = convolution_reference(x, weight, bias, *tensors, dilation=dilation, activation=named, slope=slope, eps=eps)
    if not keep:
        return out, out.new_empty(0)
    kept = convolution_reference(x, weight, bias, tensors[0], tensors[1], dilation=dilation, eps=eps)
    return out, kept


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, norm_weight, norm_bias, _, gamma, _, gate, *options, _, narrow = inputs
    kept = output[1]
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, gamma, gate, kept)
    ctx.options = (*options, narrow)
    ctx.dtypes = [None if each is None else each.dtype for each in inputs[:9]]


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:9])
    found = torch.ops.savl.convolution_backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
    x, weight, bias, norm_weight, norm_bias, gamma, gate = found
    gradients = (x, weight, bias, norm_weight, norm_bias, grad, gamma, grad, gate)
    with_dtypes = zip(gradients, wanted, ctx.dtypes, strict=True)
    return (*(each.to(dtype) if needed and dtype else None for each, needed, dtype in with_dtypes), *[None] * 6)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    gate: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Empty tensors stand for gradients that are not wanted."""
    wanted = options[-1]
    like = (x, weight, weight.flatten(1)[:, 0], norm_weight, norm_bias, gamma, gate)
    flags = (*wanted[:5], wanted[6], wanted[8])
    return tuple(
        x.new_empty(each.shape if flag and each is not None else (0,), dtype=x.dtype)
        for each, flag in zip(like, flags, strict=True)
    )


def _compute_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    gate: Tensor | None,
    kept: Tensor,
    dilation: int,
    code: int,
    slope: float,
    eps: float,
    narrow: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Compute the gradients by operations of torch; on a CPU, that of ``x`` with the fused kernel."""
    absent = x.new_empty(0)
    grad_gamma = grad_gate = grad_norm_weight = grad_norm_bias = grad_x = grad_weight = absent
    dtype = torch.bfloat16 if narrow else x.dtype  # of the products
    # The order of sums, and with it the last bits, must not depend on the layout of the arguments.
    grad, x, weight = grad.to(dtype).contiguous(), x.contiguous(), weight.contiguous()
    gamma = None if gamma is None else gamma.contiguous()
    batch, height, width, outputs = grad.shape
    activation = ACTIVATIONS[code]
    if gamma is not None or gate is not None:
        y = _activate(kept, activation, slope)
        if gamma is not None:
            grad_gamma = grad * y if wanted[6] else absent
            grad = torch.addcmul(grad, grad, gamma)
        else:
            assert gate is not None
            rows, columns = gate.shape[1:3]
            cut = (batch, rows, height // rows, columns, width // columns, outputs)
            grad_gate = (grad * y).view(cut).sum((2, 4)) if wanted[8] else absent
            grad = (grad.view(cut) * gate[:, :, None, :, None].to(grad.dtype)).view(grad.shape)
    if activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, kept)
    elif activation == "leaky_relu":
        grad = torch.ops.aten.leaky_relu_backward(grad, kept, slope, False)
    grad_bias = grad.sum((0, 1, 2)) if wanted[2] else absent
    normed, mean, inverse = x, absent, absent
    if norm_weight is not None:
        normed, mean, inverse = torch.ops.savl.layer_norm(x, norm_weight, norm_bias, eps, False)
    normed = normed.to(dtype)
    side = 1 if weight.dim() == 2 else weight.shape[-1]
    if wanted[0] or (norm_weight is not None and (wanted[3] or wanted[4])):
        grad_x = _gradient_of_input(grad, weight, dilation).to(x.dtype)
        if norm_weight is not None:
            grad_x, grad_norm_weight, grad_norm_bias = torch.ops.savl.layer_norm_backward(
                grad_x, x, norm_weight, norm_bias, mean, inverse
            )
    if wanted[1] and grad.numel() == 0:
        grad_weight = weight.new_zeros(weight.shape, dtype=x.dtype)
    elif wanted[1] and side == 1:
        grad_weight = (grad.flatten(0, 2).t() @ normed.flatten(0, 2)).view(weight.shape)
    elif wanted[1]:
        narrow_weight = weight.to(dtype)
        planes, gradient = _planes(normed, dilation, True), grad.permute(0, 3, 1, 2)
        around, mask = [side // 2 * dilation] * 2, [False, True, False]
        grad_weight = torch.ops.aten.convolution_backward(
            gradient, planes, narrow_weight, None, [1, 1], around, [dilation] * 2, False, [0, 0], 1, mask
        )[1].contiguous()
    found = (grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_gamma, grad_gate)
    flags = (*wanted[:5], wanted[6], wanted[8])
    return tuple(each.to(x.dtype) if flag else absent.clone() for each, flag in zip(found, flags, strict=True))


def _gradient_of_input(grad: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Return the gradient of the input of the convolution alone, given that of its output."""
    if grad.is_cpu and not INTERPRETED:
        turned = weight.t() if weight.dim() == 2 else weight.transpose(0, 1).flip(2, 3)
        found: Tensor = torch.ops.savl.convolution(grad, turned, *[None] * 7, dilation, 0, 0.0, 0.0, False, False)[0]
        return found
    weight = weight.to(grad.dtype)
    if weight.dim() == 2 or weight.shape[-1] == 1:
        return grad @ weight.flatten(1)
    planes, around = grad.permute(0, 3, 1, 2), weight.shape[-1] // 2 * dilation
    return F.conv_transpose2d(planes, weight, padding=around, dilation=dilation).permute(0, 2, 3, 1).contiguous()


# Cases for tests and benchmarks


def convolution_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    height: int = 16,
    width: int = 24,
    channels: int = 48,
    outputs: int = 96,
    side: int = 1,
    norm: bool = False,
    bias: bool = True,
    residual: bool = False,
    modulation: bool = False,
    gate: tuple[int, int] | None = None,
    dilation: int = 1,
    activation: Activation = "none",
    seed: int = 0,
) -> Case:
    """Return a case of the convolution; ``gate`` is the grid of the gate."""
    draw = Draw(dtype, seed)
    image = (batch, height, width)
    arguments: dict[str, Tensor | None] = {
        "x": draw.normal(*image, channels),
        "weight": draw.normal(outputs, channels, side, side) / (side * channels**0.5),
        "bias": draw.normal(outputs) if bias else None,
        "norm_weight": draw.normal(channels) if norm else None,
        "norm_bias": draw.normal(channels) if norm else None,
        "residual": draw.normal(*image, outputs) if residual or modulation or gate else None,
        "gamma": draw.normal(*image, outputs) if modulation else None,
        "beta": draw.normal(*image, outputs) if modulation else None,
        "gate": draw.normal(batch, *gate, outputs) if gate else None,
    }
    parts = [f"{channels} to {outputs} channels", f"{side}x{side}", activation]
    parts += [name for name, present in (("norm", norm), ("modulation", modulation), ("gate", gate)) if present]
    terms = max(side * side * channels, batch * height * width) + outputs
    options = {"dilation": dilation, "activation": activation}
    return Case(OP, arguments, options, terms, ", ".join(parts))


def _benchmark(draw: Draw, side: int, kernel: int = 1) -> BenchmarkProblem:
    """The first layer of an MLP of savl-base, or with ``kernel`` 3 the convolution at the end of its groups."""
    channels, outputs = 144, 288 if kernel == 1 else 144
    x = draw.normal(1, side, side, channels)
    arguments: dict[str, Tensor | None] = {
        "x": x,
        "weight": draw.normal(outputs, channels, kernel, kernel) / (kernel * channels**0.5),
        "bias": draw.normal(outputs),
    }
    if kernel == 1:
        arguments |= {"norm_weight": draw.normal(channels), "norm_bias": draw.normal(channels)}
    else:
        arguments |= {"residual": draw.normal(1, side, side, outputs)}
    pixels = float(side * side)
    moved = pixels * (channels + outputs) * x.element_size()
    flops = 2 * pixels * channels * outputs * kernel**2
    options = {"activation": "gelu"} if kernel == 1 else {}
    return BenchmarkProblem(arguments, options, moved, 2 * moved, flops, 2 * flops, bandwidth_bound=False)


def _triton_limit(x: Tensor, weight: Tensor | None = None, *others: Tensor | None) -> str | None:
    if weight is not None and weight.dim() == 4 and weight.shape[-1] == 3:
        outputs, inputs = weight.shape[:2]
        normed = len(others) > 1 and others[1] is not None
        if outputs <= FEW_OUTPUTS or (inputs <= FEW_INPUTS and not normed):
            return None
        few = f"to at most {FEW_OUTPUTS} channels, or without normalisation from at most {FEW_INPUTS}"
        return f"its 3×3 kernels convolve {few}, not {inputs} to {outputs}"
    return None if x.shape[-1] <= MOST_CHANNELS else f"x has {x.shape[-1]} channels, more than {MOST_CHANNELS}"


_MLP = {"norm": True, "activation": "gelu"}
_SMALL = {"batch": 1, "height": 5, "width": 7, "channels": 19, "outputs": 21}
CONVOLUTION = register(
    Op(
        name=OP,
        function=convolution,
        reference=convolution_reference,
        backends={TRITON: _triton_limit, CPP: None},
        schema="convolution(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? residual, Tensor? gamma, Tensor? beta, Tensor? gate, int dilation, int activation, float slope, "
        "float eps, bool keep, bool narrow) -> (Tensor, Tensor)",
        backward_schema="convolution_backward(Tensor grad, Tensor x, Tensor weight, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor? gamma, Tensor? gate, Tensor kept, int dilation, int activation, float slope, "
        "float eps, bool narrow, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        backward_in_torch=_compute_backward,
        decomposition=_decomposition,
        setup_context=_setup_context,
        backward=_backward,
        case=convolution_case,
        full_cases=(
            {"channels": 144, "outputs": 432, "norm": True},
            {"channels": 144, "outputs": 288, **_MLP},
            {"channels": 288, "outputs": 144, "residual": True},
            {"channels": 144, "outputs": 144, "modulation": True, "bias": False},
            {"channels": 144, "outputs": 6, "side": 3, **_MLP},
            {"channels": 6, "outputs": 144, "side": 3, "gate": (1, 2)},
            {"channels": 64, "outputs": 64, "side": 3, "dilation": 2, "activation": "leaky_relu"},
        ),
        quick_cases=(
            {"height": 8, "width": 9, **_MLP},
            {"height": 8, "width": 9, "modulation": True, "bias": False},
            {"height": 6, "width": 36, "channels": 12, "outputs": 48, "side": 3, "gate": (2, 3), "activation": "gelu"},
            {"height": 11, "width": 9, "outputs": 12, "side": 3, **_MLP},
            {**_SMALL, "side": 3, "dilation": 2, "activation": "leaky_relu", "residual": True},
        ),
        small_cases=(
            {**_SMALL, **_MLP, "modulation": True},
            {**_SMALL, "height": 6, "side": 3, "gate": (2, 1), "activation": "leaky_relu"},
            {**_SMALL, "side": 3, "dilation": 3, "residual": True},
        ),
        tiny_cases=(
            {"batch": 1, "height": 2, "width": 2, "channels": 3, "outputs": 2, **_MLP, "modulation": True},
            {"batch": 1, "height": 2, "width": 3, "channels": 2, "outputs": 2, "side": 3, "gate": (1, 3)},
        ),
        interpreter_cases=(
            {**_SMALL, **_MLP, "modulation": True},
            {**_SMALL, "channels": 48, "outputs": 36, "height": 4, "width": 9, "gate": (2, 3)},
            {**_SMALL, "activation": "leaky_relu", "residual": True, "bias": False},
            {**_SMALL, **_MLP, "outputs": 6, "side": 3},
            {**_SMALL, "channels": 6, "width": 9, "side": 3, "gate": (1, 3), "bias": False},
        ),
        title="convolution",
        benchmark=_benchmark,
        benchmark_options=({"title": "convolution, 3×3", "kernel": 3},),
    )
)
