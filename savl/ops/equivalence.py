"""The rule that decides whether a fused kernel computes what the reference computes, and cases to try it on.

A kernel is judged against the reference in float64, and allowed twice the error that the eager path makes in the
kernel's own dtype (the rule of flash-attention's tests):

    max|fused − ref64| ≤ 2 · max|eager − ref64| + tiny

``tiny`` is what no result can do without: half a unit in the last place of the largest value, to be a number of its
dtype, and the rounding of the judge itself, which adds up ``terms`` numbers in float64. Nothing in it is tuned.

In float64 eager is the judge, and its own error does not show. It is taken to be that of float32, smaller by the ratio
of their units; and the judge may be off by as much.

The maxima are taken over several draws of the same shapes together: of a handful of numbers the eager path may by luck
hit one nearly exactly, which says nothing about what rounding allows. Many draws do not help where the largest error is
that of one number, far worse conditioned than all others: both paths then round it once, and which comes closer is
luck. So before a kernel is said to break the rule, the same draws are rounded `ROUNDINGS` times more, each time after a
nudge of a few units in the last place, and the maxima go over all of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from savl.ops.channel_modulation import channel_modulation
from savl.ops.gaussian_posterior import SEVERITY_EPS, gaussian_posterior
from savl.ops.layer_norm import layer_norm
from savl.ops.overlapping_window_attention import overlapping_window_attention
from savl.ops.switch import EAGER, FUSED, TRITON, KernelSettings
from savl.ops.triton_kernels import INTERPRETED
from savl.ops.window_attention import window_attention

ROUNDINGS = 12
"""How often more the draws are rounded that seem to break the rule."""
DRAWS = 8
"""Draws of a case that are judged together."""
QUICK_DRAWS = 3
"""The same, of a quick verification."""

Outputs = dict[str, Tensor]
Compute = Callable[..., Any]


@dataclass(frozen=True)
class Budget:
    """How far a result is off, and how far it may be."""

    name: str
    """Of the output, or ``d`` and the argument that a gradient belongs to."""
    error: float
    """max|fused − ref64|."""
    eager_error: float
    """max|eager − ref64|."""
    tiny: float
    """What no result can do without."""

    @property
    def allowed(self) -> float:
        """2 · eager_error + tiny."""
        return 2 * self.eager_error + self.tiny

    @property
    def kept(self) -> bool:
        """Whether the error is within what is allowed; NaN is not."""
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """Which share of what is allowed the error takes; NaN, and an error where none is allowed, are infinite."""
        share = self.error / self.allowed if self.allowed else math.inf if self.error else 0.0
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        return f"{self.name} is off by {self.error:.3g}, allowed are {self.allowed:.3g}"

    @classmethod
    def pooled(cls, budgets: Sequence[Budget]) -> Budget:
        """The budget of one result over several draws, each maximum over all of them."""
        errors = [budget.error for budget in budgets]
        error = math.nan if any(map(math.isnan, errors)) else max(errors)
        eager_error = max(budget.eager_error for budget in budgets)
        return cls(budgets[0].name, error, eager_error, max(budget.tiny for budget in budgets))


def measure(name: str, fused: Tensor, eager: Tensor, reference: Tensor, terms: int) -> Budget:
    """Hold one result against the rule.

    Args:
        name: What to call it.
        fused: Result of the kernel.
        eager: Result of the reference in the kernel's dtype; same shape and dtype as ``fused``.
        reference: Result of the reference in float64.
        terms: Most numbers that are added up for one element.

    Raises:
        ValueError: Shapes or dtypes differ: such results cannot be compared.
    """
    if fused.shape != reference.shape or fused.shape != eager.shape or fused.dtype != eager.dtype:
        raise ValueError(
            f"{name}: fused must be like eager, got {fused.dtype} {tuple(fused.shape)} and {eager.dtype} "
            f"{tuple(eager.shape)}; the reference is {tuple(reference.shape)}"
        )
    if fused.numel() == 0:
        return Budget(name, 0.0, 0.0, 0.0)  # nothing to be wrong about
    exact = reference.detach().double()
    largest = float(exact.abs().max())
    eager_error = float((eager.detach().double() - exact).abs().max())
    tiny = (torch.finfo(fused.dtype).eps / 2 + terms * torch.finfo(torch.float64).eps / 2) * largest
    error = float((fused.detach().double() - exact).abs().max())
    return Budget(name, error, eager_error, tiny)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Args:
        op: Its name.
        arguments: Tensors and None by the name of the parameter.
        options: The keyword arguments that are not tensors.
        terms: Most numbers that are added up for one element of an output or gradient.
        label: What is special about it.
        outputs: Names of what the op returns, in its order.
    """

    op: str
    arguments: dict[str, Tensor | None]
    options: dict[str, Any]
    terms: int
    label: str = ""
    outputs: tuple[str, ...] = ("out",)

    def run(self, backend: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Outputs:
        """Outputs and all gradients, under random gradients of the outputs that depend on nothing but shapes.

        Args:
            backend: Name of the backend that must serve this op.
            dtype: Convert the arguments first; None leaves them.
            device: Move the arguments there first; None leaves them where they are.

        Returns:
            What came out, moved to the CPU.
        """
        arguments = {
            name: None if value is None else value.detach().to(device, dtype or value.dtype).requires_grad_()
            for name, value in self.arguments.items()
        }
        choice: dict[str, Any] = {self.op: backend}  # the other ops may have no such backend
        kernels = replace(KernelSettings.of(EAGER), **choice)
        results = _OPS[self.op](**arguments, **self.options, kernels=kernels)
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

    def nudged(self, seed: int) -> Case:
        """The case with every number off by up to four units in the last place: as good a problem, other roundings.

        Args:
            seed: Of the nudges.
        """
        generator = torch.Generator().manual_seed(seed)

        def nudge(value: Tensor) -> Tensor:
            by = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (value.double() * (1 + 4 * torch.finfo(value.dtype).eps * by)).to(value.dtype)

        arguments = {name: None if value is None else nudge(value) for name, value in self.arguments.items()}
        return replace(self, arguments=arguments)

    def judge(self, backend: str, device: str | torch.device | None = None) -> list[Budget]:
        """Hold outputs and gradients of a backend against the rule.

        Args:
            backend: Name of a fused backend.
            device: Where it and the eager path run; None for where the arguments are. The float64 reference runs on
                the CPU.
        """
        fused, eager = self.run(backend, device=device), self.run(EAGER, device=device)
        reference = self.run(EAGER, torch.float64, "cpu")
        budgets = [measure(name, fused[name], eager[name], reference[name], self.terms) for name in reference]
        if {value.dtype for value in fused.values()} != {torch.float64}:
            return budgets
        single = self.run(EAGER, torch.float32, device)
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        errors = [ratio * measure(b.name, single[b.name], single[b.name], reference[b.name], 0).error for b in budgets]
        return [
            replace(budget, eager_error=budget.eager_error + error, tiny=budget.tiny + error)
            for budget, error in zip(budgets, errors, strict=True)
        ]


def judge(
    make: Callable[[int], Case], backend: str, draws: int = DRAWS, device: str | torch.device | None = None
) -> list[Budget]:
    """Hold a backend against the rule, outputs and gradients.

    Args:
        make: Gives the case of a seed: other numbers, the same shapes.
        backend: Name of a fused backend.
        draws: Seeds to pool; each counts `ROUNDINGS` times more where the rule seems broken without.
        device: Where it and the eager path run; None for where the arguments are.
    """
    found: list[list[Budget]] = []

    def pooled(cases: Iterable[Case]) -> list[Budget]:
        found.extend(case.judge(backend, device) for case in cases)
        return [Budget.pooled(budgets) for budgets in zip(*found, strict=True)]

    cases = [make(seed) for seed in range(draws)]
    budgets = pooled(cases)
    if all(budget.kept for budget in budgets):
        return budgets
    return pooled(case.nudged(seed) for case in cases for seed in range(ROUNDINGS))


_OPS: dict[str, Compute] = {
    "window_attention": window_attention,
    "overlapping_window_attention": overlapping_window_attention,
    "gaussian_posterior": gaussian_posterior,
    "channel_modulation": channel_modulation,
    "layer_norm": layer_norm,
}


@dataclass
class Draw:
    """Random arguments from one seed: normal, or uniform in [0, 2] for severities."""

    dtype: torch.dtype
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def severity(self, *shape: int) -> Tensor:
        """Uniform in [0, 2]."""
        return (2 * torch.rand(shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)


def window_attention_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    rows: int = 2,
    columns: int = 2,
    window: int = 8,
    shift: int = 0,
    heads: int = 2,
    head_dim: int = 24,
    severity: bool = True,
    seed: int = 0,
) -> Case:
    """Window attention on ``rows`` × ``columns`` windows."""
    draw, height, width = Draw(dtype, seed), rows * window, columns * window
    arguments = {
        "qkv": draw.normal(batch, height, width, 3 * heads * head_dim),
        "bias_table": draw.normal((2 * window - 1) ** 2, heads),
        "severity": draw.severity(batch, height, width) if severity else None,
    }
    terms = batch * rows * columns * window**2 + head_dim  # the bias gradient is the longest sum
    label = f"window {window}, shift {shift}, head dim {head_dim}{', severity' if severity else ''}"
    return Case("window_attention", arguments, {"window": window, "shift": shift}, terms, label)


def overlapping_window_attention_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    rows: int = 2,
    columns: int = 2,
    window: int = 8,
    key_window: int = 12,
    heads: int = 2,
    head_dim: int = 24,
    severity: bool = True,
    seed: int = 0,
) -> Case:
    """Overlapping attention on ``rows`` × ``columns`` windows."""
    draw, height, width = Draw(dtype, seed), rows * window, columns * window
    channels = heads * head_dim
    arguments = {
        "q": draw.normal(batch, height, width, channels),
        "kv": draw.normal(batch, height, width, 2 * channels),
        "bias_table": draw.normal((window + key_window - 1) ** 2, heads),
        "severity": draw.severity(batch, height, width) if severity else None,
    }
    terms = batch * rows * columns * key_window**2 + head_dim
    label = f"windows {window} in {key_window}, head dim {head_dim}{', severity' if severity else ''}"
    options = {"window": window, "key_window": key_window}
    return Case("overlapping_window_attention", arguments, options, terms, label)


