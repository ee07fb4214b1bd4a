"""The moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AveragedWeights(AveragedModel):
    """torch's averaged model, whose update waits for no GPU.

    torch's own copies the number of models that were averaged, which lies on the CPU, to the weights' device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with a copy of the model.

        Args:
            model: Its weights share a device and a dtype.
            decay: Share of the average that an update keeps, 0 ≤ decay ≤ 1.
        """
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of the model; the first ones as they are. Buffers are copied.

        Args:
            model: Of the kind that the average began with, on the same device.
        """
        ours, theirs = list(self.module.parameters()), [weight.detach() for weight in model.parameters()]
        if self.n_averaged == 0:  # on the CPU, whatever the device of the weights
            for average, weight in zip(ours, theirs, strict=True):
                average.copy_(weight)
        else:
            assert self.multi_avg_fn is not None
            self.multi_avg_fn([average.detach() for average in ours], theirs, self.n_averaged)
        for kept, given in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(given)
        self.n_averaged += 1
