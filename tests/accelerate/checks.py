"""Comparison of an accelerated network with the original one."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from savl.accelerate import AccelerationReport, accelerate
from savl.ops.equivalence import Budget, measure

SIZES = ((1, 16, 16), (2, 24, 16), (1, 13, 21))
"""Batch, height and width of images: multiples of a window of 8 or not, square or not."""


def drawn(network: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Return a network with large random weights, so that every branch changes the result, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def check_network(
    network: nn.Module,
    blocks: int,
    sizes: Iterable[tuple[int, int, int]] = SIZES,
    channels: int = 3,
    *,
    gradients: bool = True,
) -> AccelerationReport:
    """Accelerate a network and compare outputs and gradients with the original by the rule of equivalence.

    Args:
        network: The network; it is accelerated.
        blocks: Number of blocks that must be served, in every call.
        sizes: Batch, height and width of the images.
        channels: Channels of the images.
        gradients: Whether to compare the gradients of the image and of all parameters, in the mode of the network.
    """
    original, exact = copy.deepcopy(network), copy.deepcopy(network).double()
    report = accelerate(network)
    assert report.served == blocks, report
    budgets: dict[str, list[Budget]] = {}
    count = 0

    def pooled(seed: int) -> list[Budget]:
        nonlocal count
        for batch, height, width in sizes:
            image = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
            fused, eager, reference = (_run(each, image, gradients) for each in (network, original, exact))
            count += blocks
            assert fused.keys() == reference.keys()
            for name, value in reference.items():
                budgets.setdefault(name, []).append(measure(name, fused[name], eager[name], value, 4096))
        return [Budget.pooled(each) for each in budgets.values()]

    found = pooled(0)
    for seed in range(1, 6):  # the largest errors of few numbers vary by chance: see savl.ops.equivalence
        if not all(budget.kept for budget in found):
            found = pooled(seed)
    served, fallen_back = report.calls()
    assert (served, dict(fallen_back)) == (count, {}), report
    for budget in found:
        assert budget.kept, budget
    return report


def _run(network: nn.Module, image: Tensor, gradients: bool) -> dict[str, Tensor]:
    image = image.to(next(network.parameters()).dtype).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        out = network(image)
    results = {"output": out.detach()}
    if gradients:
        wanted = {"image": image} | {name: each for name, each in network.named_parameters() if each.requires_grad}
        seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
        found = torch.autograd.grad(out, list(wanted.values()), seeds, allow_unused=True)
        results |= {name: each for name, each in zip(wanted, found, strict=True) if each is not None}
    return results