def gaussian_posterior_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    channels: int = 64,
    height: int = 24,
    width: int = 20,
    noise: str = "eps",
    seed: int = 0,
) -> Case:
    """The posterior; ``noise`` is ``"eps"``, ``"seed"`` or ``"none"``."""
    draw = Draw(dtype, seed)
    shape = (batch, channels, height, width)
    arguments: dict[str, Tensor | None] = {"mu": draw.normal(*shape), "logvar": 0.2 * draw.normal(*shape)}
    if noise == "eps":
        arguments["eps"] = draw.normal(*shape)
    outputs = ("sample", "kl", "severity", "variance", "variance_mean", "variance_var")
    options = {"seed": 5, "offset": 3} if noise == "seed" else {}
    terms = math.ceil((channels + height * width) / SEVERITY_EPS)  # severity is up to 1 / ε times as steep as variance
    return Case("gaussian_posterior", arguments, options, terms, f"noise: {noise}", outputs)


def channel_modulation_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    height: int = 24,
    width: int = 20,
    channels: int = 144,
    beta: bool = True,
    seed: int = 0,
) -> Case:
    """The modulation, with or without its shift."""
    draw = Draw(dtype, seed)
    shape = (batch, height, width, channels)
    arguments = {
        "attended": draw.normal(*shape),
        "gamma": draw.normal(*shape),
        "beta": draw.normal(*shape) if beta else None,
        "residual": draw.normal(*shape),
    }
    return Case("channel_modulation", arguments, {}, 4, "with beta" if beta else "without beta")


