"""The end of a transformer block: projection, residual, gated convolution and MLP in one pass over the features.

    y = residual + linear(x) [+ gate · convolution(hidden)]
    out = y + contract(GELU(expand(layer_norm(y))))

``x`` is the result of attention. The part in brackets is that of HAT's channel attention block, whose gate
`savl.ops.channel_gate` computes first. A GPU reads x, the residual and the few channels of ``hidden`` once, and writes
the result once. On a CPU the kernels of `savl.ops.convolution` do the same part by part, since caches hold the features
between them. The backward pass computes ``y`` and the features of the MLP again.

Source: the blocks of HAT (Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from savl import ops
from savl.kernels.gpu import COMPILER
from savl.ops.case import BenchmarkProblem, Case, Draw
from savl.ops.convolution import autocasts
from savl.ops.library import CPP, TRITON
from savl.ops.op import Op, register
from savl.ops.settings import KernelSettings
from savl.ops.switch import serves
from savl.ops.validation import (
    check_eps,
    check_same_device,
    check_same_dtype,
    check_same_dtype_or_float32,
    check_shape,
    check_tensor,
)

OP = "projection_mlp"
MOST_CHANNELS = 256
"""Largest number of channels for the Triton kernel, whose programs keep the sums of all channels in registers."""
MOST_CHANNELS_IN_FLOAT32 = 160
"""The same for float32. With more channels, registers are spilled to memory."""
MOST_CONVOLVED = 16
"""Largest number of channels of ``hidden`` for the Triton kernel, which loads each of them nine times."""


class _Tensors(NamedTuple):
    """The tensors of a call, in the order of the schema; `projection_mlp` states their shapes."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    hidden: Tensor | None
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    gate: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    contract_weight: Tensor
    contract_bias: Tensor


def projection_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    hidden: Tensor | None,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor,
    *,
    eps: float = 1e-5,
    kernels: KernelSettings | None = None,
) -> Tensor:
    """Compute the end of a transformer block.

    Computes ``y = residual + linear(x) + gate · convolution(hidden)`` and returns
    ``y + contract(GELU(expand(layer_norm(y))))``. Without ``hidden`` there is no convolution.

    Args:
        x: ``(B, H, W, K)`` floating, K ≥ 1.
        weight: ``(C, K)``, dtype of ``x`` or float32; under autocast any floating one. The same holds for the other
            parameters and for ``gate``.
        bias: ``(C,)``.
        residual: ``(B, H, W, C)``, dtype of ``x``; under autocast any floating one.
        hidden: ``(B, H, W, D)``, dtypes as for ``residual``, or None, as are the next three.
        hidden_weight: ``(C, D, 3, 3)``.
        hidden_bias: ``(C,)``.
        gate: ``(B, rows, columns, C)``, one factor for each part of a regular grid, as in `savl.ops.convolution`.
        norm_weight: ``(C,)``, weight of the layer normalisation.
        norm_bias: ``(C,)``.
        expand_weight: ``(N, C)``, first layer of the MLP.
        expand_bias: ``(N,)``.
        contract_weight: ``(C, N)``, second layer of the MLP.
        contract_bias: ``(C,)``.
        eps: Added to the variance in the normalisation, ≥ 0.
        kernels: Kernels to use in this call. None uses the setting of `savl.use_fused_kernels`. Where no fused kernel
            serves, and under autocast, those of `savl.ops.convolution` may.

    Returns:
        ``(B, H, W, C)``, dtype of ``residual``.

    Raises:
        TypeError: An argument is not a floating-point tensor, or dtypes are incompatible.
        ValueError: Shapes, devices or options are incompatible.
        KernelUnavailable: A backend was requested by name and cannot compute this call.
    """
    convolved = (hidden, hidden_weight, hidden_bias, gate)
    layers = (norm_weight, norm_bias, expand_weight, expand_bias, contract_weight, contract_bias)
    tensors = _Tensors(x, weight, bias, residual, *convolved, *layers)
    _validate(tensors, eps)
    if not autocasts(x) and serves(PROJECTION_MLP, kernels, *tensors):
        fused: Tensor = torch.ops.savl.projection_mlp(*tensors, float(eps))
        return fused
    return _compose(tensors, float(eps), kernels)


