"""Networks in the wrappers of PyTorch: torch.compile, data parallelism, averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from savl.network.savl import SAVL

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A function that compiles another function."""


@dataclass(frozen=True)
class Unwrapped:
    """Result of `unwrap`."""

    model: SAVL
    """The network inside, not a copy."""
    compile: Compile | None
    """Compiles a function with the same options as the network; None if the network was not compiled."""


def unwrap(model: object) -> Unwrapped | None:
    """Find the network inside wrappers of PyTorch.

    The wrappers are ``torch.compile(model)``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel``,
    nested in any order. A network compiled in place (``model.compile()``) counts as compiled.

    Args:
        model: Any object.

    Returns:
        The network and how it was compiled; None if there is no `SAVL` inside.
    """
    compile_as: Compile | None = None
    while not isinstance(model, SAVL):
        if not isinstance(model, nn.Module):
            return None
        if "_orig_mod" in model._modules:  # torch.compile's wrapper; importing its class would load the compiler
            compile_as = vars(model).get("dynamo_ctx", torch.compile)
            model = model._modules["_orig_mod"]
        elif isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        else:
            return None
    return Unwrapped(model, _compiled_in_place(model) if compile_as is None else compile_as)


def _compiled_in_place(model: SAVL) -> Compile | None:
    """Return a function that compiles with the arguments of ``model.compile(...)``; None if it was not called."""
    if model._compiled_call_impl is None or model.compile_options is None:
        return None
    arguments, options = model.compile_options
    return lambda function: torch.compile(function, *arguments, **options)
