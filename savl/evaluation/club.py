"""CLUB: an upper bound on the mutual information of two variables, estimated from samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savl.evaluation.held_out import CrossFit, Split, check_settings, perceptron, repeat_on_splits
from savl.evaluation.intervals import Interval
from savl.evaluation.samples import Samples


def club(
    x: Samples,
    y: Samples,
    *,
    groups: Samples | None = None,
    steps: int = 1000,
    batch: int = 64,
    repeats: int = 3,
    seed: int = 0,
    width: int = 400,
    rate: float = 1e-3,
) -> Interval:
    """Compute the contrastive log-ratio upper bound, in nats (Cheng et al., ICML 2020).

    ``I(x; y) ≤ E_P[log q(y|x)] − E_P⊗P[log q(y|x)]``, where P is the joint distribution and P⊗P the product of its
    marginals. q is a Gaussian with independent dimensions; its mean and its log-variance (through tanh, so in [-1, 1])
    are perceptrons with one hidden layer, fitted by maximum likelihood. The second expectation is over all pairs of
    different samples, so it needs no sampling.

    The value is an upper bound only if q is correct. For y = ρx + noise, Gaussian and standardised, the correct q gives
    ρ²/(1 − ρ²) per dimension, and the information is −½·log(1 − ρ²). The variance of q is at least 1/e, which limits
    the value to about e = 2.7 nats per dimension. With too few samples q learns little and the value falls towards 0:
    for 64 such columns with ρ = 0.6 (14.3 nats of information, 36 by the correct q), 1,000 samples give 28 nats and 300
    samples give about 9, which is no bound at all.

    The value is measured on samples on which q was neither fitted nor selected: q is fitted on 70 % of the samples,
    selected by its likelihood on one half of the others and measured on the other half, and vice versa
    (`savl.evaluation.held_out`). Columns are standardised by the samples that q is fitted on.

    Args:
        x: ``(n, d)`` numbers, ``(n,)`` floating numbers, or ``(n,)`` labels (whole numbers, booleans, strings), which
            become one-hot codes; n at least 20.
        y: Samples paired with those of x. q predicts y from x, so the result is not symmetric. Every column of a
            one-hot code counts, so for labels the bound is far from tight.
        groups: ``(n,)`` labels of samples that belong together, such as crops of one photograph; at least 4 different
            ones. Each group is held out as a whole. Without groups, similar samples (one crop at several levels) would
            be on both sides of the split, and memorised samples would count as information.
        steps: Largest number of steps; fitting ends if q has not improved on either half for 200 steps.
        batch: Batch size; fewer samples if there are not as many.
        repeats: Number of repeats, each with a new split and a new network.
        seed: Seed of all random draws; torch's global generators are not used.
        width: Width of the hidden layers.
        rate: Learning rate of Adam.

    Returns:
        Mean and interval over the repeats; the interval is widened because the repeats share samples.

    Raises:
        ValueError: The samples are not finite numbers or labels, there are too few samples or groups, x and y have
            different lengths, or a setting is out of range.
        AnalysisUnavailable: scipy is not installed and there are several repeats.
    """
    check_settings(rate, steps=steps, batch=batch, width=width)

    def estimate(x: Tensor, y: Tensor, split: Split, generator: torch.Generator) -> float:
        fitted = CrossFit[_Conditional](
            loss=lambda q, rows: -q.log_likelihood(x[rows], y[rows]),
            score=lambda q, rows: q.log_likelihood(x[rows], y[rows]).item(),
            measure=lambda q, rows: q.contrast(x[rows], y[rows]),
            steps=steps,
            batch=batch,
            rate=rate,
        )
        return fitted(_Conditional(x.shape[1], width, y.shape[1], generator), split, generator)

    return repeat_on_splits(x, y, estimate, groups=groups, repeats=repeats, seed=seed)


class _Conditional(nn.Module):
    """The conditional distribution q(y|x)."""

    def __init__(self, inputs: int, width: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mean = perceptron((inputs, width, outputs), generator)
        self.log_variance = nn.Sequential(perceptron((inputs, width, outputs), generator), nn.Tanh())

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean of log q(y|x) over the samples without its constant −½·d·log 2π, a scalar."""
        mean, log_variance = self.mean(x), self.log_variance(x)
        return gaussian_log_likelihood(mean, log_variance, y).mean()

    def contrast(self, x: Tensor, y: Tensor) -> float:
        """Return `contrast` of this q."""
        return contrast(self.mean(x), self.log_variance(x), y)


def gaussian_log_likelihood(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """Return log q(y|x) without its constant −½·d·log 2π: three tensors ``(n, d)`` → ``(n,)``."""
    return -0.5 * (log_variance + (y - mean).square() * (-log_variance).exp()).sum(dim=1)


def contrast(mean: Tensor, log_variance: Tensor, y: Tensor) -> float:
    """Return E_P[log q(y|x)] − E_P⊗P[log q(y|x)] for a Gaussian q, the second over all pairs of different samples.

    All terms of log q except the squared distance to the mean cancel. The mean over all j of ``(y_j − mean_i)²`` is the
    variance of y plus ``(mean of y − mean_i)²``, so the pairs need not be enumerated.

    Args:
        mean: ``(n, d)`` floating: row i is the mean of q(y|x_i); n at least 2.
        log_variance: ``(n, d)`` floating: row i is the log-variance of q(y|x_i).
        y: ``(n, d)`` floating.
    """
    mean, log_variance, y = mean.double(), log_variance.double(), y.double()
    own = (y - mean).square()
    all_pairs = y.var(dim=0, correction=0) + (y.mean(dim=0) - mean).square()
    others = (all_pairs * len(y) - own) / (len(y) - 1)
    return ((others - own) * (-log_variance).exp() / 2).sum(dim=1).mean().item()
