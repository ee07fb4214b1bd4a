"""Optimizers of a run, Adam and Muon, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from savl.network import SAVL
from savl.training.objective_config import OptimizerConfig
from savl.training.objectives import Objective

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of X → a·X + (b·XXᵀ + c·(XXᵀ)²)·X (Jordan et al., 2024), which maps singular values between
0.002 and 1 to values between 0.68 and 1.2 within five iterations."""
ITERATIONS = 5
ADAM_RMS = 0.2
"""Approximate root mean square of Adam's updates at a learning rate of 1. Updates of Muon are scaled to it, so that
both share a learning rate (Liu et al., 2025)."""


def build_optimizer(objective: Objective, settings: OptimizerConfig, fused: bool) -> torch.optim.Adam | Muon:
    """Build the optimizer of all weights of an objective that are trained.

    Args:
        objective: Objective with network, estimator and decoder.
        settings: Method and learning rates.
        fused: Whether to use torch's fused Adam, which can skip a step on the GPU by its attribute ``found_inf``.

    Returns:
        An optimizer that holds every trained weight once.
    """
    trained = [weight for weight in objective.parameters() if weight.requires_grad]
    fused_or_default = True if fused else None
    if settings.method == "adam":
        return torch.optim.Adam(trained, lr=settings.learning_rate, betas=settings.betas, fused=fused_or_default)
    matrices = hidden_matrices(objective.model)
    of_muon = {id(each.weight) for each in matrices}
    return Muon(
        matrices,
        [weight for weight in trained if id(weight) not in of_muon],
        lr=settings.learning_rate,
        betas=settings.betas,
        momentum=settings.momentum,
        fused=fused_or_default,
    )


class HiddenMatrix(NamedTuple):
    """A weight that maps features to features, and the number of such maps it holds, stacked along the rows."""

    weight: Tensor
    maps: int


def hidden_matrices(model: SAVL) -> list[HiddenMatrix]:
    """Return the weight matrices of a network between its first convolution and its upsampler.

    Args:
        model: Its groups and the convolution after them are searched.

    Returns:
        Trained weights of linear layers, ``(out, in)``, and of convolutions, ``(out, in, k, k)``. A projection to q, k
        and v consists of three maps, one to gamma and beta of two. The estimator is not included.
    """
    channels = model.config.channels
    found: list[HiddenMatrix] = []
    for part in (model.groups, model.conv_last):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad:
                stacked = name.endswith(("qkv", "guidance.project"))
                found.append(HiddenMatrix(module.weight, module.weight.shape[0] // channels if stacked else 1))
    return found


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return approximately the nearest matrices with orthogonal rows or columns.

    Args:
        matrices: ``(n, rows, columns)`` floating.

    Returns:
        U·Vᵀ of the singular value decomposition U·S·Vᵀ of each matrix, except that singular values lie between 0.68 and
        1.2; those below 0.002 of the matrix's Frobenius norm come out smaller. Zero matrices stay zero, and matrices
        with a norm near 1e-7 come out smaller. Same shape and dtype as the input.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # so that X·Xᵀ is the smaller of the two products
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon for the weight matrices inside a network, and Adam for all other weights.

    Muon updates a matrix by its orthogonalised momentum, which moves it equally along all singular directions. In
    Adam's updates a few large singular values dominate (Jordan et al., 2024). `torch.optim.Muon` is not used, because
    it computes in bfloat16, accepts neither convolutions nor stacked projections, and has no ``found_inf``.
    """

    found_inf: Tensor | None = None
    """``()`` float32 on the device of the weights, as in torch's fused Adam. If it is 1, a step changes nothing."""

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
        """Prepare.

        Args:
            matrices: Weights updated by Muon, with Nesterov momentum.
            others: At least one weight, updated by Adam.
            lr: Learning rate of both; Muon's updates have the root mean square of Adam's.
            betas: Decay rates of Adam's moments.
            momentum: Momentum of Muon, in [0, 1).
            fused: Argument of torch's Adam.
        """
        matrices = list(matrices)
        self._adam = torch.optim.Adam(others, lr=lr, betas=betas, fused=fused)
        groups: list[dict[str, Any]] = [{**group, "maps": 0} for group in self._adam.param_groups]
        for maps in sorted({each.maps for each in matrices}):
            groups.append({"params": [each.weight for each in matrices if each.maps == maps], "maps": maps})
        super().__init__(groups, {"lr": lr, "momentum": momentum, "fused": fused})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients; weights without a gradient stay unchanged."""
        # Set at each step, because load_state_dict replaces both.
        self._adam.param_groups = [group for group in self.param_groups if group["maps"] == 0]
        self._adam.state = self.state
        self._adam.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adam.step()
        for group in self.param_groups:
            if group["maps"] > 0:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape.setdefault(tuple(weight.shape), []).append(weight)
        for weights in by_shape.values():
            momenta = [self._momentum(weight) for weight in weights]
            gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            old_momentum, old_weights = torch.stack(momenta), torch.stack(weights)
            momentum = old_momentum.lerp(gradients, 1.0 - group["momentum"])
            nesterov = gradients.lerp(momentum, group["momentum"])
            new_weights = old_weights - group["lr"] * _scaled_orthogonal(nesterov, group["maps"])
            if self.found_inf is not None:
                momentum = torch.where(self.found_inf > 0, old_momentum, momentum)
                new_weights = torch.where(self.found_inf > 0, old_weights, new_weights)
            torch._foreach_copy_(momenta, list(momentum))
            torch._foreach_copy_(weights, list(new_weights))

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        return momentum


def _scaled_orthogonal(directions: Tensor, maps: int) -> Tensor:
    """Orthogonalise each map of weights ``(n, out, in, …)`` and scale it to the root mean square of Adam's updates."""
    flat = directions.flatten(2)
    flat = flat.reshape(-1, flat.shape[1] // maps, flat.shape[2])
    # The root mean square of an orthogonal matrix is one over the square root of its longer side.
    return (ADAM_RMS * math.sqrt(max(flat.shape[1:])) * orthogonalise(flat)).reshape(directions.shape)


class AveragedWeights(AveragedModel):
    """Exponential moving average of a network's weights, whose update does not synchronize with the GPU.

    The update of torch's `AveragedModel` copies its counter, which is on the CPU, to the device of the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with a copy of the model.

        Args:
            model: Network whose weights share a device and a dtype.
            decay: Weight of the average in each update, 0 ≤ decay ≤ 1.
        """
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the weights of the model; the first update and all buffers are copied.

        Args:
            model: Network of the same structure on the same device.
        """
        averages, weights = list(self.module.parameters()), [weight.detach() for weight in model.parameters()]
        if self.n_averaged == 0:  # on the CPU, wherever the weights are
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
        else:
            assert self.multi_avg_fn is not None
            self.multi_avg_fn([average.detach() for average in averages], weights, self.n_averaged)
        for kept, given in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(given)
        self.n_averaged += 1
