"""Verification that an accelerated block computes what the original one does."""

from __future__ import annotations

import copy
import math
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
    copies = _Copies(block, adapter, convert)
    found: list[list[Budget]] = []
    budgets: list[Budget] = []
    try:
        for first, last in pairwise((0, *DRAWS)):
            if budgets and all(budget.kept for budget in budgets):
                break
            for seed in range(first, last):
                for size in SIZES:
                    generator = torch.Generator().manual_seed(seed)
                    found.append(copies.compare(adapter.example(block, network, generator, *size)))
            budgets = [Budget.pooled(each) for each in zip(*found, strict=True)]
    except Exception as error:
        return math.inf, copies.why_fallen_back() or f"the verification raised {type(error).__name__}: {error}"
    if (reason := copies.why_fallen_back()) is not None:
        return math.inf, reason
    worst = max(budgets, key=lambda budget: budget.used)
    return worst.used, None if worst.kept else f"it does not compute the same: {worst}"


class _Copies:
    """Copies of a block: accelerated, as it is, and as it is in float64 and float32 on the CPU."""

    def __init__(self, block: nn.Module, adapter: Adapter, convert: Callable[[nn.Module], None]) -> None:
        parameter = next(block.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.features = adapter.features
        self.fused: Any
        self.eager, self.exact, self.single, self.fused = (_deterministic(copy.deepcopy(block)) for _ in range(4))
        convert(self.fused)
        self.fused.kernels = FUSED
        self.exact.double().cpu()
        self.single.float().cpu()

    def why_fallen_back(self) -> str | None:
        """Return why the accelerated block called the original code; None if it did not."""
        return next(iter(self.fused._savl_calls.fallen_back), None)

    def compare(self, arguments: Arguments) -> list[Budget]:
        """Apply the rule to the outputs and gradients for some arguments."""
        cpu = torch.device("cpu")
        arguments = _converted(arguments, self.dtype, cpu)  # all see the same numbers
        ours = self._run(self.fused, _converted(arguments, self.dtype, self.device))
        reference = self._run(self.exact, _converted(arguments, torch.float64, cpu))
        if set(ours) != set(reference):
            raise ValueError("it returns a different set of results")
        eps = torch.finfo(self.dtype).eps
        theirs = None
        if self.dtype != torch.float64:
            with suppress(RuntimeError):  # some blocks do not run in bfloat16 at all sizes
                theirs = self._run(self.eager, _converted(arguments, self.dtype, self.device))
        if theirs is None:  # the error of eager is that in float32, scaled to the dtype
            single = self._run(self.single, _converted(arguments, torch.float32, cpu))
            ratio = eps / torch.finfo(torch.float32).eps
            theirs = {name: value + ratio * (single[name].double() - value) for name, value in reference.items()}
        terms = max(tensor.numel() for tensor in reference.values())
        budgets = [
            measure(name, ours[name], theirs[name].to(ours[name].dtype), value, terms)
            for name, value in reference.items()
        ]
        # The gradient of a parameter that has no influence, such as a bias before a normalisation, is 0 except for the
        # rounding of gradients that cancel.
        gradients = [each for name, each in reference.items() if name.startswith(GRADIENT)]
        largest = max((float(each.abs().max()) for each in gradients), default=0.0)
        return [
            replace(budget, tiny=budget.tiny + eps * largest) if budget.name.startswith(GRADIENT) else budget
            for budget in budgets
        ]

    def _run(self, block: nn.Module, arguments: Arguments) -> dict[str, Tensor]:
        """Return outputs and, for a block in training mode, gradients, on the CPU."""
        trained = block.training
        if trained:
            arguments = tuple(
                each.requires_grad_() if place < self.features and _is_floating(each) else each
                for place, each in enumerate(arguments)
            )
        with torch.set_grad_enabled(trained):
            out = block(*arguments)
            outputs = out if isinstance(out, tuple | list) else (out,)
            results = {f"output {i}": each for i, each in enumerate(outputs) if isinstance(each, Tensor)}
            if trained:
                results |= _gradients(block, arguments, list(results.values()))
        return {name: each.detach().cpu() for name, each in results.items()}


def _gradients(block: nn.Module, arguments: Arguments, outputs: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of arguments and parameters, given random gradients of the outputs."""
    wanted = {f"argument {i}": each for i, each in enumerate(arguments) if isinstance(each, Tensor)}
    wanted |= dict(block.named_parameters())
    wanted = {name: each for name, each in wanted.items() if each.requires_grad}
    outputs = [each for each in outputs if each.requires_grad]
    if not wanted or not outputs:
        return {}
    generator = torch.Generator().manual_seed(7)
    seeds = [
        torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.device, each.dtype)
        for each in outputs
    ]
    found = torch.autograd.grad(outputs, list(wanted.values()), seeds, allow_unused=True)
    return {f"{GRADIENT}{name}": each for name, each in zip(wanted, found, strict=True) if each is not None}


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _deterministic(block: nn.Module) -> nn.Module:
    """Return a block whose dropout and stochastic depth do nothing."""
    for module in block.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    return block


def _converted(arguments: Arguments, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Move tensors to a device, floating-point ones also to a dtype; tensors in tuples and dicts too."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        if isinstance(value, tuple | list):
            return type(value)(convert(each) for each in value)
        return {key: convert(each) for key, each in value.items()} if isinstance(value, dict) else value

    return tuple(convert(each) for each in arguments)
