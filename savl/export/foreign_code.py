"""What must change in the Python code of other people's networks while `torch.export` captures it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn


class _IntType(type):
    """Behaves as ``int``, except that a number of images remains a free size."""

    batches: Sequence[torch.SymInt] = ()

    def __call__(cls, *args: Any, **named: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.SymFloat):
            for batch in cls.batches:
                if args[0].node.hint == batch.node.hint:
                    return batch
        return int(*args, **named)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)


class _Math:
    """Behaves as the module ``math``, except that it has no logarithms and roots of free sizes.

    Their values would be those of the captured image, at all sizes.
    """

    def __getattr__(self, name: str) -> Any:
        function = getattr(math, name)
        if name not in ("log", "log2", "log10", "sqrt"):
            return function

        def refuse_free_sizes(*args: Any) -> Any:
            if any(isinstance(each, torch.SymInt | torch.SymFloat) for each in args):
                raise TypeError(f"math.{name} of a free height or width")
            return function(*args)

        return refuse_free_sizes


@contextmanager
def free_batch(network: nn.Module, batches: Sequence[int | torch.SymInt]) -> Iterator[None]:
    """Keep the number of images free where a network computes it as ``int(windows / (height * width / side / side))``.

    Most networks with windows do so. ``int`` of a free size is its value for the captured image, so that the program
    would be wrong for other numbers of images. While the context is active, ``int`` in the files of the network
    returns the free number of images for a fraction that equals it. Captured images must therefore have a number of
    images that no other fraction is likely to have, and the program must be checked with other numbers.

    Functions of ``math`` that would fix a size raise a `TypeError`.

    Args:
        network: The network. Files of torch and savl are left alone.
        batches: The numbers of images that the network may compute with.
    """
    free = [each for each in batches if isinstance(each, torch.SymInt)]
    if not free:
        yield
        return
    whole: Any = _IntType("int", (), {"batches": free})
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in _modules_of(network):
        names = vars(module)
        before: dict[str, Any] = {name: names[name] for name in ("int", "math") if name in names}
        changed.append((names, before))
        names.setdefault("int", whole)
        if before.get("math") is math:
            names["math"] = _Math()
    try:
        yield
    finally:
        for names, before in changed:
            for name in ("int", "math"):
                names.pop(name, None)
            names.update(before)


def _modules_of(network: nn.Module) -> list[ModuleType]:
    """Return the Python modules that define the layers of a network, and those beside them in their packages."""
    names = {type(layer).__module__ for layer in network.modules()}
    names = {name for name in names if name.partition(".")[0] not in ("torch", "savl")}
    packages = tuple(f"{name.rpartition('.')[0]}." for name in names if "." in name)
    return [module for name, module in list(sys.modules.items()) if name in names or name.startswith(packages)]


def fold_weights(network: nn.Module) -> None:
    """Compute, once, the weights that layers such as those of SPAN compute from others in each call.

    They assign them to ``eval_conv.weight.data``, which cannot be captured.

    Args:
        network: In evaluation mode; it is changed.
    """
    for layer in network.modules():
        update = getattr(layer, "update_params", None)
        if callable(update) and isinstance(getattr(layer, "eval_conv", None), nn.Module):
            update()
            vars(layer)["update_params"] = _do_nothing


def _do_nothing() -> None:
    """Stand for the computation of weights that are folded already."""
