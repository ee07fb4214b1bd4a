"""The network's passes forward and backward as CUDA graphs, for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from savl.network import SAVL, DegradationField

Reconstruct = Callable[[Tensor, DegradationField | None], Tensor]


class _Reconstruction(nn.Module):
    """`SAVL.reconstruct` as a module of tensors, which is what torch records."""

    def __init__(self, model: SAVL) -> None:
        super().__init__()
        self.model = model  # whose weights these are
        self.reconstruct = model.reconstruct

    def forward(self, lr: Tensor, mu: Tensor | None = None, severity: Tensor | None = None) -> Tensor:
        return self.reconstruct(lr, None if mu is None else DegradationField(mu=mu, severity=severity))


def graphed_reconstruct(model: SAVL, lr: Tensor) -> Reconstruct:
    """Record how a network upscales a batch, and what the backward pass makes of it.

    A replay launches all kernels of a pass at once. It reads weights where they lie, so that an optimizer may change
    them in place. Nothing else may use the GPU from this process while it is recorded.

    Args:
        model: On a GPU, in training mode.
        lr: ``(B, 3, h, w)`` as all batches will be. Autocast must be as it will be, its cache switched off: a graph
            holds no weights that were cast before it.

    Returns:
        What takes the place of ``model.reconstruct`` for batches of that size; it raises ValueError for others. The
        next call overwrites what a call returned.

    Raises:
        RuntimeError: The passes do what a graph cannot hold, such as waiting for the GPU.
    """
    given = _tensors(lr, model.estimate(lr, seed=0))
    shapes = [tuple(each.shape) for each in given]
    samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in given)
    run = torch.cuda.make_graphed_callables(_Reconstruction(model), samples, allow_unused_input=True)

    def reconstruct(lr: Tensor, field: DegradationField | None) -> Tensor:
        tensors = _tensors(lr, field)
        if [tuple(each.shape) for each in tensors] != shapes:  # a replay would stretch them to fit
            came = tuple(tensors[0].shape)
            raise ValueError(
                f"run.graph: passes were recorded for batches of {shapes[0]} (data.batch, data.patch), got {came}"
            )
        return cast(Tensor, run(*tensors))

    return reconstruct


def _tensors(lr: Tensor, field: DegradationField | None) -> tuple[Tensor, ...]:
    known = () if field is None else (field.mu, field.severity)
    return lr, *(each for each in known if each is not None)
