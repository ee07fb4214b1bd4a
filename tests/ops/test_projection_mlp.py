"""projection_mlp: its mathematics in plain torch, and its error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl import ops
from savl.ops.projection_mlp import projection_mlp_case

SETTINGS: dict[str, Any] = {"height": 4, "width": 6, "inner": 7, "channels": 5, "expanded": 9}


def call(**settings: Any) -> dict[str, Tensor]:
    arguments = projection_mlp_case(torch.float64, **SETTINGS, **settings).arguments
    return dict(arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("convolved", [0, 3])
def test_result_is_that_of_the_layers_one_after_the_other(convolved: int) -> None:
    given = call(convolved=convolved, grid=(2, 3))
    y = given["residual"] + F.linear(given["x"], given["weight"], given["bias"])
    if convolved:
        planes = given["hidden"].permute(0, 3, 1, 2)
        added = F.conv2d(planes, given["hidden_weight"], given["hidden_bias"], padding=1).permute(0, 2, 3, 1)
        gate = given["gate"].repeat_interleave(2, 1).repeat_interleave(2, 2)
        y = y + gate * added
    normed = F.layer_norm(y, (5,), given["norm_weight"], given["norm_bias"], 0.1)
    features = F.gelu(F.linear(normed, given["expand_weight"], given["expand_bias"]))
    expected = y + F.linear(features, given["contract_weight"], given["contract_bias"])
    torch.testing.assert_close(ops.projection_mlp(**given, eps=0.1), expected)


def test_parts_of_the_convolution_are_given_together() -> None:
    given = {**call(convolved=3, grid=(1, 1)), "gate": None, "hidden_bias": None}
    with pytest.raises(ValueError, match=r"must be given together, got None for hidden_bias, gate"):
        ops.projection_mlp(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (4, 7), r"projection_mlp: residual must .*\(1, 4, 6, 4\)|projection_mlp: bias must"),
        ("contract_weight", (5, 8), r"contract_weight .*\(5, 9\)"),
        ("gate", (1, 3, 3, 5), "gate must have rows and columns that divide 4x6, got 3x3"),
    ],
)
def test_wrong_shape_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    given = {**call(convolved=3, grid=(1, 1)), name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        ops.projection_mlp(**given)


@pytest.mark.parametrize(("eps", "error"), [(-1.0, ValueError), (float("nan"), ValueError), ("1e-5", TypeError)])
def test_eps_is_checked(eps: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="projection_mlp: eps must be"):
        ops.projection_mlp(**call(), eps=eps)  # type: ignore[arg-type]
