"""Test the rule that kernels must satisfy: wrong results violate it, and correct results do not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import KernelSettings, equivalence
from savl.ops.channel_modulation import channel_modulation_case
from savl.ops.equivalence import Budget, Case, judge, measure
from savl.ops.gaussian_posterior import gaussian_posterior_case
from savl.ops.library import EXTENSION_UNAVAILABLE, FUSED
from savl.ops.op import OPS, Op
from savl.ops.overlapping_window_attention import overlapping_window_attention_case
from savl.ops.window_attention import window_attention_case

Spoil = Callable[[Tensor], Tensor]
UseAsOp = Callable[[str, Callable[..., Any]], None]

CASES: dict[str, Callable[[int], Case]] = {
    "window_attention": lambda seed: window_attention_case(torch.float32, window=4, head_dim=5, seed=seed),
    "overlapping_window_attention": lambda seed: overlapping_window_attention_case(
        torch.float32, window=3, key_window=5, head_dim=5, seed=seed
    ),
    "channel_modulation": lambda seed: channel_modulation_case(torch.float32, height=4, width=5, channels=9, seed=seed),
}


def one_element_off(value: Tensor) -> Tensor:
    changed = value.clone()
    changed.view(-1)[-1] += 1e-4 * float(value.abs().max())
    return changed


def one_nan(value: Tensor) -> Tensor:
    changed = value.clone()
    changed.view(-1)[0] = math.nan
    return changed


@pytest.fixture
def use_as_op(monkeypatch: pytest.MonkeyPatch) -> UseAsOp:
    """Put another function in place of an op's public one."""

    def replace(op: str, function: Callable[..., Any]) -> None:
        monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], function=function))

    return replace


@pytest.fixture
def pretend(use_as_op: UseAsOp) -> Callable[[str, Spoil], None]:
    """Make an op's "kernel" the reference, spoilt; the reference itself stays as it is."""

    def replace(op: str, spoil: Spoil) -> None:
        original = OPS[op].function

        def kernel(*args: object, kernels: KernelSettings, **options: object) -> Tensor:
            eager = KernelSettings.of("eager")
            out: Tensor = original(*args, **options, kernels=eager)
            return out if kernels == eager else spoil(out)

        use_as_op(op, kernel)

    return replace


@pytest.mark.parametrize("op", CASES)
def test_the_reference_keeps_its_own_rule(op: str, pretend: Callable[[str, Spoil], None]) -> None:
    pretend(op, lambda out: out)
    assert all(budget.kept for budget in judge(CASES[op], "cpp", draws=2))


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize(
    "spoil",
    [lambda out: out * (1 + 1e-4), lambda out: out + 1e-4, one_element_off, one_nan],
    ids=["scaled", "shifted", "one-element", "one-nan"],
)
def test_a_wrong_output_breaks_the_rule(op: str, spoil: Spoil, pretend: Callable[[str, Spoil], None]) -> None:
    pretend(op, spoil)
    out = next(budget for budget in judge(CASES[op], "cpp", draws=2) if budget.name == "out")
    assert not out.kept, f"{out.error:.3g} counts as right, {out.allowed:.3g} are allowed"
    assert out.used > 1


@pytest.mark.parametrize("op", CASES)
def test_a_wrong_gradient_breaks_the_rule(op: str, pretend: Callable[[str, Spoil], None]) -> None:
    # The value stays as it is, its gradient does not.
    pretend(op, lambda out: out + 1e-4 * (out - out.detach()))
    budgets = {budget.name: budget for budget in judge(CASES[op], "cpp", draws=2)}
    assert budgets["out"].kept
    kept = [name for name, budget in budgets.items() if name != "out" and budget.kept]
    assert not kept, f"gradients {kept} count as right"


def test_nan_is_never_kept() -> None:
    good = torch.ones(4)
    budget = measure("x", one_nan(good), good, good.double(), 1)
    assert not budget.kept
    assert budget.used == math.inf
    pooled = Budget.pooled([measure("x", good, good, good.double(), 1), budget])
    assert not pooled.kept, "a later or earlier draw must not make NaN good"
    assert not Budget.pooled([budget, measure("x", good, good, good.double(), 1)]).kept


def test_an_error_where_none_is_allowed_is_not_kept() -> None:
    zero = torch.zeros(3)
    assert measure("x", zero, zero, zero.double(), 1).kept
    wrong = measure("x", zero + 1e-30, zero, zero.double(), 1)
    assert not wrong.kept
    assert wrong.used == math.inf