def projection_mlp_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    hidden: Tensor | None,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `projection_mlp` by operations of torch: the reference."""
    convolved = (hidden, hidden_weight, hidden_bias, gate)
    layers = (norm_weight, norm_bias, expand_weight, expand_bias, contract_weight, contract_bias)
    tensors = _Tensors(x, weight, bias, residual, *convolved, *layers)
    return _compose(tensors, eps, KernelSettings.of(False))


def _compose(given: _Tensors, eps: float, kernels: KernelSettings | None) -> Tensor:
    y = ops.convolution(given.x, given.weight, given.bias, residual=given.residual, kernels=kernels)
    if given.hidden is not None:
        assert given.hidden_weight is not None
        parts: dict[str, Any] = {"residual": y, "gate": given.gate}
        y = ops.convolution(given.hidden, given.hidden_weight, given.hidden_bias, **parts, kernels=kernels)
    norm: dict[str, Any] = {"norm_weight": given.norm_weight, "norm_bias": given.norm_bias, "eps": eps}
    features = ops.convolution(y, given.expand_weight, given.expand_bias, **norm, activation="gelu", kernels=kernels)
    return ops.convolution(features, given.contract_weight, given.contract_bias, residual=y, kernels=kernels)


def _validate(given: _Tensors, eps: float) -> None:
    x, weight, bias, residual, *convolution, norm_weight, norm_bias = given[:10]
    hidden, hidden_weight, hidden_bias, gate = convolution
    expand_weight, expand_bias, contract_weight, contract_bias = given[10:]
    check_tensor(OP, "x", x, "(B, H, W, K)")
    check_tensor(OP, "weight", weight, "(C, K)")
    check_tensor(OP, "expand_weight", expand_weight, "(N, C)")
    image, channels, width = tuple(x.shape[:3]), weight.shape[0], expand_weight.shape[0]
    parameters = {
        "weight": (weight, (channels, x.shape[3])),
        "bias": (bias, (channels,)),
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
        "expand_weight": (expand_weight, (width, channels)),
        "expand_bias": (expand_bias, (width,)),
        "contract_weight": (contract_weight, (channels, width)),
        "contract_bias": (contract_bias, (channels,)),
    }
    features = {"residual": (residual, (*image, channels))}
    absent = [name for name in ("hidden", "hidden_weight", "hidden_bias", "gate") if getattr(given, name) is None]
    if len(absent) not in (0, 4):
        raise ValueError(
            f"{OP}: hidden, hidden_weight, hidden_bias and gate must be given together, got None for "
            f"{', '.join(absent)}"
        )
    if hidden is not None and hidden_weight is not None and hidden_bias is not None and gate is not None:
        check_tensor(OP, "hidden", hidden, "(B, H, W, D)")
        check_tensor(OP, "gate", gate, "(B, rows, columns, C)")
        rows, columns = gate.shape[1:3]
        if 0 in (rows, columns) or image[1] % rows != 0 or image[2] % columns != 0:
            raise ValueError(
                f"{OP}: gate must have rows and columns that divide {image[1]}x{image[2]}, got {rows}x{columns}"
            )
        convolved = hidden.shape[3]
        features["hidden"] = (hidden, (*image, convolved))
        parameters["hidden_weight"] = (hidden_weight, (channels, convolved, 3, 3))
        parameters["hidden_bias"] = (hidden_bias, (channels,))
        parameters["gate"] = (gate, (image[0], rows, columns, channels))
    if 0 in (x.shape[3], channels, width) or (hidden is not None and hidden.shape[3] == 0):
        raise ValueError(f"{OP}: tensors must have one channel or more")
    for name, (value, shape) in (parameters | features).items():
        check_tensor(OP, name, value, f"({', '.join(map(str, shape))})")
        check_shape(OP, name, value, shape, "channels of its neighbours")
    if not autocasts(x):
        check_same_dtype(OP, "x", x, **{name: value for name, (value, _) in features.items()})
        check_same_dtype_or_float32(OP, "x", x, **{name: value for name, (value, _) in parameters.items()})
    check_same_device(OP, "x", x, **{name: value for name, (value, _) in (parameters | features).items()})
    check_eps(OP, eps)


# The op that the fused kernels implement.

_PLAIN = (1, 0, 0.0, 0.0)
"""Dilation, activation, slope and eps of ``savl::convolution`` for a product alone."""


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *others: Any) -> Tensor:
    return x.new_empty(residual.shape)


def _compute(*arguments: Any) -> Tensor:
    """Compute the op on a CPU with the kernels of ``savl::convolution``; arguments as in the schema."""
    given, eps = _Tensors(*arguments[:-1]), arguments[-1]
    y, _, features, _ = _inner(given, eps, keep=False)
    return _product(features, given.contract_weight, given.contract_bias, residual=y)[0]


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    options: tuple[int, int, float, float] = _PLAIN,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.savl.convolution(
        x, weight, bias, *norm, residual, None, None, gate, *options, keep, False
    )
    return found


def _inner(given: _Tensors, eps: float, *, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the convolution before the gate, the features of the MLP, and these before the GELU.

    The second and the last are empty without ``keep``.
    """
    y, convolved = _product(given.x, given.weight, given.bias, residual=given.residual)
    if given.hidden is not None and given.hidden_weight is not None:
        gated: dict[str, Any] = {"residual": y, "gate": given.gate, "keep": keep}
        y, convolved = _product(given.hidden, given.hidden_weight, given.hidden_bias, **gated)
    norm = (given.norm_weight, given.norm_bias)
    gelu = (1, 1, 0.0, eps)
    features, before = _product(y, given.expand_weight, given.expand_bias, norm, options=gelu, keep=keep)
    return y, convolved, features, before


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:14])
    ctx.eps = inputs[14]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.savl.projection_mlp_backward(grad, *ctx.saved_tensors, ctx.eps)
    given = zip(found, ctx.saved_tensors, strict=True)
    return (*(None if each is None else gradient for gradient, each in given), None)