def layer_norm_case(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    height: int = 24,
    width: int = 20,
    channels: int = 144,
    seed: int = 0,
) -> Case:
    """Layer normalisation of numbers whose mean is not zero."""
    draw = Draw(dtype, seed)
    arguments: dict[str, Tensor | None] = {
        "x": draw.normal(batch, height, width, channels) + draw.normal(batch, height, width, 1),
        "weight": draw.normal(channels),
        "bias": draw.normal(channels),
    }
    terms = batch * height * width + channels
    return Case("layer_norm", arguments, {}, terms, f"{channels} channels")


def quick_cases(dtype: torch.dtype) -> Iterator[Callable[[int], Case]]:
    """Yield what `savl kernels verify` tries in one dtype: every trait of an op, on few windows and heads; by seed."""
    window, overlapping = window_attention_case, overlapping_window_attention_case
    posterior = partial(gaussian_posterior_case, dtype, height=12, width=10)
    yield lambda seed: window(dtype, window=16, shift=8, rows=1, columns=2, heads=1, seed=seed)
    yield lambda seed: window(dtype, window=16, rows=1, columns=1, head_dim=30, severity=False, seed=seed)
    yield lambda seed: window(dtype, window=8, shift=4, seed=seed)
    yield lambda seed: window(dtype, window=5, shift=2, rows=1, columns=3, head_dim=7, seed=seed)
    yield lambda seed: overlapping(
        dtype, window=16, key_window=24, rows=1, columns=2, heads=1, severity=False, seed=seed
    )
    yield lambda seed: overlapping(dtype, window=8, key_window=12, rows=1, head_dim=30, seed=seed)
    yield lambda seed: overlapping(dtype, window=5, key_window=9, rows=1, columns=3, head_dim=7, seed=seed)
    yield lambda seed: posterior(noise="eps", seed=seed)
    yield lambda seed: posterior(noise="seed", seed=seed)
    yield lambda seed: posterior(noise="none", channels=5, seed=seed)
    yield lambda seed: channel_modulation_case(dtype, height=12, width=10, seed=seed)
    yield lambda seed: channel_modulation_case(dtype, beta=False, channels=7, seed=seed)
    yield lambda seed: layer_norm_case(dtype, height=12, width=10, seed=seed)
    yield lambda seed: layer_norm_case(dtype, height=5, width=7, channels=19, seed=seed)


