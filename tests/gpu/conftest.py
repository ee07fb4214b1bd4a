"""Fixtures of the tests on a GPU: they are marked, skipped without one, and know the backend of an op there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from savl.ops.equivalence import Case, judge
from savl.ops.op import OPS, why_unavailable

FOLDER = Path(__file__).parent

SMALL: dict[str, Callable[..., Case]] = {
    f"{name}-{index}": partial(op.case, **settings)
    for name, op in OPS.items()
    if op.backend_for("cuda") is not None
    for index, settings in enumerate((*op.small_cases, *op.quick_cases))
}
"""The small and quick cases of the ops that have kernels for GPUs: with and without each optional argument, and of
sizes that no tile size divides."""


def _missing() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder before ``-m`` is evaluated."""
    reason = _missing()
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def backend_of() -> Callable[[str], str]:
    """Return the name of the fused backend of an op on a GPU; skip the test if it was not built or installed."""

    def backend(op: str) -> str:
        name = OPS[op].backend_for("cuda")
        assert name is not None
        if (reason := why_unavailable(op, name)) is not None:
            pytest.skip(f"{op} · {name}: {reason}")
        return name

    return backend


@pytest.fixture(params=SMALL, scope="session")
def small_case(request: pytest.FixtureRequest) -> Callable[..., Case]:
    """Return a function that makes a small case of a dtype and seed; a test runs for every entry of `SMALL`."""
    make = SMALL[request.param]

    def small(dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
        return make(dtype, seed=seed)

    return small


@pytest.fixture(scope="session")
def hold(backend_of: Callable[[str], str]) -> Callable[..., None]:
    """Return a function that checks the kernel of the GPU by the rule of `savl.ops.equivalence`."""

    def check(make: Callable[[int], Case], draws: int = 8) -> None:
        case = make(0)
        backend = backend_of(case.op)
        broken = [str(budget) for budget in judge(make, backend, draws=draws, device="cuda") if not budget.kept]
        if broken:
            pytest.fail(f"{case.op} ({case.label}): " + "; ".join(broken))

    return check


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let torch and the kernels compute products of float32 matrices in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
