"""State dicts: find them in checkpoints, remove the prefixes that wrappers add, and check that they fit a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

# Keys under which training programs store weights, the preferred ones first: moving averages are the better weights.
_KEYS = (
    "params_ema",
    "params-ema",
    "ema",
    "average",
    "params",
    "state_dict",
    "model_state_dict",
    "model",
    "net_g",
    "generator",
)
_DEEPEST = 4
# Components that wrappers (compilers, FSDP, activation checkpointing) insert into names.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = re.compile(r"(?:^|\.)conv_first\.weight$")


def find_state_dict(content: Any) -> dict[str, Tensor]:
    """Find the weights of a HAT or savl network in the content of a checkpoint.

    The weights may be at the top level or nested under keys such as ``params_ema``, ``params``, ``state_dict``,
    ``model`` or ``net_g``, beside numbers, optimizers and other networks. Prefixes of names such as ``module.``,
    ``_orig_mod.`` or ``net_g.`` are removed. A moving average is preferred to the weights that it averages.

    Args:
        content: Content of the file, as returned by `savl.weights.checkpoint_file.read_checkpoint`.

    Returns:
        Tensors by name. If there is no such network, those of the largest state dict.

    Raises:
        ValueError: There are no tensors by name.
    """
    candidates = state_dicts(content)
    for candidate in candidates:
        for network in _networks(candidate):
            return network
    if not candidates:
        if content == {}:
            return {}
        raise ValueError("must hold a state dict: tensors by name, plain or under a key such as params_ema or params")
    return max(candidates, key=len)


def state_dicts(content: Any) -> list[dict[str, Tensor]]:
    """Return all state dicts in the content of a checkpoint, in order of preference: moving averages first.

    Components of names that wrappers such as ``torch.compile`` insert are removed; other prefixes are kept.
    """
    found = _candidates(content, 0)
    return [{_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()} for tensors in found]


def is_hat(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the tensor names of a HAT checkpoint."""
    return "conv_first.weight" in tensors and any("residual_group.overlap_attn" in name for name in tensors)


def is_savl(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the tensor names of a `SAVL`."""
    return "conv_first.weight" in tensors and any(name.startswith("groups.0.ocab.") for name in tensors)


def _candidates(content: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    """Yield all dicts of tensors by name in ``content``, in order of preference."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    for key in sorted(named, key=_rank):
        yield from _candidates(named[key], depth + 1)
    # Numbers beside the tensors, such as an epoch, are left out.
    if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
        yield tensors


def _rank(key: str) -> int:
    if key in _KEYS:
        return _KEYS.index(key)
    return 1 if _is_average(key) else len(_KEYS)


def _is_average(name: str) -> bool:
    return "ema" in re.split(r"[^a-z]+", name.lower())


def _networks(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the HAT and savl networks in a state dict, without prefixes: moving averages first, then outer ones."""
    prefixes = {name[: -len("conv_first.weight")] for name in tensors if _FIRST.search(name)}
    for prefix in sorted(prefixes, key=lambda prefix: (not _is_average(prefix), len(prefix), prefix)):
        network = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if is_hat(network) or is_savl(network):
            yield network


SHOWN = 3
"""Maximum number of tensors of one kind that an error message names."""


def check_fit(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
    """Check that the names and shapes of a state dict are as expected, and that its tensors are floating.

    Args:
        expected: Name → shape.
        tensors: Name → tensor.

    Raises:
        ValueError: Tensors are missing, unknown, of another shape or not floating. The message names some of each kind.
    """
    problems: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in tensors],
        "unknown": [name for name in tensors if name not in expected],
        "misshapen": [],
        "not floating": [],
    }
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            problems["misshapen"].append(f"{name} {tuple(tensor.shape)} instead of {tuple(shape)}")
        if not tensor.is_floating_point():
            problems["not floating"].append(f"{name} {tensor.dtype}")
    found = [f"{len(names)} {kind}: {_enumerate(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"its tensors do not fit the network: {'; '.join(found)}")


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
