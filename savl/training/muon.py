"""Muon: Adam, but for the matrices inside the network, whose momentum is made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from savl.network import SAVL

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of X → a·X + (b·XXᵀ + c·(XXᵀ)²)·X (Jordan et al., 2024), which takes every singular value to
about 1, between 0.68 and 1.2, within five rounds if it was between 0.002 and 1."""
ROUNDS = 5
ADAM_RMS = 0.2
"""Root mean square of the elements of Adam's updates at a rate of 1, about: with updates scaled to it both kinds of
weights share a learning rate (Liu et al., 2025)."""


class HiddenMatrix(NamedTuple):
    """A weight that maps features to features, and how many such maps it holds, one below the other."""

    weight: Tensor
    maps: int


def hidden_matrices(model: SAVL) -> list[HiddenMatrix]:
    """The matrices of a network that are neither first nor last.

    Args:
        model: Whose groups, and the convolution after them, are looked through.

    Returns:
        Weights of linear layers, ``(out, in)``, and of convolutions, ``(out, in, k, k)``, that are trained. A
        projection to q, k and v is three maps, one to gamma and beta two. Estimator, first convolution and upsampler
        are not among them.
    """
    channels = model.config.channels
    found: list[HiddenMatrix] = []
    for part in (model.groups, model.conv_last):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad:
                joined = name.endswith(("qkv", "guidance.project"))
                found.append(HiddenMatrix(module.weight, module.weight.shape[0] // channels if joined else 1))
    return found


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthogonal rows or columns, about.

    Args:
        matrices: ``(n, rows, columns)`` floating.

    Returns:
        U·Vᵀ of the singular value decomposition U·S·Vᵀ of each, but with singular values between 0.68 and 1.2; those
        that were below 0.002 of the matrix's Frobenius norm are smaller. Zeros stay zeros, and a norm that is not far
        above 1e-7 gives less. Same shape and dtype.
    """
    a, b, c = NEWTON_SCHULZ
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if upright else matrices  # the product of the shorter side with itself is the smaller one
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if upright else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for the matrices inside a network, and Adam for all other weights.

    A gradient's few large singular values drown the many small ones; an orthogonal update moves a matrix along all of
    them alike (Jordan et al., 2024).
    """

    found_inf: Tensor | None = None
    """As for torch's fused Adam: where it is 1, ``()`` float32 on the weights' device, a step changes nothing."""

    def __init__(
        self,
        matrices: Iterable[HiddenMatrix],
        others: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        momentum: float,
        fused: bool | None = None,
    ) -> None:
        """Set up.

        Args:
            matrices: Weights that get the orthogonal update, their momentum with Nesterov's look ahead.
            others: Weights that get Adam's, at least one.
            lr: Learning rate of both; an orthogonal update has the root mean square of Adam's.
            betas: Adam's moment decays.
            momentum: Share of the momentum that a step keeps, in [0, 1).
            fused: Passed on to torch's Adam.
        """
        matrices = list(matrices)
        self._adam = torch.optim.Adam(others, lr=lr, betas=betas, fused=fused)
        groups: list[dict[str, Any]] = [{**group, "maps": 0} for group in self._adam.param_groups]
        for maps in sorted({each.maps for each in matrices}):
            groups.append({"params": [each.weight for each in matrices if each.maps == maps], "maps": maps})
        super().__init__(groups, {"lr": lr, "momentum": momentum, "fused": fused})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients; those without one stay as they are."""
        # Loading a state replaces both.
        self._adam.param_groups = [group for group in self.param_groups if group["maps"] == 0]
        self._adam.state = self.state
        self._adam.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adam.step()
        for group in self.param_groups:
            if group["maps"] > 0:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault(tuple(weight.shape), []).append(weight)
        for weights in alike.values():
            momenta = [self._momentum(weight) for weight in weights]
            gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            kept, before = torch.stack(momenta), torch.stack(weights)
            momentum = kept.lerp(gradients, 1.0 - group["momentum"])
            ahead = gradients.lerp(momentum, group["momentum"])
            after = before - group["lr"] * _as_large_as_adams(ahead, group["maps"])
            if self.found_inf is not None:
                momentum = torch.where(self.found_inf > 0, kept, momentum)
                after = torch.where(self.found_inf > 0, before, after)
            torch._foreach_copy_(momenta, list(momentum))
            torch._foreach_copy_(weights, list(after))

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        return momentum


def _as_large_as_adams(directions: Tensor, maps: int) -> Tensor:
    """Orthogonal updates of weights ``(n, out, in, …)`` that hold so many maps each, as large as Adam's."""
    flat = directions.flatten(2)
    flat = flat.reshape(-1, flat.shape[1] // maps, flat.shape[2])
    # An orthogonal matrix has a root mean square of one over the square root of its longer side.
    return (ADAM_RMS * math.sqrt(max(flat.shape[1:])) * orthogonalise(flat)).reshape(directions.shape)