def test_twice_the_error_of_eager_is_allowed_and_no_more() -> None:
    exact, eager = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 1.0])
    assert measure("x", torch.tensor([2.0, 0.0]), eager, exact, 1).kept
    assert not measure("x", torch.tensor([2.001, 0.0]), eager, exact, 1).kept


def test_half_a_unit_in_the_last_place_is_allowed() -> None:
    exact = torch.tensor([1 + 2**-24], dtype=torch.float64)  # halfway between two float32 numbers
    up, down = torch.tensor([1 + 2**-23]), torch.tensor([1.0])
    assert measure("x", up, down, exact, 0).kept
    assert measure("x", down, up, exact, 0).kept
    assert not measure("x", up + 2**-21, down, exact, 0).kept


@pytest.mark.parametrize(
    ("fused", "eager", "fragments"),
    [
        (torch.zeros(3), torch.zeros(4), ["out", "(3,)", "(4,)"]),
        (torch.zeros(1, 4), torch.zeros(4), ["out", "(1, 4)", "(4,)"]),
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4), ["out", "float64", "float32"]),
    ],
    ids=["shape", "one-more-dimension", "dtype"],
)
def test_outputs_that_cannot_be_compared_raise(fused: Tensor, eager: Tensor, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match="must be like eager") as caught:
        measure("out", fused, eager, torch.zeros(4, dtype=torch.float64), 1)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_empty_outputs_keep_the_rule() -> None:
    empty = torch.zeros(0, 3)
    assert measure("x", empty, empty, empty.double(), 1).kept


def test_pooling_takes_the_largest_of_each_over_all_draws() -> None:
    pooled = Budget.pooled([Budget("x", 1.0, 0.0, 0.1), Budget("x", 0.5, 0.6, 0.0)])
    assert (pooled.error, pooled.eager_error, pooled.tiny) == (1.0, 0.6, 0.1)
    assert pooled.kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_nudge_moves_every_number_by_a_few_units_in_the_last_place(dtype: torch.dtype) -> None:
    case = channel_modulation_case(dtype, beta=False)
    nudged, again, other = case.nudged(1), case.nudged(1), case.nudged(2)
    assert nudged.arguments["beta"] is None
    for name, value in case.arguments.items():
        if value is None:
            continue
        moved, same, different = (found.arguments[name] for found in (nudged, again, other))
        assert moved is not None
        assert same is not None
        assert moved.dtype == dtype
        assert torch.equal(moved, same)
        assert different is not None
        assert not torch.equal(moved, different)
        relative = ((moved.double() - value.double()) / value.double()).abs()
        assert float(relative.max()) <= 5 * torch.finfo(dtype).eps
        assert float((relative > 0).double().mean()) > 0.5


def test_luck_of_one_number_breaks_no_rule_and_an_error_of_all_roundings_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budgets = {"lucky eager": Budget("x", 1.0, 0.1, 0.0), "usual": Budget("x", 0.5, 0.8, 0.0)}
    monkeypatch.setattr(Case, "nudged", lambda case, seed: dataclasses.replace(case, label="usual"))
    monkeypatch.setattr(equivalence, "judge_case", lambda case, *others: [budgets[case.label]])

    def make(seed: int) -> Case:
        return Case("window_attention", {}, {}, 1, "lucky eager")

    (budget,) = judge(make, "cpp", draws=2)
    assert budget.kept
    assert (budget.error, budget.eager_error) == (1.0, 0.8)
    budgets["usual"] = Budget("x", 0.9, 0.1, 0.0)
    (budget,) = judge(make, "cpp", draws=2)
    assert not budget.kept


