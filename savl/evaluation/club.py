"""CLUB: an upper bound on the mutual information of two variables, from samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from savl.evaluation.held_out import CrossFit, Split, check_settings, repeat_on_splits
from savl.evaluation.intervals import Interval
from savl.evaluation.perceptron import perceptron
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
    """Contrastive log-ratio upper bound, in nats (Cheng et al., ICML 2020).

    ``I(x; y) ≤ E_P[log q(y|x)] − E_P⊗P[log q(y|x)]``, P the joint distribution and P⊗P the product of its marginals: q
    is a Gaussian with independent dimensions, its mean and its log-variance (through tanh, hence in [-1, 1]) each a
    perceptron with one hidden layer, fitted by maximum likelihood. The second expectation is over all pairs of
    different samples, so nothing is drawn for it.

    It bounds from above as far as q is right: for y = ρx + noise, Gaussian and standardised, the right q gives
    ρ²/(1 − ρ²) per dimension against −½·log(1 − ρ²). The variance of q cannot fall below 1/e, so a dimension gives at
    most about e = 2.7 nats. From too few samples q learns little, and the value falls towards 0: for 64 such columns
    with ρ = 0.6 (14.3 nats, 36 by the right q) 1,000 samples give 28, and 300 give about 9, which bounds nothing.

    What is reported was measured on samples that q was neither fitted nor chosen on: 70 % of the samples are for
    fitting, and the other 30 % are two halves, q chosen by its likelihood on one and measured on the other, both ways
    round (`savl.evaluation.held_out`). Columns are standardised by the samples that are fitted on.

    Args:
        x: ``(n, d)`` numbers, ``(n,)`` floating numbers, or ``(n,)`` labels (whole numbers, booleans, strings), which
            become one-hot codes; n at least 20.
        y: Likewise, row for row. The roles differ: q predicts y from x. Of one-hot codes every column counts, so for
            labels the bound is far from tight.
        groups: ``(n,)`` labels of samples that belong together, photographs say, at least 4 different ones: each is
            held out as a whole. Without them, samples that are alike for another reason (levels of one crop) would be
            on both sides, and a network that knows them by heart would pass for information.
        steps: Of Adam, at most: fitting ends when neither half has seen a better q in 200 steps.
        batch: Samples a step, fewer if there are not as many.
        repeats: How often split and network are drawn anew.
        seed: Of all draws; torch's own generators are left alone.
        width: Of the hidden layers.
        rate: Adam's learning rate.

    Returns:
        Mean and interval over repeats, widened because they share samples.

    Raises:
        ValueError: Samples that are not finite numbers or labels, too few of them or of groups, not as many of x as of
            y, or a setting out of range.
        AnalysisUnavailable: scipy is not installed, and there are several repeats.
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
    """q(y|x)."""

    def __init__(self, inputs: int, width: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mean = perceptron((inputs, width, outputs), generator)
        self.log_variance = nn.Sequential(perceptron((inputs, width, outputs), generator), nn.Tanh())

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the samples of log q(y|x), without its constant −½·d·log 2π: a scalar."""
        mean, log_variance = self.mean(x), self.log_variance(x)
        return gaussian_log_likelihood(mean, log_variance, y).mean()

    def contrast(self, x: Tensor, y: Tensor) -> float:
        """`contrast` of this q."""
        return contrast(self.mean(x), self.log_variance(x), y)


def gaussian_log_likelihood(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """log q(y|x) without its constant −½·d·log 2π: three of ``(n, d)`` → ``(n,)``."""
    return -0.5 * (log_variance + (y - mean).square() * (-log_variance).exp()).sum(dim=1)


def contrast(mean: Tensor, log_variance: Tensor, y: Tensor) -> float:
    """E_P[log q(y|x)] − E_P⊗P[log q(y|x)] for a Gaussian q, the second over all pairs of different samples.

    Everything in log q but the squared distance to the mean cancels, and the mean over all j of ``(y_j − mean_i)²`` is
    the variance of y plus ``(mean of y − mean_i)²``: no pair is visited.

    Args:
        mean: ``(n, d)`` floating: row i is the mean of q(y|x_i); n at least 2.
        log_variance: ``(n, d)`` floating, likewise.
        y: ``(n, d)`` floating.
    """
    mean, log_variance, y = mean.double(), log_variance.double(), y.double()
    own = (y - mean).square()
    all_pairs = y.var(dim=0, correction=0) + (y.mean(dim=0) - mean).square()
    others = (all_pairs * len(y) - own) / (len(y) - 1)
    return ((others - own) * (-log_variance).exp() / 2).sum(dim=1).mean().item()
