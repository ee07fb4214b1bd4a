"""Layer normalisation: accuracy, memory, numbers that are not finite, and the op under torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.network.layers import LayerNorm
from savl.ops import KernelUnavailable, layer_norm, use_fused_kernels
from savl.ops.equivalence import Case
from savl.ops.layer_norm import layer_norm_case

SHAPES: dict[str, dict[str, Any]] = {
    "C 48": {"batch": 2, "height": 5, "width": 7, "channels": 48},
    "C 144, pixels of several tiles": {"batch": 1, "height": 9, "width": 8, "channels": 144},
    "C 180": {"batch": 1, "height": 3, "width": 3, "channels": 180},
    "C 7": {"batch": 3, "height": 2, "width": 3, "channels": 7},
    "C 1": {"batch": 1, "height": 2, "width": 3, "channels": 1},
    "C 600, less than a tile of pixels": {"batch": 1, "height": 1, "width": 2, "channels": 600},
    "C 4096": {"batch": 1, "height": 1, "width": 3, "channels": 4096},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    assert_accurate(lambda seed: layer_norm_case(dtype, seed=seed, **SHAPES[name]), draws=4)


def test_few_programs_share_the_sums_over_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    from savl.kernels import layer_norm as kernels

    monkeypatch.setattr(kernels, "SHARES", 2)
    assert_accurate(lambda seed: layer_norm_case(FLOAT32, batch=1, height=13, width=17, channels=48, seed=seed))


def test_a_large_mean_takes_no_digits_from_the_variance() -> None:
    def shifted(seed: int) -> Case:
        case = layer_norm_case(FLOAT32, batch=1, height=2, width=5, channels=48, seed=seed)
        return changed(case, x=argument(case, "x") + 1000)

    assert_accurate(shifted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_every_run_is_bit_identical(dtype: torch.dtype) -> None:
    case = layer_norm_case(dtype, batch=1, height=5, width=7, channels=19)
    expected = case.run("triton")
    assert expected.keys() == {"out", "d x", "d weight", "d bias"}
    with uninitialised_memory_is_nan():
        assert_same_bits(case.run("triton"), expected, "on the second run, with memory full of NaN")


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_gives_the_same_bits(name: str) -> None:
    case = layer_norm_case(FLOAT32, batch=2, height=3, width=5, channels=19)
    views = {given: LAYOUTS[name](argument(case, given)) for given in ("x",)}
    views |= {given: argument(case, given).repeat_interleave(2)[::2] for given in ("weight", "bias")}
    assert not any(view.is_contiguous() for view in views.values())
    assert_same_bits(changed(case, **views).run("triton"), case.run("triton"), name)


@pytest.mark.parametrize(("step", "copied"), [(2**19, False), (2**21, True)])  # numbers; tiles have 2048 pixels
def test_pixels_that_lie_too_far_apart_for_32_bits_are_copied(step: int, copied: bool) -> None:
    from savl.kernels.layer_norm import _with_near_pixels

    x = torch.empty_strided((1, 1, 3, 2), (0, 0, step, 1), device="meta")
    assert _with_near_pixels(x).is_contiguous() is copied


def test_an_expanded_gradient_gives_the_same_result_as_its_copy() -> None:
    x, weight, bias = torch.randn(1, 2, 3, 5), torch.randn(5), torch.randn(5)
    results = []
    for seed in (torch.ones(1).expand(1, 2, 3, 5), torch.ones(1, 2, 3, 5)):
        given = [value.clone().requires_grad_() for value in (x, weight, bias)]
        results.append(torch.autograd.grad(layer_norm(*given, kernels=TRITON), given, seed))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch_gives_empty_results(dtype: torch.dtype) -> None:
    case = layer_norm_case(dtype, batch=0)
    with uninitialised_memory_is_nan():
        found, eager = case.run("triton"), case.run("eager")
    for name, expected in eager.items():
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), f"{name} is {found[name]}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("given", "place"), [("x", (0, 1, 2, 3)), ("x", (0, 2, 3, 18)), ("weight", (4,)), ("bias", (18,))]
)
def test_a_number_that_is_not_finite_reaches_the_same_results_as_in_eager(
    given: str, place: tuple[int, ...], value: float
) -> None:
    case = layer_norm_case(FLOAT32, batch=1, height=3, width=4, channels=19)
    tensor = argument(case, given).clone()
    tensor[place] = value
    case = changed(case, **{given: tensor})
    fused, eager = case.run("triton"), case.run("eager")
    for result, expected in eager.items():
        # Of an infinite weight come NaN and infinities, which of both where depends on the order of sums.
        assert torch.equal(fused[result].isfinite(), expected.isfinite()), result


def test_large_float16_numbers_are_normalised() -> None:
    case = layer_norm_case(FLOAT16, batch=1, height=2, width=3, channels=48)
    large = changed(case, x=(argument(case, "x").float() * 15_000).clamp(-60_000, 60_000).half())
    assert_accurate(lambda seed: large, draws=1)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(FLOAT32, FLOAT32), (FLOAT16, FLOAT16), (FLOAT16, FLOAT32)], ids=str
)
def test_opcheck_accepts_the_registration(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 5).to(dtype)
    weight, bias = (torch.randn(5).to(weight_dtype) for _ in range(2))
    op, of_op = torch.ops.savl.layer_norm, torch.ops.savl.layer_norm_backward
    given = [value.clone().requires_grad_() for value in (x, weight, bias)]
    torch.library.opcheck(op.default, (*given, 1e-5, False))
    out, mean, inverse = op(x, weight, bias, 1e-5, True)
    assert out.dtype == FLOAT32
    arguments = (torch.ones_like(out), x, weight, bias, mean, inverse)
    torch.library.opcheck(of_op.default, arguments)
    for called, values in ((op, (x, weight, bias, 1e-5, True)), (of_op, arguments)):
        with FakeTensorMode() as mode:
            fake = called(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in values))
        for found, promised in zip(called(*values), fake, strict=True):
            assert (found.shape, found.dtype, found.stride()) == (promised.shape, promised.dtype, promised.stride())


def test_mean_and_inverse_are_those_of_each_pixel() -> None:
    x = torch.randn(2, 3, 4, 19) + 3
    _, mean, inverse = torch.ops.savl.layer_norm(x, torch.ones(19), torch.zeros(19), 1e-3, False)
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(inverse, (x.var(-1, unbiased=False) + 1e-3).rsqrt())


@pytest.mark.parametrize("dtype", [FLOAT32, torch.bfloat16], ids=str)
def test_under_autocast_the_result_has_the_dtype_that_torch_gives_it(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 8).to(dtype)
    weight, bias = torch.randn(8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.layer_norm(x, (8,), weight, bias)
        found = layer_norm(x, weight, bias, kernels=TRITON)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_a_compiled_op_equals_the_op() -> None:
    normalise = partial(layer_norm, kernels=TRITON)
    results = []
    for function in (normalise, torch.compile(normalise, fullgraph=True, backend="aot_eager")):
        given = [
            torch.linspace(-1, 2, size).reshape(shape).requires_grad_()
            for size, shape in ((30, (1, 2, 3, 5)), (5, (5,)), (5, (5,)))
        ]
        out = function(*given)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_the_layer_of_the_network_launches_the_kernel_when_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from savl.kernels import layer_norm as kernels

    layer, x = LayerNorm(8), torch.randn(1, 2, 3, 8)
    launched: list[str] = []
    monkeypatch.setattr(
        kernels, "layer_norm", partial(kernels.layer_norm, launch=recording_launch(kernels.run, launched))
    )
    layer(x)
    with use_fused_kernels():
        layer(x)
    assert not launched, "the interpreter served without being asked for"
    with use_fused_kernels(layer_norm="triton"):
        layer(x)
    assert launched == ["normalise_pixels"]


def recording_launch(run: Callable[..., None], launched: list[str]) -> Callable[..., None]:
    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        run(kernel, *arguments, **constants)

    return launch


def test_more_channels_than_a_program_holds_are_refused() -> None:
    x, weight = torch.randn(1, 1, 2, 4097), torch.ones(4097)
    with pytest.raises(KernelUnavailable, match="4097 channels"):
        layer_norm(x, weight, weight, kernels=TRITON)
    assert math.isfinite(float(layer_norm(x, weight, weight).sum()))
