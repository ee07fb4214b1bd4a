"""What Triton's interpreter runs: the kernels of both attentions, forward and backward through autograd, on the CPU.

`CASES` holds functions by name; each raises AssertionError with a message that says what is wrong. They want
TRITON_INTERPRET=1 in the environment before savl is imported: worker.py runs them, test_interpreted.py starts that.
Images are of a few windows, since the interpreter takes milliseconds for what a GPU does in none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.network import SAVL, SAVLConfig
from savl.ops import (
    KernelSettings,
    KernelUnavailable,
    kernel_report,
    overlapping_window_attention,
    use_fused_kernels,
    window_attention,
)
from savl.ops.equivalence import (
    Case,
    Outputs,
    interpreter_cases,
    judge,
    overlapping_window_attention_case,
    verify,
    window_attention_case,
)

Make = Callable[[int], Case]
Tile = tuple[int, int]

WINDOW, OVERLAPPING = window_attention_case, overlapping_window_attention_case
FLOAT32, FLOAT16 = torch.float32, torch.float16
DTYPES = {"f32": FLOAT32, "f16": FLOAT16}
TRITON = KernelSettings(window_attention="triton", overlapping_window_attention="triton")

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a function under its name, in words."""
    CASES[function.__name__.replace("_", " ")] = function
    return function


