"""Every op on tensors that lie in memory in every way torch knows, forward and backward, against the reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from savl import ops
from savl.ops import KernelSettings
from savl.ops.equivalence import Case

pytestmark = pytest.mark.usefixtures("one_thread")

Layout = Callable[[Tensor], Tensor]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-4, torch.bfloat16: 3e-2}
"""Allowed distance from the reference in float64, relative to the largest value, or to 1 where all values are small. A
wrong number is off by its own size; rounding alone comes near this where all numbers are one and gradients cancel."""
OUTSIDE = float("nan")
"""Content of the memory around a tensor: a kernel that reads it gives NaN."""


def permuted(tensor: Tensor) -> Tensor:
    """The last dimension of memory is the first of the tensor."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def channels_second(tensor: Tensor) -> Tensor:
    """For a (B, R, H, W) tensor channels_last; the same order of memory for others."""
    return tensor if tensor.dim() != 4 else tensor.contiguous(memory_format=torch.channels_last)


def rows_swapped(tensor: Tensor) -> Tensor:
    """The two dimensions before the last have changed places in memory."""
    return tensor if tensor.dim() < 3 else tensor.transpose(-2, -3).contiguous().transpose(-2, -3)


def cut_out(tensor: Tensor) -> Tensor:
    """A part of a larger tensor in every dimension."""
    larger = tensor.new_full([size + 3 for size in tensor.shape], OUTSIDE)
    part = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return part.copy_(tensor)


def part_of_the_channels(tensor: Tensor) -> Tensor:
    """Lay the tensor out as a part of the last dimension of a larger one, as `chunk` and `split` do."""
    larger = tensor.new_full([*tensor.shape[:-1], 2 * tensor.shape[-1] + 1], OUTSIDE)
    return larger[..., tensor.shape[-1] + 1 :].copy_(tensor)


def part_of_dimension_one(tensor: Tensor) -> Tensor:
    """Lay the tensor out as the estimator cuts mu and logvar from its output, in channels_last."""
    if tensor.dim() != 4:
        return tensor
    shape = [tensor.shape[0], 2 * tensor.shape[1], *tensor.shape[2:]]
    larger = torch.full(shape, OUTSIDE, dtype=tensor.dtype).contiguous(memory_format=torch.channels_last)
    return larger.chunk(2, dim=1)[1].copy_(tensor)


def every_other(tensor: Tensor) -> Tensor:
    """With gaps in every dimension."""
    larger = tensor.new_full([2 * size for size in tensor.shape], OUTSIDE)
    return larger[tuple(slice(None, None, 2) for _ in tensor.shape)].copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    """One element behind the start of the memory."""
    memory = tensor.new_full([tensor.numel() + 2], OUTSIDE)
    return memory[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


def negated(tensor: Tensor) -> Tensor:
    """A view whose numbers are the negatives of those in memory, as of the imaginary part of a conjugate."""
    if tensor.dtype == torch.bfloat16:
        return tensor
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


def of_stride_zero(dim: int) -> Layout:
    """The first along a dimension everywhere, without memory of its own for the others."""
    return lambda tensor: tensor.narrow(dim, 0, 1).clone().expand(tensor.shape)


def one_number(tensor: Tensor) -> Tensor:
    """Expand one number to the whole tensor, as the gradient of a sum is."""
    return tensor.flatten()[:1].clone().view([1] * tensor.dim()).expand(tensor.shape)


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda tensor: tensor,
    "permuted": permuted,
    "channels second": channels_second,
    "rows swapped": rows_swapped,
    "cut out": cut_out,
    "part of the channels": part_of_the_channels,
    "part of dimension one": part_of_dimension_one,
    "every other": every_other,
    "unaligned": unaligned,
    "negated": negated,
    "batch of stride zero": of_stride_zero(0),
    "last dimension of stride zero": of_stride_zero(-1),
    "one number": one_number,
}
NAMES = tuple(LAYOUTS)


def results(
    case: Case, kernels: str, arguments: dict[str, Tensor | None], gradients: list[Tensor]
) -> list[tuple[str, Tensor]]:
    """Outputs of a call and the gradients of its arguments, by name."""
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in arguments.items()}
    out = getattr(ops, case.op)(**leaves, **case.options, kernels=KernelSettings.of(kernels))
    outputs = [out] if isinstance(out, Tensor) else list(out)
    given = [leaf for leaf in leaves.values() if leaf is not None]
    found = torch.autograd.grad(outputs, given, gradients, allow_unused=True)
    names = [f"d {name}" for name, leaf in leaves.items() if leaf is not None]
    return [*zip(case.outputs, (value.detach() for value in outputs), strict=True)] + [
        (name, value) for name, value in zip(names, found, strict=True) if value is not None
    ]


def compare(case: Case, dtype: torch.dtype, layouts: list[Layout], of_gradients: Layout, what: str) -> None:
    """Hold a call against the reference in float64 on the same numbers."""
    places = iter(layouts)
    arguments = {
        name: None if value is None else next(places)(value.detach()) for name, value in case.arguments.items()
    }
    out = getattr(ops, case.op)(**arguments, **case.options, kernels=KernelSettings.of("cpp"))
    generator = torch.Generator().manual_seed(5)
    gradients = [
        of_gradients(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype))
        for value in ([out] if isinstance(out, Tensor) else out)
    ]
    found = results(case, "cpp", arguments, gradients)
    exact = {name: None if value is None else value.double().contiguous() for name, value in arguments.items()}
    wanted = results(case, "eager", exact, [gradient.double().contiguous() for gradient in gradients])
    assert [name for name, _ in found] == [name for name, _ in wanted], what
    for (name, value), (_, reference) in zip(found, wanted, strict=True):
        error = float((value.double() - reference).abs().max())
        largest = max(float(reference.abs().max()), 1.0)
        assert error <= TOLERANCES[dtype] * largest, f"{what}: {name} is off by {error:.3g} of {largest:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_an_op_takes_its_arguments_and_gradients_in_every_layout(
    dtype: torch.dtype, instruction_set: str, extension: Any, small_case: Callable[..., Case]
) -> None:
    case = small_case(dtype)
    if case.op in (
        "layer_norm",
        "convolution",
        "projection_mlp",
    ):  # a small eps magnifies the rounding of pixels with one number
        case = replace(case, options={**case.options, "eps": 0.1})
    tensors = sum(value is not None for value in case.arguments.values())
    combination = list(TOLERANCES).index(dtype) + extension.kernel_instruction_sets().index(instruction_set)
    for index, name in enumerate(NAMES):
        # A sanitizer makes everything slow. Each layout then meets each dtype and each instruction set once.
        if os.environ.get("SAVL_SANITIZE") and (index + combination) % 3:
            continue
        compare(case, dtype, [LAYOUTS[name]] * tensors, LAYOUTS[name], f"all {name}")
        compare(case, dtype, [LAYOUTS["contiguous"]] * tensors, LAYOUTS[name], f"gradients {name}")
        mixed = [NAMES[(index + 5 * place) % len(NAMES)] for place in range(tensors + 1)]
        layouts: list[Any] = [LAYOUTS[each] for each in mixed]
        compare(case, dtype, layouts[:-1], layouts[-1], ", ".join(mixed))
