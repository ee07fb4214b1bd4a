"""Copies of networks with other names of classes."""

from __future__ import annotations

from torch import nn


def renamed(network: nn.Module) -> nn.Module:
    """Give every class of a network that is not torch's another name, as copies in other packages may have."""
    for module in network.modules():
        kind = type(module)
        if not kind.__module__.startswith("torch."):
            module.__class__ = type(f"Other{len(kind.__name__)}", (kind,), {})
    return network
