"""Choose on one half and measure on the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from savl.evaluation import Interval, club, held_out, mine
from savl.evaluation.held_out import CrossFit, Split, split_samples


class Counter(nn.Module):
    """A network whose only weight is the number of steps that it has been fitted for."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))


HALVES = (torch.tensor([0]), torch.tensor([1]))


def fitted(table: Tensor, steps: int) -> tuple[float, Counter]:
    """Fit against a table ``(2, evaluations)`` of the score of each half at each evaluation."""
    net = Counter()

    def score(net: Counter, rows: Tensor) -> float:
        return table[rows.item(), round(net.steps.item() / held_out.CHECK_EVERY)].item()

    fit = CrossFit[Counter](
        loss=lambda net, rows: -net.steps, score=score, measure=score, steps=steps, batch=2, rate=1.0
    )
    return fit(net, Split(torch.arange(2, 5), HALVES), torch.Generator()), net


def test_the_best_step_of_one_half_is_measured_on_the_other_half() -> None:
    table = torch.tensor([[0.0, 9.0, 2.0, 3.0], [0.5, 1.5, 7.0, 4.0]])
    value, _ = fitted(table, 60)
    assert value == (1.5 + 2.0) / 2


def test_choosing_by_noisy_scores_does_not_bias_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "CHECK_EVERY", 2)
    values = [fitted(torch.randn(2, 11), 20)[0] for _ in range(60)]
    assert abs(torch.tensor(values).mean()) < 4 / (2 * 60) ** 0.5


def test_fitting_ends_when_neither_half_has_improved_for_200_steps() -> None:
    table = torch.zeros(2, 100)
    table[0, 3] = 1.0
    table[1, 5] = 1.0
    _, net = fitted(table, 1900)
    assert round(net.steps.item()) == (5 + 10) * 20


def test_samples_to_fit_on_and_both_halves_are_all_samples_once() -> None:
    split = split_samples(101, torch.Generator().manual_seed(1))
    assert [len(rows) for rows in (split.fit, *split.halves)] == [71, 15, 15]
    assert torch.cat((split.fit, *split.halves)).sort().values.tolist() == list(range(101))
    assert split.fit.tolist() != sorted(split.fit.tolist())


def test_no_group_is_in_two_parts_and_rows_are_shuffled() -> None:
    groups = torch.arange(10).repeat_interleave(4)
    split = split_samples(40, torch.Generator().manual_seed(1), groups)
    parts = [set(groups[rows].tolist()) for rows in (split.fit, *split.halves)]
    assert [len(part) for part in parts] == [7, 2, 1]
    assert set.union(*parts) == set(range(10))
    assert torch.cat((split.fit, *split.halves)).sort().values.tolist() == list(range(40))
    assert groups[split.fit].tolist() != sorted(groups[split.fit].tolist())


def test_of_four_groups_two_are_fitted_on() -> None:
    split = split_samples(8, torch.Generator().manual_seed(1), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    assert [len(rows) for rows in (split.fit, *split.halves)] == [4, 2, 2]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0] * 30 + [1] * 5 + [2] * 5, "groups must be at least 4, got 3"),
        ([0] * 10, "x and groups must have as many samples as each other, got 40 and 10"),
        ([0] * 37 + [1, 2, 3], "groups must be larger or more: a half that was held out has 1 sample"),
    ],
)
def test_groups_that_cannot_be_held_out_are_refused(groups: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        club(torch.randn(40, 2), torch.randn(40, 2), groups=groups, steps=1, width=4)


@pytest.mark.parametrize(
    "estimate",
    [partial(mine, steps=400, width=32, rate=2e-3, repeats=2), partial(club, steps=300, width=64, repeats=2)],
)
def test_similarity_within_groups_does_not_count_as_information(estimate: Callable[..., Interval]) -> None:
    """Each of 40 groups has a random code and an independent content; codes of a group can be memorised."""
    groups = torch.arange(40).repeat_interleave(6)
    x = torch.randn(40, 6)[groups] + 0.05 * torch.randn(240, 6)
    y = torch.randn(40, 3)[groups]
    assert estimate(x, y).value > 1, "there is nothing to be misled by"
    assert estimate(x, y, groups=groups).value < 0.2
    assert estimate(y + 0.3 * torch.randn(240, 3), y, groups=groups).value > 0.5


def test_batches_are_rows_to_fit_on_without_repetition() -> None:
    seen: list[list[int]] = []

    def loss(net: Counter, rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return net.steps

    fit = CrossFit[Counter](loss, lambda net, rows: 0.0, lambda net, rows: 0.0, steps=50, batch=4, rate=0.1)
    fit(Counter(), Split(torch.arange(10, 16), HALVES), torch.Generator())
    assert all(len(set(batch)) == 4 and set(batch) <= set(range(10, 16)) for batch in seen)
    assert {row for batch in seen for row in batch} == set(range(10, 16))


def test_the_result_is_a_number_even_where_no_step_is_better_than_none() -> None:
    value, _ = fitted(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), 20)
    assert value == pytest.approx(1.5)
