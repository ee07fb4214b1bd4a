"""Verification that an accelerated block computes what the original one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from savl.accelerate.adapter import FUSED, Adapter, Arguments
from savl.ops.equivalence import Budget, measure

SIZES = ((1, 2, 2), (2, 1, 3))
"""Batch, and rows and columns of windows, of the images that a block is tried on."""
DRAWS = (1, 4, 13)
"""Draws of the numbers for each size. Where the rule seems broken, the next number of draws is pooled, because the
largest errors of few numbers vary by chance."""
GRADIENT = "gradient of "


def verify_block(
    block: nn.Module, adapter: Adapter, network: nn.Module, convert: Callable[[nn.Module], None]
) -> tuple[float, str | None]:
    """Compare a block computed by savl's ops with the original one, by the rule of `savl.ops.equivalence`.

    The rule is applied to the output, and, for a block in training mode, to the gradients of inputs and parameters. The
    block itself is not changed: copies of it run.

    Args:
        block: The original block.
        adapter: Its adapter.
        network: The network that contains it.
        convert: Turns a block into an accelerated one, in place.

    Returns:
        The largest ratio of error to allowed error, and None if the block passed, or why it failed. The ratio is
        infinite if the results could not be compared.
    """
    parameter = next(block.parameters())
    dtype, device = parameter.dtype, parameter.device
    fused: Any
    eager, exact, single, fused = (_deterministic(copy.deepcopy(block)) for _ in range(4))
    convert(fused)
    fused.kernels = FUSED
    exact, single = exact.double().cpu(), single.float().cpu()
    found: list[list[Budget]] = []

    def pool(seeds: range) -> list[Budget]:
        for size in SIZES:
            for seed in seeds:
                arguments = adapter.example(block, network, torch.Generator().manual_seed(seed), *size)
                rounded = _converted(arguments, dtype, torch.device("cpu"))  # all see the same numbers
                reference = _run(exact, _converted(rounded, torch.float64, torch.device("cpu")))
                ours = _run(fused, _converted(rounded, dtype, device))
                if set(ours) != set(reference):
                    raise ValueError("it returns a different set of results")
                found.append(_budgets(ours, reference, eager, single, rounded, dtype, device))
        return [Budget.pooled(budgets) for budgets in zip(*found, strict=True)]

    budgets: list[Budget] = []
    try:
        for first, last in pairwise((0, *DRAWS)):
            if not budgets or not all(budget.kept for budget in budgets):
                budgets = pool(range(first, last))
    except Exception as error:
        return float("inf"), f"the verification raised {type(error).__name__}: {error}"
    fallen_back = fused._savl_calls.fallen_back
    if fallen_back:
        return float("inf"), next(iter(fallen_back))
    worst = max(budgets, key=lambda budget: budget.used)
    return worst.used, None if worst.kept else f"it does not compute the same: {worst}"


def _deterministic(block: nn.Module) -> nn.Module:
    """Return a block whose dropout and stochastic depth do nothing."""
    for module in block.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    return block


def _budgets(
    ours: dict[str, Tensor],
    reference: dict[str, Tensor],
    eager: nn.Module,
    single: nn.Module,
    arguments: Arguments,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Budget]:
    terms = max(tensor.numel() for tensor in reference.values())
    eps = torch.finfo(dtype).eps
    theirs = None
    if dtype != torch.float64:
        with suppress(RuntimeError):  # some blocks do not run in bfloat16 at all sizes
            theirs = _run(eager, _converted(arguments, dtype, device))
    if theirs is None:  # the error of eager is that in float32, scaled to the dtype
        in_float32 = _run(single, _converted(arguments, torch.float32, torch.device("cpu")))
        ratio = eps / torch.finfo(torch.float32).eps
        theirs = {
            name: (value + ratio * (in_float32[name].double() - value)).to(dtype) for name, value in reference.items()
        }
    budgets = [
        measure(name, ours[name], theirs[name].to(ours[name].dtype), reference[name], terms) for name in reference
    ]
    # The gradient of a parameter that has no influence, such as a bias before a normalisation, is 0 except for the
    # rounding of gradients that cancel.
    largest = max(
        (float(each.abs().max()) for name, each in reference.items() if name.startswith(GRADIENT)), default=0.0
    )
    return [
        replace(budget, tiny=budget.tiny + eps * largest) if budget.name.startswith(GRADIENT) else budget
        for budget in budgets
    ]


def _run(block: nn.Module, arguments: Arguments) -> dict[str, Tensor]:
    """Return outputs and, for a block in training mode, gradients, on the CPU."""
    trained = block.training
    with torch.set_grad_enabled(trained):
        if trained:
            arguments = tuple(
                each.requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each
                for each in arguments
            )
        out = block(*arguments)
        outputs = out if isinstance(out, tuple | list) else (out,)
        results = {f"output {i}": each for i, each in enumerate(outputs) if isinstance(each, Tensor)}
        if trained:
            wanted = {f"argument {i}": each for i, each in enumerate(arguments) if isinstance(each, Tensor)}
            wanted |= dict(block.named_parameters())
            wanted = {name: each for name, each in wanted.items() if each.requires_grad}
            differentiable = [each for each in results.values() if each.requires_grad]
            generator = torch.Generator().manual_seed(7)
            seeds = [
                torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.device, each.dtype)
                for each in differentiable
            ]
            gradients = torch.autograd.grad(differentiable, list(wanted.values()), seeds, allow_unused=True)
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    results[f"{GRADIENT}{name}"] = gradient
    return {name: each.detach().cpu() for name, each in results.items()}


def _converted(arguments: Arguments, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Move tensors to a device, floating-point ones also to a dtype; tensors in tuples and dicts too."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        if isinstance(value, tuple | list):
            return type(value)(convert(each) for each in value)
        return {key: convert(each) for key, each in value.items()} if isinstance(value, dict) else value

    return tuple(convert(each) for each in arguments)
