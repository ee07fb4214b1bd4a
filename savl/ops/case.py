"""Calls of ops with their arguments: the cases of the equivalence tests, and the problems of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from savl.ops.library import EAGER
from savl.ops.op import OPS
from savl.ops.settings import KernelSettings

Outputs = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """One call of one op.

    Attributes:
        op: Name of the op.
        arguments: Tensors and None by the name of the parameter.
        options: The keyword arguments that are not tensors.
        terms: Largest number of terms in the sum behind one element of an output or gradient.
        label: Text that distinguishes the case from other cases of the op.
        outputs: Names of the op's results, in their order.
    """

    op: str
    arguments: dict[str, Tensor | None]
    options: dict[str, Any]
    terms: int
    label: str = ""
    outputs: tuple[str, ...] = ("out",)

    def run(self, backend: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Outputs:
        """Compute outputs and all gradients, given random gradients of the outputs that depend on shapes alone.

        Args:
            backend: Name of the backend that must serve this op.
            dtype: Convert the arguments first; None leaves them.
            device: Move the arguments there first; None leaves them where they are.

        Returns:
            The results by name, on the CPU; the gradient of an argument is named ``d`` and the argument.
        """
        arguments = {
            name: None if value is None else value.detach().to(device, dtype or value.dtype).requires_grad_()
            for name, value in self.arguments.items()
        }
        kernels = KernelSettings.of(EAGER, **{self.op: backend})  # the other ops may have no such backend
        results = OPS[self.op].function(**arguments, **self.options, kernels=kernels)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        outputs = dict(zip(self.outputs, results, strict=True))
        generator = torch.Generator().manual_seed(7)
        seeds = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
            for out in results
        ]
        wanted = {name: value for name, value in arguments.items() if value is not None}
        gradients = torch.autograd.grad(results, list(wanted.values()), seeds, allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                outputs[f"d {name}"] = gradient
        return {name: value.detach().cpu() for name, value in outputs.items()}

    def function(self) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
        """Return the op as a function of its tensors alone, which returns a tuple, and the tensors.

        The switch decides which kernel serves, as for a call in a network.
        """
        names = [name for name, value in self.arguments.items() if value is not None]
        absent = {name: None for name, value in self.arguments.items() if value is None}
        op, options = OPS[self.op].function, self.options

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = op(**dict(zip(names, tensors, strict=True)), **absent, **options)
            return (out,) if isinstance(out, Tensor) else tuple(out)

        return call, [value.detach() for value in self.arguments.values() if value is not None]

    def nudged(self, seed: int) -> Case:
        """Return the case with every number changed by up to four units in the last place.

        It is as good a problem as the case, with other roundings.

        Args:
            seed: Seed of the changes.
        """
        generator = torch.Generator().manual_seed(seed)

        def nudge(value: Tensor) -> Tensor:
            by = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (value.double() * (1 + 4 * torch.finfo(value.dtype).eps * by)).to(value.dtype)

        return replace(
            self, arguments={name: None if value is None else nudge(value) for name, value in self.arguments.items()}
        )


@dataclass(eq=False)
class Draw:
    """Random arguments from one seed: standard normal, or uniform in [0, 2] for severities."""

    dtype: torch.dtype
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def severity(self, *shape: int) -> Tensor:
        """Return numbers that are uniform in [0, 2]."""
        return (2 * torch.rand(shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)


@dataclass(frozen=True, eq=False)
class BenchmarkProblem:
    """One problem of an op, as savl-base poses it, and the least work that its definition needs.

    `savl.ops.op.Op.benchmark` makes it from a `Draw`, the ``side`` of a square image in pixels, and options.

    Attributes:
        arguments: Tensors and None by the name of the parameter.
        options: The keyword arguments that are not tensors.
        moved: Bytes that the forward pass must read and write.
        moved_backward: Bytes that the backward pass must read and write.
        flops: Multiplications and additions of the forward pass.
        flops_backward: Multiplications and additions of the backward pass.
        bandwidth_bound: Whether moving the bytes bounds the time, so that a copy of as many bytes is a baseline.
        outputs: Number of results that are compared, from the first on; None for all.
    """

    arguments: dict[str, Tensor | None]
    options: dict[str, Any]
    moved: float
    moved_backward: float
    flops: float
    flops_backward: float
    bandwidth_bound: bool = True
    outputs: int | None = None