def _fake_backward(grad: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Empty tensors stand for gradients of what is absent."""
    return tuple(grad.new_empty(0) if each is None else each.new_empty(each.shape) for each in others[:14])


def _compute_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients layer by layer, from the last to the first, after computing the layers again.

    Args:
        grad: Gradient of the result, ``(B, H, W, C)``.
        arguments: Arguments of the op, as in its schema.

    Returns:
        Gradients of the 14 tensors, in their shapes and dtypes; empty for those that are None.
    """
    given, eps = _Tensors(*arguments[:-1]), arguments[-1]
    y, convolved, features, before = _inner(given, eps, keep=True)
    absent = grad.new_empty(0)

    def through(
        grad: Tensor, x: Tensor, weight: Tensor, *others: Any, kept: Tensor = absent, options: Any = _PLAIN
    ) -> tuple[Tensor, ...]:
        """Return the gradients of input, weight, bias, normalisation and gate of one layer."""
        normed, gated = others[0] is not None, others[3] is not None
        wanted = [True, True, True, normed, normed, False, False, False, gated]
        found = torch.ops.savl.convolution_backward(grad, x, weight, *others, kept, *options, False, wanted)
        return (*found[:5], found[6])

    plain = (None,) * 4
    grad_features, grad_contract, grad_contract_bias, *_ = through(grad, features, given.contract_weight, *plain)
    gelu = (1, 1, 0.0, eps)
    grad_y, grad_expand, grad_expand_bias, grad_norm_weight, grad_norm_bias, _ = through(
        grad_features, y, given.expand_weight, given.norm_weight, given.norm_bias, None, None, kept=before, options=gelu
    )
    grad_y = grad_y + grad
    of_convolution = (absent,) * 4
    if given.hidden is not None and given.hidden_weight is not None:
        grad_hidden, grad_hidden_weight, grad_hidden_bias, _, _, grad_gate = through(
            grad_y, given.hidden, given.hidden_weight, None, None, None, given.gate, kept=convolved
        )
        of_convolution = (grad_hidden, grad_hidden_weight, grad_hidden_bias, grad_gate)
    grad_x, grad_weight, grad_bias, *_ = through(grad_y, given.x, given.weight, *plain)
    of_layers = (grad_norm_weight, grad_norm_bias, grad_expand, grad_expand_bias, grad_contract, grad_contract_bias)
    found = (grad_x, grad_weight, grad_bias, grad_y, *of_convolution, *of_layers)
    return tuple(
        absent.clone() if to is None else each.to(to.dtype).contiguous() for each, to in zip(found, given, strict=True)
    )


# Cases for tests and benchmarks


def projection_mlp_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    height: int = 8,
    width: int = 12,
    inner: int = 48,
    channels: int = 48,
    convolved: int = 0,
    grid: tuple[int, int] = (1, 1),
    expanded: int = 96,
    seed: int = 0,
) -> Case:
    """Return a case; ``convolved`` are the channels of ``hidden``, 0 for none, and ``grid`` is that of the gate."""
    draw = Draw(dtype, seed)
    image = (batch, height, width)
    arguments: dict[str, Tensor | None] = {
        "x": draw.normal(*image, inner),
        "weight": draw.normal(channels, inner) / inner**0.5,
        "bias": draw.normal(channels),
        "residual": draw.normal(*image, channels),
        "hidden": draw.normal(*image, convolved) if convolved else None,
        "hidden_weight": draw.normal(channels, convolved, 3, 3) / (9 * convolved) ** 0.5 if convolved else None,
        "hidden_bias": draw.normal(channels) if convolved else None,
        "gate": draw.normal(batch, *grid, channels) if convolved else None,
        "norm_weight": draw.normal(channels),
        "norm_bias": draw.normal(channels),
        "expand_weight": draw.normal(expanded, channels) / channels**0.5,
        "expand_bias": draw.normal(expanded),
        "contract_weight": draw.normal(channels, expanded) / expanded**0.5,
        "contract_bias": draw.normal(channels),
    }
    terms = max(inner + 9 * convolved + channels + expanded, batch * height * width)
    label = f"{channels} channels, MLP of {expanded}" + (f", {convolved} convolved" if convolved else "")
    return Case(OP, arguments, {}, terms, label)


