"""Comparison of the gradients of an accelerated network with those of the original one, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from savl.accelerate import accelerate


def check_gradients(network: nn.Module, blocks: int, size: tuple[int, int, int], channels: int = 3) -> None:
    """Accelerate a network in float64 and compare its output and gradients with those of the original one.

    In float64 a wrong gradient exceeds rounding by many orders, which no ill-conditioned sum does.

    Args:
        network: The network, in training or evaluation mode. What it draws at random is drawn equally by both.
        blocks: Number of blocks that must be served.
        size: Batch, height and width of the image.
        channels: Channels of the image.
    """
    network = network.double()
    original = copy.deepcopy(network)
    report = accelerate(network)
    assert report.served == blocks, report
    batch, height, width = size
    image = torch.rand(batch, channels, height, width, dtype=torch.float64)
    ours, theirs = _gradients(network, image), _gradients(original, image)
    assert report.calls() == (blocks, {}), report
    assert ours.keys() == theirs.keys()
    rounding = 1e-14 * max(float(value.abs().max()) for value in theirs.values())  # some gradients are 0 but for it
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-10 * value.abs().max() + rounding, name


def _gradients(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of the image and of all parameters that it depends on."""
    image = image.clone().requires_grad_()
    torch.manual_seed(1)
    out = network(image)
    wanted = {"image": image} | {name: each for name, each in network.named_parameters() if each.requires_grad}
    seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(out, list(wanted.values()), seeds, allow_unused=True)
    gradients = {name: each for name, each in zip(wanted, found, strict=True) if each is not None}
    return {"output": out.detach()} | gradients