def case_for(*choices: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enter a function once for each of its arguments, or of names in a dictionary of them."""

    def enter(function: Callable[[Any], None]) -> Callable[[Any], None]:
        for choice in choices:
            CASES[f"{function.__name__.replace('_', ' ')}: {choice}"] = partial(function, choice)
        return function

    return enter


# What the cases are made with


@contextmanager
def tiles(tile: Tile | None) -> Iterator[None]:
    """Launch every kernel with tiles of so many queries and keys; None for those of the configuration."""
    if tile is None:
        yield
        return
    launch, configs = import_module("savl.kernels.launch"), import_module("savl.kernels.configs")
    config = configs.KernelConfig(*tile, warps=4, stages=1)
    asked: list[str] = []

    def choose(call: Any, stage: str) -> Any:
        asked.append(stage)
        return config

    with mock.patch.object(launch.Attention, "config", choose):
        yield
    assert set(asked) == set(configs.STAGES), f"only {sorted(set(asked))} asked for block sizes"


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Whatever torch hands out uninitialised is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all(), "this relies on torch filling what is uninitialised"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def hold(make: Make, draws: int = 2, tile: Tile | None = None) -> None:
    """Hold the kernels against the rule of `savl.ops.equivalence`."""
    with tiles(tile):
        broken = [str(budget) for budget in judge(make, "triton", draws=draws) if not budget.kept]
    assert not broken, f"{make(0).op} ({make(0).label}), tiles {tile}: " + "; ".join(broken)


def assert_same_bits(found: Outputs, expected: Outputs, when: str) -> None:
    """Also an assertion that nothing is NaN, which equals nothing."""
    assert found.keys() == expected.keys(), f"{sorted(found)} in place of {sorted(expected)} {when}"
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{different} differ {when}"


def changed(case: Case, **arguments: Tensor | None) -> Case:
    """The case with other arguments."""
    return dataclasses.replace(case, arguments={**case.arguments, **arguments})


def argument(case: Case, name: str) -> Tensor:
    """An argument that is given."""
    value = case.arguments[name]
    assert value is not None
    return value


# As right as eager. Windows of 16 come first: they take longest.

RIGHT: dict[str, tuple[Callable[..., Case], dict[str, Any], int, Tile | None]] = {
    "window 16 in 24, tile 128x128": (
        OVERLAPPING,
        {"window": 16, "key_window": 24, "heads": 1, "rows": 1, "columns": 1},
        1,
        (128, 128),
    ),
    "window 16, shift 8, tile 128x32": (
        WINDOW,
        {"window": 16, "shift": 8, "heads": 1, "rows": 1, "columns": 1, "head_dim": 24},
        1,
        (128, 32),
    ),
    "window 16, head dim 30, plain, tile 64x64": (
        WINDOW,
        {"window": 16, "heads": 1, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
        1,
        (64, 64),
    ),
    "window 8 in 12, two in a row": (
        OVERLAPPING,
        {"window": 8, "key_window": 12, "heads": 1, "rows": 1, "columns": 2},
        1,
        None,
    ),
    "window 8 in 12, head dim 64, tile 32x16": (
        OVERLAPPING,
        {"window": 8, "key_window": 12, "heads": 1, "rows": 1, "columns": 1, "head_dim": 64},
        1,
        (32, 16),
    ),
    "window 8 in 12, head dim 30, plain, tile 64x64": (
        OVERLAPPING,
        {"window": 8, "key_window": 12, "heads": 1, "rows": 1, "columns": 1, "head_dim": 30, "severity": False},
        2,
        (64, 64),
    ),
    "window 4 in 6, batch of 2": (
        OVERLAPPING,
        {"window": 4, "key_window": 6, "batch": 2, "rows": 1, "columns": 2},
        1,
        None,
    ),
    "window 4 in 6, head dim 32, tile 16x16": (
        OVERLAPPING,
        {"window": 4, "key_window": 6, "heads": 1, "rows": 2, "columns": 1, "head_dim": 32},
        2,
        (16, 16),
    ),
    "window 2 in 10": (
        OVERLAPPING,
        {"window": 2, "key_window": 10, "heads": 1, "rows": 1, "columns": 3, "head_dim": 32},
        3,
        (16, 128),
    ),
    "window 5 in 9, head dim 7": (
        OVERLAPPING,
        {"window": 5, "key_window": 9, "heads": 1, "rows": 1, "columns": 3, "head_dim": 7},
        2,
        None,
    ),
    "window 4 in 4, head dim 1": (
        OVERLAPPING,
        {"window": 4, "key_window": 4, "heads": 2, "rows": 1, "columns": 1, "head_dim": 1},
        3,
        None,
    ),
    "window 8, shift 4": (WINDOW, {"window": 8, "shift": 4, "heads": 1, "rows": 1, "columns": 2}, 1, None),
    "window 8, shift 3, tile 16x16": (
        WINDOW,
        {"window": 8, "shift": 3, "heads": 1, "rows": 1, "columns": 1, "head_dim": 32},
        1,
        (16, 16),
    ),
    "window 8, shift 7, head dim 64, plain, tile 64x64": (
        WINDOW,
        {"window": 8, "shift": 7, "heads": 1, "rows": 2, "columns": 1, "head_dim": 64, "severity": False},
        2,
        (64, 64),
    ),
    "window 8, shift 4, tile 128x32": (
        WINDOW,
        {"window": 8, "shift": 4, "heads": 1, "rows": 1, "columns": 2, "head_dim": 30},
        2,
        (128, 32),
    ),
    "window 4, shift 2, batch of 2": (WINDOW, {"window": 4, "shift": 2, "batch": 2, "rows": 1, "columns": 2}, 1, None),
    "window 4, plain": (WINDOW, {"window": 4, "heads": 3, "rows": 1, "columns": 1, "severity": False}, 2, None),
    "window 5, shift 2, head dim 30": (
        WINDOW,
        {"window": 5, "shift": 2, "heads": 1, "rows": 1, "columns": 2, "head_dim": 30},
        2,
        None,
    ),
    "window 5, shift 1, head dim 7, tile 16x16": (
        WINDOW,
        {"window": 5, "shift": 1, "heads": 1, "rows": 1, "columns": 1, "head_dim": 7},
        3,
        (16, 16),
    ),
    "window 5, shift 4, head dim 1, tile 32x16": (
        WINDOW,
        {"window": 5, "shift": 4, "heads": 2, "rows": 1, "columns": 1, "head_dim": 1},
        3,
        (32, 16),
    ),
}


@case_for(*(f"{name}, {dtype}" for name in RIGHT for dtype in DTYPES))
def as_right_as_eager(choice: str) -> None:
    name, _, dtype = choice.rpartition(", ")
    make, settings, draws, tile = RIGHT[name]
    hold(lambda seed: make(DTYPES[dtype], seed=seed, **settings), draws, tile)


def in_float32(case: Case, *names: str) -> Case:
    """The case with arguments in float32 that are not rounded to float16."""
    generator = torch.Generator().manual_seed(3)
    wide = {name: argument(case, name).float() for name in names}
    wide = {name: value * (1 + 2**-12 * torch.rand(value.shape, generator=generator)) for name, value in wide.items()}
    return changed(case, **wide)


@case_for("severity", "bias_table", "severity bias_table")
def float16_goes_with_float32(names: str) -> None:
    hold(
        lambda seed: in_float32(
            WINDOW(FLOAT16, window=4, shift=1, rows=1, columns=2, heads=1, seed=seed), *names.split()
        ),
        draws=3,
    )
    hold(
        lambda seed: in_float32(
            OVERLAPPING(FLOAT16, window=4, key_window=6, rows=1, columns=2, heads=1, seed=seed), *names.split()
        ),
        draws=3,
    )


# Memory

# With tails of tiles in queries, keys and the head dimension.
AWKWARD: dict[str, Callable[[torch.dtype], Case]] = {
    "window": lambda dtype: WINDOW(dtype, window=5, shift=2, rows=1, columns=1, heads=2, head_dim=7),
    "overlapping": lambda dtype: OVERLAPPING(dtype, window=5, key_window=9, rows=1, columns=2, heads=1, head_dim=7),
    "plain": lambda dtype: WINDOW(dtype, window=3, rows=2, columns=1, heads=1, head_dim=30, severity=False),
}


@case_for(*(f"{name}, {dtype}" for name in AWKWARD for dtype in DTYPES))
def every_element_is_written_and_every_run_gives_the_same_bits(choice: str) -> None:
    name, dtype = choice.split(", ")
    spec = AWKWARD[name](DTYPES[dtype])
    expected = spec.run("triton")
    missing = {f"d {given}" for given, value in spec.arguments.items() if value is not None} - expected.keys()
    assert not missing, f"there is no {missing}"
    assert_same_bits(spec.run("triton"), expected, "on the second run")
    with empty_is_nan():
        found = spec.run("triton")
    unwritten = [result for result, value in found.items() if value.isnan().any()]
    assert not unwritten, f"{unwritten} have elements that nobody wrote"
    assert_same_bits(found, expected, "when memory is full of NaN")


def inside_larger(value: Tensor) -> Tensor:
    """The same numbers inside a tensor that is larger along every dimension and otherwise NaN."""
    whole = torch.full([size + 2 for size in value.shape], math.nan, dtype=value.dtype)
    part = whole[tuple(slice(1, 1 + size) for size in value.shape)]
    part.copy_(value)
    return part


def with_room_between_pixels(value: Tensor) -> Tensor:
    """The same numbers as a slice of the last dimension, so that pixels stay evenly spaced; NaN beside it."""
    whole = torch.full((*value.shape[:-1], value.shape[-1] + 5), math.nan, dtype=value.dtype)
    part = whole[..., 2 : 2 + value.shape[-1]]
    part.copy_(value)
    return part


def last_dimension_first(value: Tensor) -> Tensor:
    """The same numbers as a permuted (B, C, H, W) has them."""
    return value.movedim(-1, 1).contiguous().movedim(1, -1)


def rows_and_columns_swapped(value: Tensor) -> Tensor:
    """The same numbers stored column by column."""
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() > 2 else value.t().contiguous().t()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inside a larger tensor": inside_larger,
    "with room between pixels": with_room_between_pixels,
    "channels first": last_dimension_first,
    "column by column": rows_and_columns_swapped,
}


@case_for(*LAYOUTS)
def any_layout_gives_the_same_bits(name: str) -> None:
    for spec in (
        WINDOW(FLOAT32, window=4, shift=1, rows=1, columns=1, heads=1, head_dim=7, batch=2),
        OVERLAPPING(FLOAT32, window=3, key_window=5, rows=1, columns=1, heads=1, head_dim=7, batch=2),
    ):
        views = {given: LAYOUTS[name](argument(spec, given)) for given in spec.arguments}
        strange = [given for given, view in views.items() if not view.is_contiguous()]
        assert len(strange) >= len(views) - 1, f"only {strange} are not contiguous"
        assert_same_bits(changed(spec, **views).run("triton"), spec.run("triton"), f"{name}: {spec.op}")


@case
def expanded_tensors_and_gradients_give_what_their_copies_give() -> None:
    table, one = torch.randn(49, 1), torch.rand(1, 1, 1)
    qkv, kv = torch.randn(1, 4, 4, 3 * 14), torch.randn(1, 4, 4, 2 * 14)
    for function, features in (
        (partial(window_attention, window=4, shift=1, kernels=TRITON), (qkv.expand(2, -1, -1, -1),)),
        (
            partial(overlapping_window_attention, window=4, key_window=4, kernels=TRITON),
            (qkv[..., :14].expand(2, -1, -1, -1), kv.expand(2, -1, -1, -1)),
        ),
    ):
        results = []
        for copied in (False, True):
            given = [
                (value.contiguous() if copied else value).detach().requires_grad_()
                for value in (*features, table, one.expand(2, 4, 4))
            ]
            out = function(*given)
            seed = torch.full((1,), 0.5).expand(out.shape)  # strides of 0
            results.append([out.detach(), *torch.autograd.grad(out, given, seed.contiguous() if copied else seed)])
        for index, (found, expected) in enumerate(zip(*results, strict=True)):
            assert torch.equal(found, expected), f"{function.func.__name__}: result {index} differs"


@case_for("window", "overlapping")
def far_addresses_give_the_same_bits(name: str) -> None:
    launch = import_module("savl.kernels.launch")
    near = launch.Attention.constants
    spec = AWKWARD[name](FLOAT32)
    with mock.patch.object(launch.Attention, "constants", lambda call: {**near(call), "FAR": False}):
        expected = spec.run("triton")
    with mock.patch.object(launch.Attention, "constants", lambda call: {**near(call), "FAR": True}):
        assert_same_bits(spec.run("triton"), expected, "when pixels are counted in 64 bits")


@case
def images_of_more_than_two_gigabytes_are_addressed_in_64_bits() -> None:
    launch = import_module("savl.kernels.launch")
    bias = torch.empty(49, 2, device="meta")
    for side, far in ((2**12, False), (2**13, True)):  # of 128 channels: 2**31 elements and 2**33
        q, k, v = torch.empty(1, side, side, 96, device="meta", dtype=FLOAT16).chunk(3, dim=-1)
        call = launch.Attention(q, k, v, bias, None, 4, 4, 0)
        assert call.constants()["FAR"] is far, f"{side} × {side} pixels"


@case_for("f32", "f16")
def an_empty_batch_gives_empty_results_and_gradients_of_zero(dtype: str) -> None:
    for make in (
        partial(WINDOW, window=4, shift=1),
        partial(OVERLAPPING, window=4, key_window=6),
        partial(WINDOW, window=4, severity=False),
    ):
        spec = make(DTYPES[dtype], batch=0)
        with empty_is_nan():
            found, eager = spec.run("triton"), spec.run("eager")
        for name, expected in eager.items():
            assert found[name].shape == expected.shape, f"{spec.op}: {name} has shape {tuple(found[name].shape)}"
            assert found[name].dtype == expected.dtype, f"{spec.op}: {name} is {found[name].dtype}"
        table = found["d bias_table"]
        assert torch.equal(table, torch.zeros_like(table)), "no window has a gradient"


# NaN and infinity

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


# The ops as torch sees them


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    qkv, q, kv, severity = numbers(1, 2, 4, 15), numbers(1, 2, 4, 5), numbers(1, 2, 4, 10), numbers(1, 2, 4).abs()
    near, far, half = numbers(9, 1), numbers(25, 1), FLOAT16
    return {
        "window_attention": ("window_attention", (qkv, near, severity, 2, 1)),
        "window_attention, plain": ("window_attention", (qkv, near, None, 2, 0)),
        "window_attention, float16": ("window_attention", (qkv.to(half), near, severity, 2, 1)),
        "overlapping_window_attention": ("overlapping_window_attention", (q, kv, far, severity, 2, 4)),
        "overlapping_window_attention, float16": (
            "overlapping_window_attention",
            (q.to(half), kv.to(half), far, None, 2, 4),
        ),
    }


OP_CALLS = op_calls()


def backward_arguments(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    out, lse = getattr(torch.ops.savl, op)(*args)
    return (torch.ones_like(out), *args[:-2], out, lse, *args[-2:])


@case_for("window_attention", "window_attention, float16", "overlapping_window_attention")
def torch_finds_nothing_wrong_with_the_registration(name: str) -> None:
    op, args = OP_CALLS[name]
    given = tuple(arg.clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args)
    torch.library.opcheck(getattr(torch.ops.savl, op).default, given)
    torch.library.opcheck(getattr(torch.ops.savl, f"{op}_backward").default, backward_arguments(op, args))


@case_for(*OP_CALLS)
def the_fake_kernel_gives_what_the_real_one_gives(name: str) -> None:
    op, args = OP_CALLS[name]
    for called, given in ((op, args), (f"{op}_backward", backward_arguments(op, args))):
        real = getattr(torch.ops.savl, called)(*given)
        with FakeTensorMode() as mode:
            fake = getattr(torch.ops.savl, called)(
                *(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in given)
            )
        for index, (found, promised) in enumerate(zip(real, fake, strict=True)):
            for what in ("shape", "dtype", "device"):
                wanted, got = getattr(promised, what), getattr(found, what)
                assert wanted == got, f"{called}: output {index} has {what} {got}, promised was {wanted}"
            assert found.stride() == promised.stride(), f"{called}: output {index} has strides {found.stride()}"


@case
def the_log_sum_exp_is_that_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    qkv, table = torch.randn(1, 4, 4, 3 * 6, generator=generator), torch.randn(49, 2, generator=generator)
    _, lse = torch.ops.savl.window_attention(qkv, table, None, 4, 0)
    q, k, _ = qkv.double().view(16, 3, 2, 3).permute(1, 2, 0, 3)
    y, x = torch.arange(16) // 4, torch.arange(16) % 4
    index = (y[:, None] - y[None, :] + 3) * 7 + x[:, None] - x[None, :] + 3
    logits = q @ k.transpose(1, 2) / math.sqrt(3) + table.double()[index].permute(2, 0, 1)
    torch.testing.assert_close(lse.reshape(2, 16), logits.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-6)


@case
def a_compiled_op_gives_what_the_op_gives() -> None:
    def attend(qkv: Tensor, table: Tensor, severity: Tensor) -> Tensor:
        return window_attention(qkv, table, severity, window=2, shift=1, kernels=TRITON)

    _, (qkv, table, severity, *_) = OP_CALLS["window_attention"]
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        given = [value.clone().requires_grad_() for value in (qkv, table, severity)]
        out = function(*given)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@case
def it_serves_when_asked_for_by_name_and_only_then() -> None:
    qkv, table = torch.randn(1, 4, 4, 24), torch.zeros(49, 2)
    attend = partial(window_attention, qkv, table, window=4)
    launched: list[str] = []
    launch = import_module("savl.kernels.launch")
    run = launch.forward

    def spy(call: Any) -> Any:
        launched.append("forward")
        return run(call)

    with mock.patch.object(launch, "forward", spy):
        with use_fused_kernels():
            attend()
            assert kernel_report().serving("window_attention") == "eager"
        assert not launched, "the interpreter served without being asked for"
        with use_fused_kernels(window_attention="triton"):
            attend()
            assert kernel_report().serving("window_attention") == "triton"
        assert launched == ["forward"]


@case_for("cpp", "triton")
def what_cannot_serve_says_so(backend: str) -> None:
    qkv, table = torch.randn(1, 4, 4, 24, dtype=torch.float64), torch.zeros(49, 2, dtype=torch.float64)
    said = ""
    try:
        window_attention(qkv, table, window=4, kernels=KernelSettings(window_attention=backend))
    except KernelUnavailable as error:
        said = str(error)
    assert said, f"{backend} served float64 under the interpreter"
    assert ("interpreter" if backend == "cpp" else "float64") in said, said


@case
def verify_tries_both_dtypes_that_the_interpreter_gets_right() -> None:
    small = [
        lambda dtype, seed: WINDOW(dtype, window=4, shift=1, rows=1, columns=1, heads=2, seed=seed),
        lambda dtype, seed: OVERLAPPING(dtype, window=3, key_window=5, rows=1, columns=1, heads=2, seed=seed),
    ]
    assert {make(0).op for make in interpreter_cases(FLOAT32)} == {make(FLOAT32, 0).op for make in small}
    equivalence = import_module("savl.ops.equivalence")
    few = mock.patch.object(equivalence, "interpreter_cases", lambda dtype: [partial(make, dtype) for make in small])
    with few, mock.patch.object(equivalence, "judge", partial(judge, draws=3)):
        for op in ("window_attention", "overlapping_window_attention"):
            verdicts = list(verify(op, "triton"))
            assert [verdict.dtype for verdict in verdicts] == [FLOAT32, FLOAT16]
            broken = [f"{verdict.worst} in {verdict.dtype}" for verdict in verdicts if not verdict.worst.kept]
            assert not broken, f"{op}: {broken}"


@case
def a_network_has_the_picture_and_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    config = SAVLConfig(
        channels=12, depths=(2,), heads=2, window=4, cab_compress=3, cab_squeeze=4, cab_scale=0.1, drop_path=0.0,
        upsample_features=8, latent=6, estimator_width=8, estimator_dilations=(1, 2), decoder_width=8, decoder_depth=3,
    )  # fmt: skip
    model = SAVL(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    lr = torch.rand(1, 3, 7, 4)
    results = []
    for settings in (TRITON, KernelSettings.of("eager")):
        model.zero_grad()
        with use_fused_kernels(**dataclasses.asdict(settings)):
            sr = model(lr)
            sr.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"sr": sr.detach(), **gradients})
    fused, eager = results
    assert fused.keys() == eager.keys()
    tables = [name for name in eager if "bias_table" in name and bool(eager[name].any())]
    assert len(tables) >= 3, f"only {tables} have a gradient"
    for name, expected in eager.items():
        # Both are float32: far apart from rounding, which twenty layers multiply, lies what is wrong.
        bound = 1e-3 * float(expected.abs().max()) + 1e-9
        error = float((fused[name] - expected).abs().max())
        assert error <= bound, f"{name} is off by {error:.3g}, more than {bound:.3g}"
