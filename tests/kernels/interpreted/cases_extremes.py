"""NaN, infinity and the largest float16: what they spoil, and what they must not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from case_tools import FLOAT16, FLOAT32, OVERLAPPING, TRITON, WINDOW, argument, case, case_for, changed, hold
from torch import Tensor

from savl.ops import KernelSettings, overlapping_window_attention, window_attention
from savl.ops.equivalence import Case, Outputs

SPOILABLE: dict[str, Case] = {
    "window": WINDOW(FLOAT32, window=4, rows=1, columns=2, heads=1, head_dim=5),
    "window, shifted": WINDOW(FLOAT32, window=4, shift=1, rows=1, columns=2, heads=1, head_dim=5),
    "overlapping": OVERLAPPING(FLOAT32, window=4, key_window=6, rows=1, columns=3, heads=1, head_dim=5),
}


def spots(spec: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A query, a key and a value, inside and at a corner, a severity, and an entry of the table."""
    for name, value in spec.arguments.items():
        assert value is not None
        parts = {"qkv": 3, "kv": 2}.get(name, 1)
        if name == "bias_table":
            yield name, (value.shape[0] // 3, value.shape[1] - 1)
        elif name == "severity":
            yield name, (0, 2, 5)
        else:
            width = value.shape[-1] // parts
            for part in range(parts):
                yield name, (0, 2, 5, part * width + 1)
            yield name, (0, 3, value.shape[2] - 1, 0)


def windows_with(mask: Tensor, window: int, margin: int) -> Tensor:
    """Pixels (B, H, W) that share a window with one of ``mask``, or lie no more than ``margin`` beside it."""
    blocks = mask.float()[:, None]
    blocks = torch.nn.functional.max_pool2d(blocks, window).repeat_interleave(window, 2).repeat_interleave(window, 3)
    return torch.nn.functional.max_pool2d(blocks, 2 * margin + 1, stride=1, padding=margin)[:, 0] > 0


def what_is_wrong(spec: Case, given: str, value: float, fused: Outputs, eager: Outputs) -> Iterator[str]:
    """How the spoilt results of the kernels differ from those of eager where they must not."""
    shift = spec.options.get("shift", 0)
    margin = (spec.options.get("key_window", spec.options["window"]) - spec.options["window"]) // 2
    windows = windows_with(eager["out"].isnan().any(-1).roll((-shift, -shift), (1, 2)), spec.options["window"], margin)
    windows = windows.roll((shift, shift), (1, 2))
    for result, expected in eager.items():
        found = fused[result].isnan()
        leaked, hidden = found & ~expected.isnan(), ~found & expected.isnan()
        if given == "severity" and math.isinf(value):
            # Of 0 · ∞ past the head dimension comes NaN where eager may have logits of −∞: in the same windows.
            if result == "d bias_table":
                leaked = leaked & False
            elif leaked.dim() > 2:
                leaked = leaked & ~windows.view(*windows.shape, *(1,) * (leaked.dim() - 3))
        elif given == "bias_table" and shift and found.any():
            hidden = hidden & False  # pairs that are masked from each other do not look at their bias
        for what, where in (("leaked", leaked), ("hidden", hidden)):
            if where.any():
                yield f"{result}: {int(where.sum())} NaN are {what}, the first at {where.nonzero()[0].tolist()}"


@case_for(*(f"{name}, {value}" for name in SPOILABLE for value in ("nan", "inf")))
def one_spoilt_number_spoils_what_it_spoils_in_eager(choice: str) -> None:
    name, _, word = choice.rpartition(", ")
    spec, value = SPOILABLE[name], float(word)
    problems = []
    for given, spot in spots(spec):
        spoilt = argument(spec, given).clone()
        spoilt[spot] = value
        one = changed(spec, **{given: spoilt})
        fused, eager = one.run("triton"), one.run("eager")
        assert any(result.isnan().any() for result in eager.values()), f"{given}{list(spot)} spoils nothing in eager"
        problems += [f"{given}{list(spot)}: {wrong}" for wrong in what_is_wrong(spec, given, value, fused, eager)]
    assert not problems, f"with {value} in\n" + "\n".join(problems)


@case_for("window", "overlapping")
def a_spoilt_gradient_of_the_output_spoils_what_it_spoils_in_eager(name: str) -> None:
    spec = SPOILABLE[name]
    given = {key: value for key, value in spec.arguments.items() if value is not None}
    op = window_attention if spec.op == "window_attention" else overlapping_window_attention
    spoilt = []
    for kernels in (TRITON, KernelSettings.of("eager")):
        leaves = {key: value.clone().requires_grad_() for key, value in given.items()}
        out = op(**leaves, **spec.options, kernels=kernels)
        grad_out = torch.ones_like(out)
        grad_out[0, 1, 2, 3] = math.nan
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        spoilt.append({key: gradient.isnan() for key, gradient in zip(leaves, gradients, strict=True)})
    fused, eager = spoilt
    for key, expected in eager.items():
        assert expected.any(), f"d {key} of eager is whole"
        assert fused[key].equal(expected), (
            f"d {key} is NaN in {int(fused[key].sum())} places, eager in {expected.sum()}"
        )


@case
def float16_queries_near_the_largest_float16_do_not_overflow() -> None:
    def make(seed: int) -> Case:
        spec = WINDOW(FLOAT16, window=4, rows=1, columns=1, heads=2, head_dim=1, severity=False, seed=seed)
        qkv = argument(spec, "qkv") * torch.tensor([2e4, 2e4, 1e-4, 1e-4, 1, 1], dtype=FLOAT16)
        return changed(spec, qkv=qkv.clamp(-6e4, 6e4))

    hold(make, draws=3)


@case_for("window", "overlapping")
def biases_of_minus_infinity_give_no_weight_and_no_nan(name: str) -> None:
    def make(seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)
        spec = (
            WINDOW(FLOAT32, window=5, shift=2, rows=1, columns=1, heads=2, head_dim=7, seed=seed)
            if name == "window"
            else OVERLAPPING(FLOAT32, window=4, key_window=6, rows=1, columns=1, heads=2, head_dim=7, seed=seed)
        )
        table = argument(spec, "bias_table").clone()
        table[torch.rand(table.shape, generator=generator) < 0.4] = -math.inf
        table[table.shape[0] // 2] = 0.0  # every pixel sees itself
        return changed(spec, bias_table=table)

    hold(make, draws=2, tile=(16, 16))


@case
def rows_that_see_nothing_are_nan_as_in_eager() -> None:
    spec = WINDOW(FLOAT32, window=4, rows=1, columns=1, heads=2, head_dim=5)
    table = argument(spec, "bias_table").clone()
    table[:, 1] = -math.inf
    fused, eager = (changed(spec, bias_table=table).run(backend) for backend in ("triton", "eager"))
    assert eager["out"].isnan().sum() == eager["out"].numel() // 2
    for name in ("out", "d bias_table"):
        assert torch.equal(fused[name].isnan(), eager[name].isnan()), f"{name} is NaN in other places than eager"


LARGE: dict[str, dict[str, Any]] = {
    "severity": {"severity": True, "head_dim": 24},
    "plain": {"severity": False, "head_dim": 24},
    "severity, head dim 7": {"severity": True, "head_dim": 7},
}


@case_for(*(f"{op}: {name}" for op in ("window", "overlapping") for name in LARGE))
def large_float16_numbers_stay_finite_and_right(choice: str) -> None:
    op, _, name = choice.partition(": ")
    spec = (
        WINDOW(FLOAT16, window=4, shift=1, rows=1, columns=2, heads=1, **LARGE[name])
        if op == "window"
        else OVERLAPPING(FLOAT16, window=4, key_window=6, rows=1, columns=2, heads=1, **LARGE[name])
    )
    # Queries and keys to 6e4, of the severity that sharpens most: in float16 their products overflow.
    features = "qkv" if op == "window" else "q"
    channels = LARGE[name]["head_dim"]
    large = argument(spec, features).clone()
    large[..., :channels] = (large[..., :channels].float() * 2e4).clamp(-6e4, 6e4).half()
    arguments: dict[str, Tensor | None] = {features: large}
    if spec.arguments["severity"] is not None:
        arguments["severity"] = torch.full_like(argument(spec, "severity"), 2.0)
    spec = changed(spec, **arguments)
    found, wide, exact = spec.run("triton"), spec.run("eager", FLOAT32), spec.run("eager", torch.float64)
    for result, value in exact.items():
        assert wide[result].isfinite().all(), f"{result} is not finite in float32 either"
        representable = value.abs() < torch.finfo(FLOAT16).max
        broken = representable & ~found[result].isfinite()
        assert not broken.any(), f"{result}: {int(broken.sum())} of {broken.numel()} numbers are not finite"
    values = argument(spec, "qkv" if op == "window" else "kv")[..., -channels:]
    assert found["out"].abs().max() <= values.abs().max(), "a mixture of values is larger than all of them"
    if spec.arguments["severity"] is not None:  # without one, queries are rounded to float16 once more, as in eager
        # Weights are all or nothing here: what is attended to is one value, or a mixture of values of equal logits.
        error = float((found["out"].double() - exact["out"]).abs().max())
        bound = 2**-9 * float(exact["out"].abs().max())
        assert error <= bound, f"out is off by {error:.3g}, more than {bound:.3g}"
