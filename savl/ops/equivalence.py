"""The rule that decides whether the results of a fused kernel agree with the reference, and its application.

A kernel is compared with the reference in float64, and allowed twice the error that the eager path makes in the
kernel's own dtype (the rule of flash-attention's tests):

    max|fused − ref64| ≤ 2 · max|eager − ref64| + tiny

``tiny`` is an error that no implementation can avoid. It is the sum of half a unit in the last place of the largest
value, for the rounding to its dtype, and the rounding error of the float64 reference, which adds ``terms`` numbers. It
contains no tuned constants.

For float64 kernels the eager path is the reference, so its error cannot be measured. It is estimated as the error of
the float32 path, scaled by the ratio of the units in the last place. The reference may have the same error.

The maxima are taken over several draws of the same shapes. In a single draw of a few numbers, the eager path may be
nearly exact by chance, and its error would then underestimate the usual rounding error. More draws do not help if the
largest error is that of one number that is far worse conditioned than all others: both paths then round it once, and
chance decides which of them is closer. Therefore, before a kernel is reported to break the rule, the same draws are
rounded `ROUNDINGS` more times, each after a change of a few units in the last place, and the maxima are taken over all
of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from savl.ops.case import Case, Draw, Outputs
from savl.ops.library import EAGER, FUSED, INTERPRETED, TRITON
from savl.ops.op import OPS

__all__ = ["Budget", "Case", "Draw", "Outputs", "Verdict", "judge", "judge_case", "measure", "verify"]

ROUNDINGS = 12
"""Additional roundings of each draw that seems to break the rule."""
DRAWS = 8
"""Draws of a case that are judged together."""
QUICK_DRAWS = 3
"""Draws of a case in a quick verification."""


@dataclass(frozen=True)
class Budget:
    """The error of one result, and the error that is allowed."""

    name: str
    """Name of the output, or ``d`` and the argument that a gradient belongs to."""
    error: float
    """max|fused − ref64|."""
    eager_error: float
    """max|eager − ref64|."""
    tiny: float
    """Error that no implementation can avoid."""

    @property
    def allowed(self) -> float:
        """2 · eager_error + tiny."""
        return 2 * self.eager_error + self.tiny

    @property
    def kept(self) -> bool:
        """Whether the error is at most the allowed error. False for NaN."""
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """Error divided by the allowed error. Infinite for NaN, and for an error above 0 if the allowed error is 0."""
        share = self.error / self.allowed if self.allowed else math.inf if self.error else 0.0
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        return f"the error of {self.name} is {self.error:.3g}, but at most {self.allowed:.3g} is allowed"

    @classmethod
    def pooled(cls, budgets: Sequence[Budget]) -> Budget:
        """Return the budget of one result over several draws, with the maximum of each error over all draws."""
        errors = [budget.error for budget in budgets]
        error = math.nan if any(map(math.isnan, errors)) else max(errors)
        eager_error = max(budget.eager_error for budget in budgets)
        return cls(budgets[0].name, error, eager_error, max(budget.tiny for budget in budgets))


def measure(name: str, fused: Tensor, eager: Tensor, reference: Tensor, terms: int) -> Budget:
    """Apply the rule to one result.

    Args:
        name: Name of the result.
        fused: Result of the kernel.
        eager: Result of the reference in the kernel's dtype; same shape and dtype as ``fused``.
        reference: Result of the reference in float64.
        terms: Largest number of terms in the sum that one element is computed from.

    Raises:
        ValueError: Shapes or dtypes differ, so that the results cannot be compared.
    """
    if fused.shape != reference.shape or fused.shape != eager.shape or fused.dtype != eager.dtype:
        raise ValueError(
            f"{name}: fused must be like eager, got {fused.dtype} {tuple(fused.shape)} and {eager.dtype} "
            f"{tuple(eager.shape)}; the reference is {tuple(reference.shape)}"
        )
    if fused.numel() == 0:
        return Budget(name, 0.0, 0.0, 0.0)  # there is nothing to compare
    exact = reference.detach().double()
    largest = float(exact.abs().max())
    eager_error = float((eager.detach().double() - exact).abs().max())
    tiny = (torch.finfo(fused.dtype).eps / 2 + terms * torch.finfo(torch.float64).eps / 2) * largest
    error = float((fused.detach().double() - exact).abs().max())
    return Budget(name, error, eager_error, tiny)


def judge_case(case: Case, backend: str, device: str | torch.device | None = None) -> list[Budget]:
    """Apply the rule to outputs and gradients of one case.

    Args:
        case: The call.
        backend: Name of a fused backend.
        device: Device of the kernel and of the eager path; None for that of the arguments. The float64 reference runs
            on the CPU.
    """
    fused, eager = case.run(backend, device=device), case.run(EAGER, device=device)
    reference = case.run(EAGER, torch.float64, "cpu")
    budgets = [measure(name, fused[name], eager[name], reference[name], case.terms) for name in reference]
    if {value.dtype for value in fused.values()} != {torch.float64}:
        return budgets
    single = case.run(EAGER, torch.float32, device)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = [ratio * measure(b.name, single[b.name], single[b.name], reference[b.name], 0).error for b in budgets]
    return [
        replace(budget, eager_error=budget.eager_error + error, tiny=budget.tiny + error)
        for budget, error in zip(budgets, errors, strict=True)
    ]


def judge(
    make: Callable[[int], Case], backend: str, draws: int = DRAWS, device: str | torch.device | None = None
) -> list[Budget]:
    """Apply the rule to outputs and gradients of a backend, over several draws.

    Args:
        make: Function that returns the case for a seed. The numbers depend on the seed, the shapes do not.
        backend: Name of a fused backend.
        draws: Number of seeds to pool. If the rule seems broken, each is rounded `ROUNDINGS` more times.
        device: Device of the kernel and of the eager path; None for that of the arguments.
    """
    found: list[list[Budget]] = []

    def pooled(cases: Iterable[Case]) -> list[Budget]:
        found.extend(judge_case(case, backend, device) for case in cases)
        return [Budget.pooled(budgets) for budgets in zip(*found, strict=True)]

    cases = [make(seed) for seed in range(draws)]
    budgets = pooled(cases)
    if all(budget.kept for budget in budgets):
        return budgets
    return pooled(case.nudged(seed) for case in cases for seed in range(ROUNDINGS))


@dataclass(frozen=True)
class Verdict:
    """The result of one case that `verify` judged."""

    case: Case
    dtype: torch.dtype
    worst: Budget
    """The result that uses the largest share of its allowed error."""


def verify(op: str, backend: str, *, quick: bool = False) -> Iterator[Verdict]:
    """Judge one backend of one op, forward and backward, in all its dtypes and on its own type of device.

    Args:
        op: Name of the op.
        backend: Name of a fused backend.
        quick: Use fewer and smaller cases, which still cover every option of the op. All ops together take seconds.

    Yields:
        A verdict for each case.

    Raises:
        KernelUnavailable: The backend cannot serve here.
    """
    record, kernels = OPS[op], FUSED[backend]
    interpreted = INTERPRETED and backend == TRITON
    cases = record.interpreter_cases if interpreted else record.quick_cases if quick else record.full_cases
    for name in kernels.dtypes:
        if interpreted and name == "bfloat16":
            continue  # Triton's interpreter computes wrong products of bfloat16 matrices
        dtype = getattr(torch, name)
        for settings in cases:
            make = _by_seed(partial(record.case, dtype, **settings))
            worst = max(
                judge(make, backend, QUICK_DRAWS if quick else DRAWS, kernels.device), key=lambda budget: budget.used
            )
            yield Verdict(make(0), dtype, worst)


def _by_seed(case: Callable[..., Case]) -> Callable[[int], Case]:
    return lambda seed: case(seed=seed)
