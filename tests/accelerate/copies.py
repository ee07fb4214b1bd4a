"""Checks of an accelerated network in float64, where nothing but a mistake shows, and copies with other class names."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from checks import SIZES
from torch import Tensor, nn

from savl.accelerate import accelerate


def check_in_float64(network: nn.Module, blocks: int, sizes: Iterable[tuple[int, int, int]] = SIZES) -> None:
    """Compare outputs and gradients of a network in float64 before and after acceleration, up to rounding.

    Args:
        network: The network; it is accelerated.
        blocks: Number of blocks that must be served, in every call.
        sizes: Batch, height and width of the images.
    """
    network = network.double()
    original, report = copy.deepcopy(network), accelerate(network)
    calls = 0
    for batch, height, width in sizes:
        image = torch.rand(batch, 3, height, width, dtype=torch.float64)
        found, expected = _run(network, image), _run(original, image)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            bound = 1e-11 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=name)
        calls += blocks
    served, fallen_back = report.calls()
    assert (served, dict(fallen_back)) == (calls, {}), report


def _run(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of the image and of all parameters that have one."""
    image = image.clone().requires_grad_()
    wanted = {"image": image} | dict(network.named_parameters())
    out = network(image)
    seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    gradients = torch.autograd.grad(out, list(wanted.values()), seeds, allow_unused=True)
    found = {name: each for name, each in zip(wanted, gradients, strict=True) if each is not None}
    return {"output": out.detach(), **found}


def renamed(network: nn.Module) -> nn.Module:
    """Give every class of a network that is not torch's another name, as copies in other packages may have."""
    for module in network.modules():
        kind = type(module)
        if not kind.__module__.startswith("torch."):
            module.__class__ = type(f"Other{len(kind.__name__)}", (kind,), {})
    return network
