"""Layer normalisation under the interpreter: right, complete, in any layout, and as torch sees it."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from case_tools import DTYPES, FLOAT16, FLOAT32, argument, assert_same_bits, case, case_for, changed, empty_is_nan, hold
from cases_memory import LAYOUTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from savl.network.layers import LayerNorm
from savl.ops import KernelSettings, KernelUnavailable, layer_norm, use_fused_kernels
from savl.ops.equivalence import Case, layer_norm_case

NORM = layer_norm_case
TRITON = KernelSettings(layer_norm="triton")
SHAPES: dict[str, dict[str, Any]] = {
    "C 48": {"batch": 2, "height": 5, "width": 7, "channels": 48},
    "C 144, pixels of several tiles": {"batch": 1, "height": 9, "width": 8, "channels": 144},
    "C 180": {"batch": 1, "height": 3, "width": 3, "channels": 180},
    "C 7": {"batch": 3, "height": 2, "width": 3, "channels": 7},
    "C 1": {"batch": 1, "height": 2, "width": 3, "channels": 1},
    "C 600, less than a tile of pixels": {"batch": 1, "height": 1, "width": 2, "channels": 600},
    "C 4096": {"batch": 1, "height": 1, "width": 3, "channels": 4096},
}


def norm_module() -> Any:
    return import_module("savl.kernels.layer_norm")


@case_for(*(f"{name}, {dtype}" for name in SHAPES for dtype in DTYPES))
def layer_norm_is_as_right_as_eager(choice: str) -> None:
    name, dtype = choice.rsplit(", ", 1)
    hold(lambda seed: NORM(DTYPES[dtype], seed=seed, **SHAPES[name]), draws=4)


@case
def few_programs_share_many_pixels() -> None:
    with mock.patch.object(norm_module(), "SHARES", 2):
        hold(lambda seed: NORM(FLOAT32, batch=1, height=13, width=17, channels=48, seed=seed))


@case
def a_large_mean_takes_no_digits_from_the_variance() -> None:
    def shifted(seed: int) -> Case:
        spec = NORM(FLOAT32, batch=1, height=2, width=5, channels=48, seed=seed)
        return changed(spec, x=argument(spec, "x") + 1000)

    hold(shifted)


@case_for(*DTYPES)
def every_element_of_layer_norm_is_written_and_every_run_gives_the_same_bits(dtype: str) -> None:
    spec = NORM(DTYPES[dtype], batch=1, height=5, width=7, channels=19)
    expected = spec.run("triton")
    assert expected.keys() == {"out", "d x", "d weight", "d bias"}
    assert_same_bits(spec.run("triton"), expected, "on the second run")
    with empty_is_nan():
        assert_same_bits(spec.run("triton"), expected, "when memory is full of NaN")


@case_for(*LAYOUTS)
def layer_norm_of_any_layout_gives_the_same_bits(name: str) -> None:
    spec = NORM(FLOAT32, batch=2, height=3, width=5, channels=19)
    views = {given: LAYOUTS[name](argument(spec, given)) for given in ("x",)}
    views |= {given: argument(spec, given).repeat_interleave(2)[::2] for given in ("weight", "bias")}
    assert not any(view.is_contiguous() for view in views.values())
    assert_same_bits(changed(spec, **views).run("triton"), spec.run("triton"), name)


@case
def pixels_that_lie_too_far_apart_for_32_bits_are_copied() -> None:
    for step, copied in ((2**19, False), (2**21, True)):  # of tiles of 2048 pixels
        x = torch.empty_strided((1, 1, 3, 2), (0, 0, step, 1), device="meta")
        near = norm_module()._with_near_pixels(x)
        assert near.is_contiguous() is copied, f"{step} numbers from pixel to pixel"


@case
def an_expanded_gradient_gives_what_its_copy_gives() -> None:
    x, weight, bias = torch.randn(1, 2, 3, 5), torch.randn(5), torch.randn(5)
    results = []
    for seed in (torch.ones(1).expand(1, 2, 3, 5), torch.ones(1, 2, 3, 5)):
        given = [value.clone().requires_grad_() for value in (x, weight, bias)]
        results.append(torch.autograd.grad(layer_norm(*given, kernels=TRITON), given, seed))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@case_for("f32", "f16")
def layer_norm_of_an_empty_batch_is_empty(dtype: str) -> None:
    spec = NORM(DTYPES[dtype], batch=0)
    with empty_is_nan():
        found, eager = spec.run("triton"), spec.run("eager")
    for name, expected in eager.items():
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), f"{name} is {found[name]}"


@case_for("nan", "inf", "-inf")
def a_spoilt_number_spoils_what_it_spoils_in_eager(value: str) -> None:
    spec = NORM(FLOAT32, batch=1, height=3, width=4, channels=19)
    for given, spot in (("x", (0, 1, 2, 3)), ("x", (0, 2, 3, 18)), ("weight", (4,)), ("bias", (18,))):
        spoilt = argument(spec, given).clone()
        spoilt[spot] = float(value)
        one = changed(spec, **{given: spoilt})
        fused, eager = one.run("triton"), one.run("eager")
        for result, expected in eager.items():
            # Of an infinite weight come NaN and infinities, which of both where depends on the order of sums.
            assert torch.equal(fused[result].isfinite(), expected.isfinite()), f"{given}{list(spot)}: {result}"


@case
def large_float16_numbers_are_normalised() -> None:
    spec = NORM(FLOAT16, batch=1, height=2, width=3, channels=48)
    case_of_large = changed(spec, x=(argument(spec, "x").float() * 15_000).clamp(-60_000, 60_000).half())
    hold(lambda seed: case_of_large, draws=1)


@case_for("f32", "f16", "mixed")
def torch_finds_nothing_wrong_with_layer_norm(dtype: str) -> None:
    x = torch.randn(1, 2, 3, 5).to(FLOAT32 if dtype == "f32" else FLOAT16)
    weight, bias = (torch.randn(5).to(FLOAT16 if dtype == "f16" else FLOAT32) for _ in range(2))
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


@case
def mean_and_inverse_are_those_of_each_pixel() -> None:
    x = torch.randn(2, 3, 4, 19) + 3
    _, mean, inverse = torch.ops.savl.layer_norm(x, torch.ones(19), torch.zeros(19), 1e-3, False)
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(inverse, (x.var(-1, unbiased=False) + 1e-3).rsqrt())


@case_for("f32", "bf16")
def under_autocast_it_is_of_the_dtype_that_torch_gives(dtype: str) -> None:
    x = torch.randn(1, 2, 3, 8).to(FLOAT32 if dtype == "f32" else torch.bfloat16)
    weight, bias = torch.randn(8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.layer_norm(x, (8,), weight, bias)
        found = layer_norm(x, weight, bias, kernels=TRITON)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@case
def a_compiled_layer_norm_gives_what_it_gives() -> None:
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


@case
def the_networks_layer_asks_for_it() -> None:
    layer, x = LayerNorm(8), torch.randn(1, 2, 3, 8)
    launched: list[str] = []
    kernels = norm_module()

    def spy(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launched.append("forward")
        kernels.run(kernel, programs, *arguments, **constants)

    with mock.patch.object(kernels, "layer_norm", partial(kernels.layer_norm, launch=spy)):
        layer(x)
        with use_fused_kernels():
            layer(x)
        assert not launched, "the interpreter served without being asked for"
        with use_fused_kernels(layer_norm="triton"):
            layer(x)
    assert launched == ["forward"]


@case
def more_channels_than_a_program_holds_are_refused() -> None:
    x, weight = torch.randn(1, 1, 2, 4097), torch.ones(4097)
    said = ""
    try:
        layer_norm(x, weight, weight, kernels=TRITON)
    except KernelUnavailable as error:
        said = str(error)
    assert "4097 channels" in said, said
    assert math.isfinite(float(layer_norm(x, weight, weight).sum()))
