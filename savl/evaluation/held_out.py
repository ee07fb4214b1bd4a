"""Fit a network on some samples and measure on others, stopping where it should without being misled by noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from savl.evaluation.intervals import Interval
from savl.evaluation.samples import Samples, as_labels, as_variable, check_lengths, standardise

Net = TypeVar("Net", bound=nn.Module)

HELD_OUT = 0.3
"""Share of the samples that is not fitted on: two halves."""
FEWEST = 20
"""Samples; of fewer, a half would be too small to compare pairs in."""
FEWEST_GROUPS = 4
"""Of groups there must be two to fit on, and one in each half."""
CHECK_EVERY = 20
"""Steps from one look at the held-out halves to the next."""
PATIENCE = 10
"""Looks without a better one on either half before fitting ends."""


@dataclass(frozen=True)
class Split:
    """Rows of the samples, each int64, in random order."""

    fit: Tensor
    """``(n − h,)``"""
    halves: tuple[Tensor, Tensor]
    """``(⌈h/2⌉,)`` and ``(⌊h/2⌋,)``, h = 0.3·n rounded; of groups, that share of the groups."""


@dataclass(frozen=True)
class CrossFit(Generic[Net]):
    """How a network is fitted, and what is read off it.

    A few hundred samples are soon learned by heart, so when to stop matters; and it may be judged on neither the
    samples that are fitted nor those that are measured, since the best of many noisy values is too good. So there are
    two held-out halves, and each is used twice: the network that scores best on one half is measured on the other, and
    the other way round. Neither value has seen what it was chosen by; their mean is the result.
    """

    loss: Callable[[Net, Tensor], Tensor]
    """Of a batch ``(b,)`` of rows to fit on, to be lowered."""
    score: Callable[[Net, Tensor], float]
    """Of a half ``(m,)``, higher is better: says when to stop."""
    measure: Callable[[Net, Tensor], float]
    """Of a half ``(m,)``: the result."""
    steps: int
    """At most."""
    batch: int
    rate: float
    """Adam's learning rate."""

    def __call__(self, net: Net, split: Split, generator: torch.Generator) -> float:
        """Fit the network, which is changed, and measure it.

        Args:
            net: With the weights to begin from, which are a candidate themselves.
            split: The rows.
            generator: Draws the batches.
        """
        optimizer = torch.optim.Adam(net.parameters(), self.rate, fused=True)
        kept, best, stale = [net, net], [-math.inf, -math.inf], 0
        for step in range(self.steps + 1):
            if step % CHECK_EVERY == 0 or step == self.steps:
                stale += 1
                for half, rows in enumerate(split.halves):
                    with torch.no_grad():
                        score = self.score(net, rows)
                    if score > best[half]:
                        kept[half], best[half], stale = copy.deepcopy(net), score, 0
                if stale >= PATIENCE:
                    break
            batch = split.fit[torch.randperm(len(split.fit), generator=generator)[: self.batch]]
            optimizer.zero_grad()
            self.loss(net, batch).backward()
            optimizer.step()
        with torch.no_grad():
            values = [self.measure(kept[half], split.halves[1 - half]) for half in range(2)]
        return math.fsum(values) / 2


def repeat_on_splits(
    x: Samples,
    y: Samples,
    estimate: Callable[[Tensor, Tensor, Split, torch.Generator], float],
    *,
    groups: Samples | None,
    repeats: int,
    seed: int,
) -> Interval:
    """Average an estimate over random splits of paired samples.

    Args:
        x: As `as_variable` takes them.
        y: Likewise, row for row.
        groups: ``(n,)`` labels: a group is held out as a whole. None where samples are independent of each other.
        estimate: Gets x and y ``(n, d)`` float32, standardised by the rows to fit on, the split, and a generator.
        repeats: How many splits.
        seed: Of all draws.

    Raises:
        ValueError: Samples that `as_variable` refuses, fewer than `FEWEST`, not as many of x as of y, fewer groups than
            `FEWEST_GROUPS`, or no repeats.
    """
    first, second = as_variable(x, "x"), as_variable(y, "y")
    check_lengths(("x", len(first)), ("y", len(second)))
    if len(first) < FEWEST:
        raise ValueError(f"x and y must have at least {FEWEST} samples, got {len(first)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    members = None
    if groups is not None:
        members, names = as_labels(groups, "groups")
        check_lengths(("x", len(first)), ("groups", len(members)))
        if len(names) < FEWEST_GROUPS:
            raise ValueError(f"groups must be at least {FEWEST_GROUPS}, got {len(names)}")
    seeds = torch.randint(2**62, (repeats,), generator=torch.Generator().manual_seed(seed)).tolist()
    values = []
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        for each in seeds:
            generator = torch.Generator().manual_seed(each)
            split = split_samples(len(first), generator, members)
            if (least := min(map(len, split.halves))) < 2:
                raise ValueError(f"groups must be larger or more: a half that was held out has {least} sample")
            values.append(estimate(standardise(first, split.fit), standardise(second, split.fit), split, generator))
    return Interval.of(values, held_out=HELD_OUT)


def split_samples(count: int, generator: torch.Generator, groups: Tensor | None = None) -> Split:
    """Draw the rows to fit on and the two held-out halves.

    Args:
        count: Of samples.
        generator: Draws.
        groups: ``(count,)`` int64 from 0, each number in use: which group a sample is of. No group is in two parts.
    """
    units = count if groups is None else int(groups.max()) + 1
    held_out = max(round(HELD_OUT * units), 2)
    order = torch.randperm(units, generator=generator)
    fit, first, second = order.tensor_split((units - held_out, units - held_out // 2))
    if groups is None:
        return Split(fit, (first, second))
    rows = torch.randperm(count, generator=generator)
    fit, first, second = (rows[torch.isin(groups[rows], part)] for part in (fit, first, second))
    return Split(fit, (first, second))


def check_settings(rate: float, least: int = 1, **settings: int) -> None:
    """Refuse what nothing can be fitted with.

    Raises:
        ValueError: A setting below `least`, or a learning rate that is not above 0; it is named.
    """
    for name, given in settings.items():
        if given < least:
            raise ValueError(f"{name} must be at least {least}, got {given}")
    if not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate}")
