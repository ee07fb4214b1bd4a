"""Networks that `savl.Upscaler` runs: find them in what a caller passes, and accelerate other architectures."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import nn

from savl.accelerate import AccelerationReport, accelerate
from savl.network import SAVL
from savl.network.unwrap import Unwrapped, unwrap_network
from savl.network.upscaling import UpscalingNetwork
from savl.ops import kernel_report
from savl.ops.library import EAGER
from savl.ops.scopes import choice_of_thread, fused_by_default
from savl.weights.spandrel_model import wrap_descriptor


def as_network(model: object) -> Unwrapped[UpscalingNetwork] | None:
    """Return the network in ``model``.

    Args:
        model: A network, also compiled or in PyTorch's wrappers; or a ``spandrel.ImageModelDescriptor``.

    Returns:
        None if ``model`` is something else.

    Raises:
        ValueError: It is a model of spandrel that savl cannot run, such as one for inpainting.
    """
    found = unwrap_network(model, UpscalingNetwork)
    if found is not None:
        return found
    try:
        wrapped = wrap_descriptor(model)
    except ValueError as error:
        raise ValueError(f"model {error}") from error
    return None if wrapped is None else Unwrapped(wrapped, None)


def uses_fused_attention(device: torch.device) -> bool:
    """Return whether this thread's settings let a fused kernel serve window attention on a device."""
    if choice_of_thread("window_attention") in (False, EAGER):
        return False
    return kernel_report().serving("window_attention", device.type) != EAGER


def accelerated(network: UpscalingNetwork) -> tuple[UpscalingNetwork, AccelerationReport | None]:
    """Return a network whose blocks are computed by savl's ops where this is possible, and a report.

    Args:
        network: The network. It is not modified. The result has the same tensors, and other classes of modules.

    Returns:
        The accelerated network, and the report of `savl.accelerate`. For a `SAVL`, which calls the ops itself, the
        network itself and None.
    """
    if isinstance(network, SAVL):
        return network, None
    copied = with_shared_tensors(network)
    return copied, accelerate(copied)


def acceleration_report(network: UpscalingNetwork, device: torch.device) -> str:
    """Return in words what `savl.accelerate` changes in a network on this machine.

    Args:
        network: The network. It is not modified.
        device: Its device.
    """
    if isinstance(network, SAVL):
        return "the network calls savl's fused kernels itself; `savl kernels info` shows which are used here"
    with fused_by_default():
        if not uses_fused_attention(device):
            return "not accelerated: no fused kernel for window attention is used on this machine"
        return str(accelerated(network)[1])


def with_shared_tensors(module: UpscalingNetwork) -> UpscalingNetwork:
    """Return a copy of a network that shares the memory of its parameters and buffers.

    The parameters of the copy need no gradients, because kernels for inference do not compute them.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(module, memo)


def needs_copy(network: nn.Module, device: torch.device) -> bool:
    """Return whether a network must be copied before it computes on a device in float32 and evaluation mode."""
    floating = [tensor for tensor in chain(network.parameters(), network.buffers()) if tensor.is_floating_point()]
    return network.training or any(t.dtype != torch.float32 or t.device != device for t in floating)
