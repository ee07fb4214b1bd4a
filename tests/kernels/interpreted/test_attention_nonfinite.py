"""Tests that NaN, infinity and the largest float16 numbers affect the right results and no others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from kernel_checks import FLOAT16, FLOAT32, TRITON, argument, assert_accurate, block_sizes, changed
from torch import Tensor

from savl.ops import KernelSettings, overlapping_window_attention, window_attention
from savl.ops.equivalence import Case, Outputs
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

FINITE: dict[str, Case] = {
    "window": window_attention_case(FLOAT32, window=4, rows=1, columns=2, heads=1, head_dim=5),
    "window, shifted": window_attention_case(FLOAT32, window=4, shift=1, rows=1, columns=2, heads=1, head_dim=5),
    "overlapping": overlapping_window_attention_case(
        FLOAT32, window=4, key_window=6, rows=1, columns=2, heads=1, head_dim=5
    ),
}


def places(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield arguments and indices: of a query, key and value inside and at a corner, a severity, and a bias."""
    for name, value in case.arguments.items():
        if value is None:
            continue
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
    """Return the pixels (B, H, W) in windows with one of ``mask``, or no more than ``margin`` beside such windows."""
    blocks = mask.float()[:, None]
    blocks = torch.nn.functional.max_pool2d(blocks, window).repeat_interleave(window, 2).repeat_interleave(window, 3)
    return torch.nn.functional.max_pool2d(blocks, 2 * margin + 1, stride=1, padding=margin)[:, 0] > 0


