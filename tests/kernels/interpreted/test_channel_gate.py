"""The channel gate: accuracy, memory, numbers that are not finite, and the op under torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_checks import (
    DTYPES,
    FLOAT16,
    FLOAT32,
    LAYOUTS,
    TRITON,
    argument,
    assert_accurate,
    assert_same_bits,
    changed,
    uninitialised_memory_is_nan,
)

from savl.ops import KernelSettings, KernelUnavailable, channel_gate
from savl.ops.channel_gate import channel_gate_case

SMALL: dict[str, Any] = {"batch": 1, "height": 6, "width": 10, "channels": 5, "outputs": 19, "squeezed": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "one window": {**SMALL, "rows": 1, "columns": 1},
    "several tiles of a window": {**SMALL, "height": 3, "width": 130, "channels": 30, "rows": 1, "columns": 1},
    "windows of one pixel": {**SMALL, "rows": 6, "columns": 10, "neighbourhood": 3},
    "neighbourhood larger than the image": {**SMALL, "rows": 2, "columns": 5, "neighbourhood": 7},
    "many channels": {**SMALL, "height": 2, "width": 3, "channels": 70, "outputs": 33, "rows": 1, "columns": 3},
    "one channel": {**SMALL, "channels": 1, "outputs": 1, "squeezed": 1, "batch": 3, "rows": 3, "columns": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    assert_accurate(lambda seed: channel_gate_case(dtype, seed=seed, **SHAPES[name]), draws=3)


def test_parts_of_a_window_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from savl.kernels import channel_gate as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)  # parts of 4, 4 and 3 rows
    assert_accurate(
        lambda seed: channel_gate_case(FLOAT32, **{**SMALL, "height": 11}, rows=1, columns=1, seed=seed), draws=3
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_every_run_is_bit_identical(dtype: torch.dtype) -> None:
    case = channel_gate_case(dtype, **SMALL, rows=3, columns=2, neighbourhood=3)
    expected = case.run("triton")
    with uninitialised_memory_is_nan():
        assert_same_bits(case.run("triton"), expected, "on the second run, with memory full of NaN")


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_gives_the_same_bits(name: str) -> None:
    case = channel_gate_case(FLOAT32, **{**SMALL, "batch": 2}, rows=2, columns=2)
    views = {"x": LAYOUTS[name](argument(case, "x"))}
    views |= {given: argument(case, given).t().contiguous().t() for given in ("squeeze_weight", "excite_weight")}
    views |= {given: argument(case, given).repeat_interleave(2)[::2] for given in ("bias", "excite_bias")}
    assert not any(view.is_contiguous() for view in views.values())
    assert_same_bits(changed(case, **views).run("triton"), case.run("triton"), name)


def test_an_empty_batch_gives_empty_results() -> None:
    case = channel_gate_case(FLOAT32, **{**SMALL, "batch": 0}, rows=2, columns=2)
    with uninitialised_memory_is_nan():
        found, eager = case.run("triton"), case.run("eager")
    assert_same_bits(found, eager, "for an empty batch")


def test_a_nan_reaches_the_windows_that_it_reaches_in_eager() -> None:
    case = channel_gate_case(FLOAT32, **SMALL, rows=3, columns=5)
    x = argument(case, "x").clone()
    x[0, 2, 4, 1] = math.nan  # at the corner of a window, so that the windows above and to the left read it too
    case = changed(case, x=x)
    fused, eager = (case.run(backend)["out"].isnan() for backend in ("triton", "eager"))
    assert torch.equal(fused, eager)
    assert 0 < fused.sum() < fused.numel()


@pytest.mark.parametrize(("dtype", "other"), [(FLOAT32, FLOAT32), (FLOAT16, FLOAT16), (FLOAT16, FLOAT32)], ids=str)
def test_opcheck_accepts_the_registration(dtype: torch.dtype, other: torch.dtype) -> None:
    case = channel_gate_case(FLOAT32, **SMALL)
    tensors = [argument(case, name).to(dtype if name == "x" else other).requires_grad_() for name in case.arguments]
    options = (2, 5, 3, 0.5)
    torch.library.opcheck(torch.ops.savl.channel_gate.default, (*tensors, *options))
    out = torch.ops.savl.channel_gate(*tensors, *options)
    assert out.dtype == dtype
    given = [each.detach() for each in (torch.ones_like(out), *tensors)]
    torch.library.opcheck(torch.ops.savl.channel_gate_backward.default, (*given, *options))


def test_a_compiled_gate_equals_the_gate() -> None:
    call = channel_gate_case(FLOAT32, **SMALL, rows=2, columns=2)
    tensors, options = tuple(call.arguments.values()), call.options

    def gate(*given: torch.Tensor) -> torch.Tensor:
        return channel_gate(*given, **options, kernels=TRITON)

    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), gate(*tensors))


def test_too_many_channels_are_refused() -> None:
    case = channel_gate_case(FLOAT32, **{**SMALL, "height": 1, "width": 1, "channels": 1025}, rows=1, columns=1)
    tensors = case.arguments.values()
    with pytest.raises(KernelUnavailable, match="x has 1025 channels, more than 1024"):
        channel_gate(*tensors, **case.options, kernels=KernelSettings(channel_gate="triton"))  # type: ignore[arg-type]
