"""Fit small networks on some samples and measure on others, with early stopping that does not bias the measurement."""

from __future__ import annotations

import copy
import itertools
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
"""Share of the samples that is held out of fitting, in two halves."""
FEWEST = 20
"""Smallest number of samples; with fewer, a half would be too small to form pairs."""
FEWEST_GROUPS = 4
"""Smallest number of groups: two to fit on and one in each half."""
CHECK_EVERY = 20
"""Steps between evaluations of the held-out halves."""
PATIENCE = 10
"""Number of evaluations without improvement on either half after which fitting ends."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the samples, int64, in random order."""

    fit: Tensor
    """``(n − h,)`` rows to fit on."""
    halves: tuple[Tensor, Tensor]
    """``(⌈h/2⌉,)`` and ``(⌊h/2⌋,)`` held-out rows, h = 0.3·n rounded; with groups, 30 % of the groups."""


@dataclass(frozen=True)
class CrossFit(Generic[Net]):
    """Fit a network with early stopping and measure it on samples that played no part in fitting or stopping.

    A network soon memorises a few hundred samples, so fitting must stop in time. The stopping point may be chosen
    neither on the samples that are fitted nor on those that are measured, because the best of many noisy values is
    biased upwards. Therefore the network that scores best on one held-out half is measured on the other half, and vice
    versa; the result is the mean of the two.
    """

    loss: Callable[[Net, Tensor], Tensor]
    """Loss of the network on a batch ``(b,)`` of rows."""
    score: Callable[[Net, Tensor], float]
    """Score of the network on a half ``(m,)``; the step with the highest score is kept."""
    measure: Callable[[Net, Tensor], float]
    """The quantity of interest, on a half ``(m,)``."""
    steps: int
    """Largest number of steps."""
    batch: int
    """Batch size; fewer rows if there are not as many."""
    rate: float
    """Learning rate of Adam."""

    def __call__(self, net: Net, split: Split, generator: torch.Generator) -> float:
        """Fit the network, which is changed, and measure it.

        Args:
            net: The network with its initial weights, which are a candidate too.
            split: Rows to fit on and held-out rows.
            generator: Generator of the batches.
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
        x: Samples as `as_variable` accepts them.
        y: Samples paired with those of x.
        groups: ``(n,)`` labels; a group is held out as a whole. None if the samples are independent.
        estimate: Called with x and y ``(n, d)`` float32, standardised by the rows to fit on, the split and a
            generator.
        repeats: Number of splits.
        seed: Seed of all random draws.

    Raises:
        ValueError: `as_variable` refuses the samples, there are fewer than `FEWEST`, x and y have different lengths,
            there are fewer groups than `FEWEST_GROUPS`, or `repeats` is below 1.
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
    with torch.inference_mode(False), torch.enable_grad():  # the caller may have disabled gradients
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
        count: Number of samples.
        generator: Generator of the draws.
        groups: ``(count,)`` int64: group of each sample, numbered from 0 without gaps. No group is in two parts.
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
    """Check settings of a fit.

    Raises:
        ValueError: A setting is below `least`, or the learning rate is not above 0; the message names it.
    """
    for name, given in settings.items():
        if given < least:
            raise ValueError(f"{name} must be at least {least}, got {given}")
    if not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate}")


def perceptron(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Return linear layers with ReLU between them, float32, on the CPU, independent of torch's global generator.

    Args:
        widths: Widths of the input, the hidden layers and the output.
        generator: Generator of weights and biases, uniform within ±1/√inputs as in `nn.Linear`.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
