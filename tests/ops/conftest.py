"""What the tests of the fused kernels share: a skip where there are none, small cases of every op, instruction sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from savl.build_info import build_info
from savl.ops.equivalence import (
    Case,
    channel_modulation_case,
    gaussian_posterior_case,
    judge,
    layer_norm_case,
    overlapping_window_attention_case,
    window_attention_case,
)
from savl.ops.library import EXTENSION_UNAVAILABLE

MakeCase = Callable[..., Case]

# Every op, every optional argument given and left out, sizes that are no multiple of any vector.
SMALL: dict[str, tuple[MakeCase, dict[str, Any]]] = {
    "window": (window_attention_case, {"batch": 2, "window": 4, "head_dim": 5, "columns": 3}),
    "window-shifted": (window_attention_case, {"batch": 2, "window": 5, "shift": 2, "head_dim": 8}),
    "window-plain": (window_attention_case, {"window": 4, "shift": 1, "head_dim": 9, "severity": False}),
    "overlapping": (overlapping_window_attention_case, {"batch": 2, "window": 4, "key_window": 6, "head_dim": 5}),
    "overlapping-wide": (overlapping_window_attention_case, {"window": 2, "key_window": 8, "columns": 5, "rows": 3}),
    "overlapping-plain": (overlapping_window_attention_case, {"window": 3, "key_window": 5, "severity": False}),
    "posterior-eps": (gaussian_posterior_case, {"channels": 5, "height": 7, "width": 9}),
    "posterior-seed": (gaussian_posterior_case, {"channels": 9, "height": 3, "width": 7, "noise": "seed"}),
    "posterior-none": (gaussian_posterior_case, {"channels": 4, "height": 18, "width": 17, "noise": "none"}),
    "modulation": (channel_modulation_case, {"height": 5, "width": 7, "channels": 19}),
    "modulation-plain": (channel_modulation_case, {"height": 3, "width": 4, "channels": 8, "beta": False}),
    "norm": (layer_norm_case, {"height": 5, "width": 7, "channels": 19}),
}


def _instruction_sets() -> list[str]:
    if EXTENSION_UNAVAILABLE is not None:
        return ["none"]
    names: list[str] = import_module("savl._C").kernel_instruction_sets()
    return names


@pytest.fixture(scope="session")
def extension() -> Any:
    """The extension module; the test is skipped where its kernels cannot be used."""
    if EXTENSION_UNAVAILABLE is not None:
        pytest.skip(build_info()["reason"] or EXTENSION_UNAVAILABLE)
    return import_module("savl._C")


@pytest.fixture(scope="module", params=_instruction_sets())
def instruction_set(request: pytest.FixtureRequest, extension: Any) -> Iterator[str]:
    """Each instruction set that this processor can run, in use during the test."""
    before = build_info()["kernel_instruction_set"]
    extension.use_kernel_instruction_set(request.param)
    yield request.param
    extension.use_kernel_instruction_set(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: small cases finish sooner, and on a busy machine much sooner."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SMALL, scope="session")
def small_case(request: pytest.FixtureRequest, extension: Any) -> Callable[..., Case]:
    """Makes a small case of a dtype and a seed; a test runs once for every entry of `SMALL`."""
    make, settings = SMALL[request.param]

    def small(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Case:
        return make(dtype, seed=seed, **{**settings, **changes})

    return small


@pytest.fixture(scope="session")
def small_cases(extension: Any) -> dict[str, Callable[..., Case]]:
    """What makes the cases of `SMALL`, by name."""
    return {name: partial(make, **settings) for name, (make, settings) in SMALL.items()}


@pytest.fixture(scope="session")
def assert_within_budget(extension: Any) -> Callable[[Callable[[int], Case]], None]:
    """Holds the C++ kernel against the rule of `savl.ops.equivalence`; says which results break it, and by how much."""

    def check(make: Callable[[int], Case]) -> None:
        broken = [str(budget) for budget in judge(make, "cpp") if not budget.kept]
        if broken:
            pytest.fail(f"{make(0).op} ({make(0).label}): " + "; ".join(broken))

    return check
