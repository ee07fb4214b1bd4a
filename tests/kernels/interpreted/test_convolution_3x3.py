"""3×3 convolutions with few channels on one side: accuracy, memory, and numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_checks import (
    DTYPES,
    FLOAT32,
    LAYOUTS,
    TRITON,
    argument,
    assert_accurate,
    assert_same_bits,
    changed,
    uninitialised_memory_is_nan,
)

from savl.ops import KernelUnavailable, convolution
from savl.ops.convolution import convolution_case

SMALL: dict[str, Any] = {"batch": 1, "height": 9, "width": 17, "channels": 19, "outputs": 19, "side": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "to 6 channels, normalised": {**SMALL, "outputs": 6, "norm": True, "activation": "gelu"},
    "to 3 channels": {**SMALL, "channels": 40, "outputs": 3, "bias": False},
    "to 12 channels, modulated": {**SMALL, "outputs": 12, "modulation": True},
    "to 5 channels, dilated": {**SMALL, "outputs": 5, "dilation": 3, "norm": True, "residual": True},
    "from 6 channels, gated": {**SMALL, "height": 6, "width": 18, "channels": 6, "outputs": 36, "gate": (2, 3)},
    "from 3 channels, dilated": {**SMALL, "batch": 2, "channels": 3, "dilation": 2, "activation": "leaky_relu"},
    "from 8 channels, modulated": {**SMALL, "height": 3, "channels": 8, "modulation": True, "activation": "gelu"},
    "dilation beyond the image": {**SMALL, "height": 2, "width": 3, "outputs": 2, "dilation": 7, "gate": (1, 3)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    assert_accurate(lambda seed: convolution_case(dtype, seed=seed, **SHAPES[name]), draws=3)


@pytest.mark.parametrize("name", ["to 6 channels, normalised", "from 6 channels, gated"])
def test_every_element_is_written_and_every_run_is_bit_identical(name: str) -> None:
    case = convolution_case(FLOAT32, **SHAPES[name])
    expected = case.run("triton")
    with uninitialised_memory_is_nan():
        assert_same_bits(case.run("triton"), expected, "on the second run, with memory full of NaN")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["to 6 channels, normalised", "from 6 channels, gated"])
def test_any_layout_gives_the_same_bits(name: str, layout: str) -> None:
    case = convolution_case(FLOAT32, **{**SHAPES[name], "height": 4, "width": 6, "batch": 2})
    views = {
        given: LAYOUTS[layout](argument(case, given))
        for given in ("x", "residual")
        if case.arguments[given] is not None
    }
    views["weight"] = argument(case, "weight").transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(view.is_contiguous() for view in views.values())
    tensors = [case.arguments, changed(case, **views).arguments]
    first, second = (convolution(**each, **case.options, kernels=TRITON) for each in tensors)  # type: ignore[arg-type]
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["to 6 channels, normalised", "to 3 channels", "from 6 channels, gated"])
def test_a_nan_reaches_the_pixels_that_it_reaches_in_eager(name: str) -> None:
    case = convolution_case(FLOAT32, **SHAPES[name])
    x = argument(case, "x").clone()
    x[0, 4, 13, 2] = math.nan  # beside the last column of a tile
    arguments = changed(case, x=x).arguments
    fused, eager = (
        convolution(**arguments, **case.options, kernels=kernels).isnan()  # type: ignore[arg-type]
        for kernels in (TRITON, None)
    )
    assert torch.equal(fused, eager)
    assert fused.any()


def test_offsets_that_need_64_bits_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from savl.kernels import convolution as launches

    run, far = launches.run, []

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if "FAR" in constants:
            far.append(constants["FAR"])
            constants["FAR"] = True
        run(kernel, programs, *arguments, **constants)

    for name in ("to 6 channels, normalised", "from 6 channels, gated"):
        case = convolution_case(FLOAT32, **SHAPES[name])
        tensors = list(case.arguments.values())
        options = (1, 0, 0.01, 1e-5, False, False)
        assert torch.equal(
            launches.convolution(*tensors, *options, launch=launch)[0],  # type: ignore[arg-type]
            launches.convolution(*tensors, *options)[0],  # type: ignore[arg-type]
        )
    assert far == [False, False]


def test_many_channels_on_both_sides_are_refused() -> None:
    case = convolution_case(FLOAT32, **SMALL)
    with pytest.raises(KernelUnavailable, match="not 19 to 19"):
        convolution(**case.arguments, **case.options, kernels=TRITON)  # type: ignore[arg-type]
