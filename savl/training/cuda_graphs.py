"""The forward and backward passes of the network as CUDA graphs, for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from savl.network import SAVL, DegradationField

Reconstruct = Callable[[Tensor, DegradationField | None], Tensor]


class _Reconstruction(nn.Module):
    """`SAVL.reconstruct` as a module that takes tensors alone, as `torch.cuda.make_graphed_callables` requires."""

    def __init__(self, model: SAVL, names: Sequence[str]) -> None:
        """Keep the names of the field's tensors, which are the arguments after ``lr``; empty for no field."""
        super().__init__()
        self.model = model  # registers its weights
        self.reconstruct = model.reconstruct
        self.names = names

    def forward(self, lr: Tensor, *tensors: Tensor) -> Tensor:
        field = dict(zip(self.names, tensors, strict=True))
        return self.reconstruct(lr, DegradationField(**field) if field else None)


def graphed_reconstruct(model: SAVL, lr: Tensor) -> Reconstruct:
    """Record the forward and backward passes by which a network upscales a batch.

    A replay launches all kernels of a pass at once. It reads the weights at their addresses, so an optimizer may change
    them in place. Nothing else in this process may use the GPU during the recording.

    Args:
        model: Network on a GPU, in training mode.
        lr: ``(B, 3, h, w)``, the shape of all batches. Autocast must be in the state in which the graph will be
            replayed, with its cache disabled, because the graph does not hold weights that were cast before it.

    Returns:
        A replacement for ``model.reconstruct``. It raises ValueError for batches of another shape. Each call overwrites
        the result of the call before.

    Raises:
        RuntimeError: The passes contain an operation that cannot be captured, such as a synchronization.
    """
    used = _tensors(model.estimate(lr, seed=0))
    given = (lr, *used.values())
    shapes = [tuple(each.shape) for each in given]
    samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in given)
    run = torch.cuda.make_graphed_callables(_Reconstruction(model, tuple(used)), samples, allow_unused_input=True)

    def reconstruct(lr: Tensor, field: DegradationField | None) -> Tensor:
        tensors = (lr, *_tensors(field).values())
        if [tuple(each.shape) for each in tensors] != shapes:  # a replay would broadcast them
            raise ValueError(
                f"run.graph: passes were recorded for batches of {shapes[0]} (data.batch, data.patch), "
                f"got {tuple(tensors[0].shape)}"
            )
        return cast(Tensor, run(*tensors))

    return reconstruct


def _tensors(field: DegradationField | None) -> dict[str, Tensor]:
    """Return the tensors of a field that the network reads, by name."""
    names = ("mu", "severity", "strength")
    found = {} if field is None else {name: getattr(field, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