def _benchmark(draw: Draw, side: int) -> BenchmarkProblem:
    """The end of a HAB of savl-base."""
    made = projection_mlp_case(
        draw.dtype, height=side, width=side, inner=144, channels=144, convolved=6, expanded=288, seed=draw.seed
    )
    pixels, size = float(side * side), draw.dtype.itemsize
    flops = 2 * pixels * 144 * (144 + 2 * 288 + 54)
    moved = pixels * (3 * 144 + 6) * size
    return BenchmarkProblem(made.arguments, {}, moved, 2 * moved, flops, 3 * flops, bandwidth_bound=False)


def _triton_limit(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, hidden: Tensor | None, *others: Tensor | None
) -> str | None:
    for name, channels in (("x", x.shape[3]), ("residual", residual.shape[3])):
        most = MOST_CHANNELS_IN_FLOAT32 if x.dtype == torch.float32 else MOST_CHANNELS
        if channels > most:
            return f"{name} has {channels} channels, more than {most} in {str(x.dtype).removeprefix('torch.')}"
    if hidden is not None and hidden.shape[3] > MOST_CONVOLVED:
        return f"hidden has {hidden.shape[3]} channels, more than {MOST_CONVOLVED}"
    if x.dtype == torch.float32 and COMPILER == "hip":
        return "float32 does not fit into the registers of all AMD GPUs"
    return None


_SMALL = {"height": 4, "width": 6, "inner": 19, "channels": 21, "expanded": 24}
PROJECTION_MLP = register(
    Op(
        name=OP,
        function=projection_mlp,
        reference=projection_mlp_reference,
        backends={TRITON: _triton_limit, CPP: None},
        schema="projection_mlp(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? hidden, "
        "Tensor? hidden_weight, Tensor? hidden_bias, Tensor? gate, Tensor norm_weight, Tensor norm_bias, "
        "Tensor expand_weight, Tensor expand_bias, Tensor contract_weight, Tensor contract_bias, float eps) -> Tensor",
        backward_schema="projection_mlp_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor residual, "
        "Tensor? hidden, Tensor? hidden_weight, Tensor? hidden_bias, Tensor? gate, Tensor norm_weight, "
        "Tensor norm_bias, Tensor expand_weight, Tensor expand_bias, Tensor contract_weight, Tensor contract_bias, "
        f"float eps) -> ({', '.join(['Tensor'] * 14)})",
        fake=_fake,
        fake_backward=_fake_backward,
        forward_on_cpu=_compute,
        calls=("convolution",),
        backward_in_torch=_compute_backward,
        decomposition=lambda *given: projection_mlp_reference(*given[:-1], eps=given[-1]),
        setup_context=_setup_context,
        backward=_backward,
        case=projection_mlp_case,
        full_cases=(
            {"inner": 144, "channels": 144, "convolved": 6, "grid": (1, 2), "expanded": 288},
            {"inner": 180, "channels": 180, "expanded": 360},
        ),
        quick_cases=({**_SMALL, "convolved": 3, "grid": (2, 3)}, {}),
        small_cases=({**_SMALL, "convolved": 3, "grid": (2, 3)}, _SMALL),
        tiny_cases=(
            {"height": 2, "width": 2, "inner": 2, "channels": 2, "convolved": 1, "grid": (1, 2), "expanded": 3},
        ),
        interpreter_cases=({**_SMALL, "convolved": 3, "grid": (2, 3)}, {"height": 3, "width": 5}),
        title="projection and MLP",
        benchmark=_benchmark,
    )
)