def nan_differences(case: Case, given: str, value: float, fused: Outputs, eager: Outputs) -> Iterator[str]:
    """Yield where results of the kernels are NaN and those of eager are not, or the other way round."""
    shift = case.options.get("shift", 0)
    margin = ((case.options.get("key_window") or case.options["window"]) - case.options["window"]) // 2
    windows = windows_with(eager["out"].isnan().any(-1).roll((-shift, -shift), (1, 2)), case.options["window"], margin)
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "given", "place"),
    [(name, given, place) for name, case in FINITE.items() for given, place in places(case)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_a_number_that_is_not_finite_makes_nan_of_the_same_results_as_in_eager(
    name: str, given: str, place: tuple[int, ...], value: float
) -> None:
    case = FINITE[name]
    tensor = argument(case, given).clone()
    tensor[place] = value
    case = changed(case, **{given: tensor})
    with block_sizes((16, 64) if name == "overlapping" else None):  # all keys in one tile, to save time
        fused = case.run("triton")
    eager = case.run("eager")
    assert any(result.isnan().any() for result in eager.values()), "it has no effect in eager"
    differences = list(nan_differences(case, given, value, fused, eager))
    assert not differences


@pytest.mark.parametrize("name", ["window", "overlapping"])
def test_a_gradient_of_the_output_that_is_nan_makes_nan_of_what_it_does_in_eager(name: str) -> None:
    case = FINITE[name]
    given = {key: value for key, value in case.arguments.items() if value is not None}
    op = window_attention if case.op == "window_attention" else overlapping_window_attention
    results = []
    for kernels in (TRITON, KernelSettings.of("eager")):
        leaves = {key: value.clone().requires_grad_() for key, value in given.items()}
        out = op(**leaves, **case.options, kernels=kernels)
        grad_out = torch.ones_like(out)
        grad_out[0, 1, 2, 3] = math.nan
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        results.append({key: gradient.isnan() for key, gradient in zip(leaves, gradients, strict=True)})
    fused, eager = results
    for key, expected in eager.items():
        assert expected.any(), f"d {key} of eager is finite"
        assert fused[key].equal(expected), (
            f"d {key} is NaN in {int(fused[key].sum())} places, eager in {expected.sum()}"
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("given", ["qkv", "k", "v", "bias", "scale"])
def test_with_a_finite_mask_and_cosine_similarity_nan_arises_where_it_does_in_eager(given: str, value: float) -> None:
    case = window_attention_case(
        FLOAT32, window=(2, 4), shift=(1, 2), rows=1, columns=2, key_window=(2, 4), heads=2, head_dim=3, mask=-1.0,
        cosine=True, severity=False, bias="dense",
    )  # fmt: skip
    tensor = argument(case, given).clone()
    tensor[(0, 1, 2, 1) if tensor.dim() == 4 else (0,) * tensor.dim()] = value
    case = changed(case, **{given: tensor})
    fused, eager = case.run("triton"), case.run("eager")
    assert any(result.isnan().any() for result in eager.values()), "it has no effect in eager"
    for name, expected in eager.items():
        assert torch.equal(fused[name].isnan(), expected.isnan()), f"{name} is NaN in other places than eager"


def test_float16_queries_near_the_largest_float16_do_not_overflow() -> None:
    def make(seed: int) -> Case:
        case = window_attention_case(
            FLOAT16, window=4, rows=1, columns=1, heads=2, head_dim=1, severity=False, seed=seed
        )
        qkv = argument(case, "qkv") * torch.tensor([2e4, 2e4, 1e-4, 1e-4, 1, 1], dtype=FLOAT16)
        return changed(case, qkv=qkv.clamp(-6e4, 6e4))

    assert_accurate(make, draws=3)


@pytest.mark.parametrize(
    "attention",
    [
        partial(window_attention_case, window=5, shift=2),
        partial(overlapping_window_attention_case, window=4, key_window=6),
    ],
    ids=["window", "overlapping"],
)
def test_biases_of_minus_infinity_give_no_weight_and_no_nan(attention: Callable[..., Case]) -> None:
    def make(seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)
        case = attention(FLOAT32, rows=1, columns=1, heads=2, head_dim=7, seed=seed)
        table = argument(case, "bias_table").clone()
        table[torch.rand(table.shape, generator=generator) < 0.4] = -math.inf
        table[table.shape[0] // 2] = 0.0  # every pixel sees itself
        return changed(case, bias_table=table)

    assert_accurate(make, draws=1, tile=(16, 16))


def test_rows_that_see_nothing_are_nan_as_in_eager() -> None:
    case = window_attention_case(FLOAT32, window=4, rows=1, columns=1, heads=2, head_dim=5)
    table = argument(case, "bias_table").clone()
    table[:, 1] = -math.inf
    fused, eager = (changed(case, bias_table=table).run(backend) for backend in ("triton", "eager"))
    assert eager["out"].isnan().sum() == eager["out"].numel() // 2
    for name in ("out", "d bias_table"):
        assert torch.equal(fused[name].isnan(), eager[name].isnan()), f"{name} is NaN in other places than eager"


@pytest.mark.parametrize(("severity", "head_dim"), [(True, 24), (False, 24), (True, 7)])
@pytest.mark.parametrize("op", ["window", "overlapping"])
def test_large_float16_numbers_give_finite_and_accurate_results(op: str, severity: bool, head_dim: int) -> None:
    shape: dict[str, Any] = {"rows": 1, "columns": 2, "heads": 1, "severity": severity, "head_dim": head_dim}
    case = (
        window_attention_case(FLOAT16, window=4, shift=1, **shape)
        if op == "window"
        else overlapping_window_attention_case(FLOAT16, window=4, key_window=6, **shape)
    )
    # Queries and keys to 6e4, of the severity that sharpens most: in float16 their products overflow.
    features = "qkv" if op == "window" else "q"
    large = argument(case, features).clone()
    large[..., :head_dim] = (large[..., :head_dim].float() * 2e4).clamp(-6e4, 6e4).half()
    arguments: dict[str, Tensor | None] = {features: large}
    if severity:
        arguments["severity"] = torch.full_like(argument(case, "severity"), 2.0)
    case = changed(case, **arguments)
    found, wide, exact = case.run("triton"), case.run("eager", FLOAT32), case.run("eager", torch.float64)
    for result, value in exact.items():
        assert wide[result].isfinite().all(), f"{result} is not finite in float32 either"
        representable = value.abs() < torch.finfo(FLOAT16).max
        broken = representable & ~found[result].isfinite()
        assert not broken.any(), f"{result}: {int(broken.sum())} of {broken.numel()} numbers are not finite"
    values = argument(case, "qkv" if op == "window" else "kv")[..., -head_dim:]
    assert found["out"].abs().max() <= values.abs().max(), "a mixture of values is larger than all of them"
    if severity:  # without one, queries are rounded to float16 once more, as in eager
        # Weights are all or nothing here: what is attended to is one value, or a mixture of values of equal logits.
        # Factors of the logits are cut to tf32, which decides between keys whose logits are nearly equal.
        bound = 2**-9 * float(exact["out"].abs().max())
        decided = torch.ones(exact["out"].shape[:3], dtype=torch.bool)
        for _ in range(20):
            sign = torch.randint(0, 2, large.shape) * 2 - 1
            near = {**arguments, features: large.double() * (1 + 2**-9 * sign)}
            out = changed(case, **near).run("eager", torch.float64)["out"]
            decided &= ((out - exact["out"]).abs() <= bound).all(-1)
        error = (found["out"].double() - exact["out"]).abs().amax(-1)
        assert decided.float().mean() > 0.5
        assert error[decided].max() <= bound, f"out is off by {error[decided].max():.3g}, more than {bound:.3g}"
