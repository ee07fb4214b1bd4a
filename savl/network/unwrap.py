"""Find a network inside PyTorch's wrappers: torch.compile, data parallelism and averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from savl.network.savl import SAVL
from savl.network.upscaling import UpscalingNetwork

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Type of a function that compiles another function, as `torch.compile` does."""


Network = TypeVar("Network", bound=UpscalingNetwork)


@dataclass(frozen=True)
class Unwrapped(Generic[Network]):
    """A network that was found in a wrapper, and the function that compiles as the wrapper does.

    Attributes:
        model: The network itself, not a copy.
        compile: Function that compiles another function with the options of the network. None if the network is not
            compiled.
    """

    model: Network
    compile: Compile | None


def unwrap(model: object) -> Unwrapped[SAVL] | None:
    """Return the `SAVL` inside PyTorch's wrappers, as `unwrap_network` does; None if ``model`` contains none."""
    return unwrap_network(model, SAVL)


def unwrap_network(model: object, kind: type[Network]) -> Unwrapped[Network] | None:
    """Return the network inside PyTorch's wrappers.

    The wrappers are ``torch.compile(model)``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel``. They
    may be nested in any order. A network that was compiled in place (``model.compile()``) is also treated as compiled.

    Args:
        model: Any object.
        kind: Class of the network: `SAVL`, or `UpscalingNetwork` for any network that an upscaler can run.

    Returns:
        The network and the function that compiles with its options. None if ``model`` contains no such network.
    """
    compile_function: Compile | None = None
    while not isinstance(model, kind):
        if not isinstance(model, nn.Module):
            return None
        # The wrapper of torch.compile has this submodule. Importing the wrapper's class would load the compiler.
        if "_orig_mod" in model._modules:
            compile_function = vars(model).get("dynamo_ctx", torch.compile)
            model = model._modules["_orig_mod"]
        elif isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        else:
            return None
    return Unwrapped(model, _compiled_in_place(model) if compile_function is None else compile_function)


def _compiled_in_place(model: UpscalingNetwork) -> Compile | None:
    """Return a function that compiles with the arguments of ``model.compile(...)``; None without such a call."""
    if model._compiled_call_impl is None or model.compile_options is None:
        return None
    arguments, options = model.compile_options
    return lambda function: torch.compile(function, *arguments, **options)
