"""Measure how much memory the features of a network take, without knowing its architecture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from savl.network.upscaling import UpscalingNetwork

SIDE = 32
"""Side in LR pixels of the tile that is measured, rounded up to the size multiple of the network."""

_ALLOWANCE = 1.5  # for buffers inside other operations, and for memory that is free but in pieces


def measured_bytes_per_pixel(network: UpscalingNetwork) -> int:
    """Return an estimate of the peak memory of a network's features in float32, in bytes per LR pixel.

    The network runs on a small tile, and the sizes of all tensors that exist at the same time are added up. A
    convolution also takes copies of its input and output, which oneDNN makes in its own layout. Half of the sum is
    added for other buffers.

    Args:
        network: The network in evaluation mode. It is not modified.
    """
    side = -(-SIDE // network.size_multiple) * network.size_multiple
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    lr = torch.full((1, 3, side, side), 0.5, device=device)
    return math.ceil(_ALLOWANCE * _peak_bytes(network, lr) / side**2)


def _peak_bytes(network: UpscalingNetwork, lr: Tensor) -> int:
    """Return the largest sum of the sizes of the tensors that exist at the same time while the network runs."""
    count = _LiveBytes(network.parameters())
    with torch.no_grad(), count:
        network.reconstruct(lr, network.estimate(lr))
    return count.peak


class _LiveBytes(TorchDispatchMode):
    """Add up the sizes of the tensors that operations create, and forget those that have been freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = (
            sum(_bytes(tensor) for tensor in (args[0], result)) if func is torch.ops.aten.convolution.default else 0
        )
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._known:
                    self._live[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, copies + sum(size for _, size in self._live.values()))
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
