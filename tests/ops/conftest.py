"""Fixtures of the tests of fused kernels: the extension, small cases of every op, and instruction sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from savl.build_info import build_info
from savl.ops.equivalence import DRAWS, Case, judge
from savl.ops.library import EXTENSION_UNAVAILABLE
from savl.ops.op import OPS

MakeCase = Callable[..., Case]

SMALL: dict[str, MakeCase] = {
    f"{name}-{index}": partial(op.case, **settings)
    for name, op in OPS.items()
    for index, settings in enumerate(op.small_cases)
}
"""The small cases of every op: optional arguments present and absent, sizes not divisible by a vector."""


def _instruction_sets() -> list[str]:
    if EXTENSION_UNAVAILABLE is not None:
        return ["none"]
    names: list[str] = import_module("savl._C").kernel_instruction_sets()
    return names


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that would repeat those of avx512.

    avx512_bf16 and amx add kernels for bfloat16. Their other kernels are those of avx512.
    """

    def repeats_avx512(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        other_dtype = parameters.get("dtype", torch.bfloat16) != torch.bfloat16
        return other_dtype and parameters.get("instruction_set") in ("avx512_bf16", "amx")

    if repeated := [item for item in items if repeats_avx512(item)]:
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if not repeats_avx512(item)]


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


@pytest.fixture(params=SMALL, scope="session")
def small_case(request: pytest.FixtureRequest, extension: Any) -> Callable[..., Case]:
    """Makes a small case of a dtype and a seed; a test runs once for every entry of `SMALL`."""
    make = SMALL[request.param]

    def small(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Case:
        return make(dtype, seed=seed, **changes)

    return small


@pytest.fixture(params=OPS, scope="session")
def case_of_op(request: pytest.FixtureRequest, extension: Any) -> Case:
    """The first small case of an op in float32; a test runs once for every op."""
    op = OPS[request.param]
    return op.case(torch.float32, **op.small_cases[0])


@pytest.fixture(scope="session")
def assert_within_budget(extension: Any) -> Callable[[Callable[[int], Case]], None]:
    """Holds the C++ kernel against the rule of `savl.ops.equivalence`; says which results break it, and by how much."""

    # A sanitizer makes everything slow, and what it finds depends on shapes and dtypes, not on the numbers.
    draws = 1 if os.environ.get("SAVL_SANITIZE") else DRAWS

    def check(make: Callable[[int], Case]) -> None:
        broken = [str(budget) for budget in judge(make, "cpp", draws=draws) if not budget.kept]
        if broken:
            pytest.fail(f"{make(0).op} ({make(0).label}): " + "; ".join(broken))

    return check
