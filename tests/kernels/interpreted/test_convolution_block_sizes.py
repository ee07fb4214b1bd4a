"""Convolutions with the block sizes of GPUs whose programs keep a part of the channels at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, assert_accurate

from savl.ops.convolution import convolution_case

SMALL: dict[str, Any] = {"batch": 1, "height": 5, "width": 9, "channels": 37, "outputs": 21}
SHAPES: dict[str, dict[str, Any]] = {
    "normalised": {**SMALL, "norm": True, "activation": "gelu"},
    "more than 192 channels": {**SMALL, "channels": 200, "residual": True, "bias": False},
    "to few channels": {**SMALL, "outputs": 6, "side": 3, "norm": True},
    "from few channels": {**SMALL, "channels": 6, "side": 3, "gate": (1, 3)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
def test_outputs_and_gradients_are_as_accurate_as_eager(
    architecture: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from savl.kernels import convolution as launches

    asked = []

    def architecture_for(x: torch.Tensor) -> str:
        asked.append(x.shape)
        return architecture

    monkeypatch.setattr(launches, "architecture_for", architecture_for)
    assert_accurate(lambda seed: convolution_case(dtype, seed=seed, **SHAPES[name]))
    assert asked
