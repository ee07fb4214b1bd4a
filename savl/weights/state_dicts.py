"""State dicts: find them in checkpoints, strip what wrappers add to names, and check that they fit a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

# Where training programs keep the weights, the best first: a moving average is what they evaluate.
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
# Components of names that wrappers put between those of the network: compilers, FSDP, checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = re.compile(r"(?:^|\.)conv_first\.weight$")


def find_state_dict(content: Any) -> dict[str, Tensor]:
    """Find the weights of a HAT or savl network in what a checkpoint holds.

    They may be plain or nested, as under ``params_ema``, ``params``, ``state_dict``, ``model`` or ``net_g``, beside
    numbers, optimizers and other networks. Prefixes of their names such as ``module.``, ``_orig_mod.`` or ``net_g.``
    are taken away. A moving average comes before the weights that it averages.

    Args:
        content: What the file holds.

    Returns:
        Tensors by name; of a checkpoint without such a network those of its largest state dict.

    Raises:
        ValueError: It holds no tensors by name.
    """
    candidates = list(_candidates(content, 0))
    for candidate in candidates:
        for network in _networks(candidate):
            return network
    if not candidates:
        if content == {}:
            return {}
        raise ValueError("must hold a state dict: tensors by name, plain or under a key such as params_ema or params")
    return max(candidates, key=len)


def is_hat(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the marks of a HAT checkpoint."""
    return "conv_first.weight" in tensors and any("residual_group.overlap_attn" in name for name in tensors)


def is_savl(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the marks of a `SAVL`."""
    return "conv_first.weight" in tensors and any(name.startswith("groups.0.ocab.") for name in tensors)


def _candidates(content: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    """All dicts of tensors by name in ``content``, the most promising first."""
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
    """The HAT and savl networks in a state dict, under their own names; averaged ones first, then outer ones."""
    clean = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    prefixes = {name[: -len("conv_first.weight")] for name in clean if _FIRST.search(name)}
    for prefix in sorted(prefixes, key=lambda prefix: (not _is_average(prefix), len(prefix), prefix)):
        network = {name.removeprefix(prefix): tensor for name, tensor in clean.items() if name.startswith(prefix)}
        if is_hat(network) or is_savl(network):
            yield network


SHOWN = 3
"""How many tensors of a kind an error names."""


def check_fit(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
    """Check that the names and shapes of a state dict are the expected ones, and its values floating.

    Args:
        expected: Name → shape.
        tensors: Name → tensor.

    Raises:
        ValueError: Tensors are missing, unknown, misshapen or not floating; the message names a few of each.
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