def verification_cases(dtype: torch.dtype) -> Iterator[Callable[[int], Case]]:
    """Yield what ``savl kernels verify --all`` tries in one dtype: larger shapes, as networks have them; by seed."""
    window, overlapping = window_attention_case, overlapping_window_attention_case
    yield lambda seed: window(dtype, window=16, shift=8, heads=3, seed=seed)
    yield lambda seed: window(dtype, window=16, heads=3, head_dim=30, severity=False, seed=seed)
    yield lambda seed: window(dtype, window=8, shift=4, seed=seed)
    yield lambda seed: window(dtype, window=5, shift=2, rows=1, columns=3, head_dim=7, seed=seed)
    yield lambda seed: overlapping(dtype, window=16, key_window=24, heads=3, severity=False, seed=seed)
    yield lambda seed: overlapping(dtype, window=8, key_window=12, head_dim=30, seed=seed)
    yield lambda seed: overlapping(dtype, window=5, key_window=9, rows=1, columns=3, head_dim=7, seed=seed)
    yield lambda seed: gaussian_posterior_case(dtype, noise="eps", seed=seed)
    yield lambda seed: gaussian_posterior_case(dtype, noise="seed", seed=seed)
    yield lambda seed: gaussian_posterior_case(dtype, noise="none", channels=5, seed=seed)
    yield lambda seed: channel_modulation_case(dtype, seed=seed)
    yield lambda seed: channel_modulation_case(dtype, beta=False, channels=7, seed=seed)
    yield lambda seed: layer_norm_case(dtype, seed=seed)
    yield lambda seed: layer_norm_case(dtype, channels=48, seed=seed)
    yield lambda seed: layer_norm_case(dtype, height=5, width=7, channels=19, seed=seed)


def interpreter_cases(dtype: torch.dtype) -> Iterator[Callable[[int], Case]]:
    """Yield what is tried under Triton's interpreter, which takes seconds for what a GPU takes no time; by seed."""
    window, overlapping = window_attention_case, overlapping_window_attention_case
    yield lambda seed: window(dtype, window=8, shift=4, heads=1, seed=seed)
    yield lambda seed: window(dtype, window=4, rows=1, columns=1, head_dim=30, severity=False, seed=seed)
    yield lambda seed: overlapping(dtype, window=4, key_window=6, rows=1, head_dim=30, seed=seed)
    yield lambda seed: overlapping(dtype, window=8, key_window=12, rows=1, columns=1, severity=False, seed=seed)
    yield lambda seed: layer_norm_case(dtype, batch=1, height=9, channels=48, seed=seed)
    yield lambda seed: layer_norm_case(dtype, batch=1, height=3, width=5, channels=19, seed=seed)


@dataclass(frozen=True)
class Verdict:
    """One case that `savl kernels verify` tried."""

    case: Case
    dtype: torch.dtype
    worst: Budget
    """The result that uses most of what it is allowed."""


def verify(op: str, backend: str, *, quick: bool = False) -> Iterator[Verdict]:
    """Judge one backend of one op, forward and backward, in all its dtypes and on its own kind of device.

    Args:
        op: Name of the op.
        backend: Name of a fused backend.
        quick: Try fewer and smaller cases, with every trait of the op among them; seconds for all ops.

    Yields:
        A verdict for each case.

    Raises:
        KernelUnavailable: The backend cannot serve here.
    """
    interpreted = INTERPRETED and backend == TRITON
    # Triton's interpreter multiplies matrices of bfloat16 wrongly.
    names = [name for name in FUSED[backend].dtypes if not (interpreted and name == "bfloat16")]
    cases = interpreter_cases if interpreted else quick_cases if quick else verification_cases
    for dtype in (getattr(torch, name) for name in names):
        for make in cases(dtype):
            case = make(0)
            if case.op != op:
                continue
            draws = QUICK_DRAWS if quick else DRAWS
            worst = max(judge(make, backend, draws, FUSED[backend].device), key=lambda budget: budget.used)
            yield Verdict(case, dtype, worst)