def test_a_seed_gives_the_same_case_and_another_seed_another() -> None:
    first, again, other = (gaussian_posterior_case(torch.float32, seed=seed).arguments["mu"] for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_verification_covers_outputs_and_gradients() -> None:
    names = set(gaussian_posterior_case(torch.float32, channels=3, height=4, width=4).run("eager"))
    outputs = {"sample", "kl", "severity", "variance", "variance_mean", "variance_var"}
    assert names == outputs | {"d mu", "d logvar", "d eps"}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_quick_verification_has_every_trait_of_the_full_one(op: Op) -> None:
    traits = []
    for cases in (op.quick_cases, op.full_cases):
        found: set[tuple[object, ...]] = set()
        for settings in cases:
            case = op.case(torch.float32, **settings)
            found.update((name, value is None) for name, value in case.arguments.items())
            found.update((name, value) for name, value in case.options.items())
            if "severity" in case.arguments:
                found.add((case.label,))  # window, shift, head dimension
        traits.append(found)
    assert traits[0] == traits[1]
    assert traits[0]


# Devices and dtypes


@pytest.mark.parametrize("op", CASES)
def test_a_case_runs_on_the_device_it_is_told_and_answers_on_the_cpu(op: str) -> None:
    case = CASES[op](0)
    expected, found = case.run("eager"), case.run("eager", device="cpu")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    away = case.run("eager", torch.float64, torch.device("cpu"))
    assert all(value.dtype == torch.float64 and value.device.type == "cpu" for value in away.values())


def test_arguments_go_to_the_device_and_the_reference_stays_on_the_cpu(use_as_op: UseAsOp) -> None:
    seen: list[tuple[str, torch.dtype, str]] = []

    def op(value: Tensor, kernels: KernelSettings) -> Tensor:
        seen.append((value.device.type, value.dtype, str(kernels.channel_modulation)))
        return value * 2

    use_as_op("channel_modulation", op)
    case = Case("channel_modulation", {"value": torch.ones(3)}, {}, 1)
    with pytest.raises(NotImplementedError, match="meta"):  # whose tensors have no numbers to bring back
        case.run("eager", device="meta")
    assert seen == [("meta", torch.float32, "eager")]
    seen.clear()
    equivalence.judge_case(case, "cpp", "cpu")
    assert seen == [
        ("cpu", torch.float32, "cpp"),
        ("cpu", torch.float32, "eager"),
        ("cpu", torch.float64, "eager"),
    ]


def test_only_the_op_of_the_case_is_asked_of_the_backend(use_as_op: UseAsOp) -> None:
    settings: list[KernelSettings] = []

    def op(*args: object, kernels: KernelSettings, **options: object) -> Tensor:
        settings.append(kernels)
        return torch.zeros(2, requires_grad=True)

    for name in OPS:
        use_as_op(name, op)
        for backend in OPS[name].backends:  # no other op needs to have it
            Case(name, {"x": torch.zeros(2)}, {}, 1).run(backend)
            others = {getattr(settings[-1], other) for other in OPS if other != name}
            assert getattr(settings[-1], name) == backend
            assert others == {"eager"}


@pytest.mark.skipif(EXTENSION_UNAVAILABLE is not None, reason=str(EXTENSION_UNAVAILABLE))
def test_judging_on_a_named_device_gives_the_budgets_of_judging_there_anyway() -> None:
    make = CASES["window_attention"]
    assert judge(make, "cpp", draws=2, device="cpu") == judge(make, "cpp", draws=2)


@pytest.mark.parametrize("op", OPS)
def test_verifying_takes_the_device_and_the_dtypes_of_the_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, object]] = []

    def judged(make: Callable[[int], Case], backend: str, draws: int = 8, device: object = None) -> list[Budget]:
        (features, *_) = make(0).arguments.values()
        assert features is not None
        asked.append((backend, str(features.dtype).removeprefix("torch."), device))
        return [Budget("good", 0.5, 1.0, 0.0), Budget("worst", 1.0, 1.0, 0.0)]

    monkeypatch.setattr(equivalence, "judge", judged)
    for backend in OPS[op].backends:
        asked.clear()
        verdicts = list(equivalence.verify(op, backend))
        assert {verdict.case.op for verdict in verdicts} == {op}
        assert {verdict.worst.name for verdict in verdicts} == {"worst"}
        assert len(verdicts) >= 2 * len(FUSED[backend].dtypes)
        assert list(dict.fromkeys(asked)) == [(backend, name, FUSED[backend].device) for name in FUSED[backend].dtypes]


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.interpreter_cases])
def test_the_interpreter_is_tried_on_fewer_cases_and_no_bfloat16(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "judge", lambda *args, **options: [Budget("out", 0.0, 0.0, 0.0)])
    on_a_gpu = len(list(equivalence.verify(op, "triton")))
    monkeypatch.setattr(equivalence, "INTERPRETED", True)
    verdicts = list(equivalence.verify(op, "triton"))
    assert {verdict.dtype for verdict in verdicts} == {torch.float32, torch.float16}
    assert 2 <= len(verdicts) < on_a_gpu
    assert {verdict.case.op for verdict in verdicts} == {op}
