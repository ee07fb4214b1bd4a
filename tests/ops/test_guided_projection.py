"""guided_projection: its mathematics in plain torch, and its error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl import ops
from savl.ops.guided_projection import guided_projection_case


def call(**settings: Any) -> dict[str, Tensor]:
    sizes = {"height": 3, "width": 4, "inner": 7, "channels": 5, "latent": 6}
    return dict(guided_projection_case(torch.float64, **sizes, **settings).arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [False, True])
def test_result_is_the_modulated_projection(shift: bool) -> None:
    given = call(shift=shift)
    gamma, *beta = F.linear(given["mu"], given["guidance_weight"], given["guidance_bias"]).split(5, -1)
    expected = given["residual"] + (1 + gamma) * F.linear(given["x"], given["weight"], given["bias"])
    expected = expected + beta[0] if shift else expected
    torch.testing.assert_close(ops.guided_projection(**given), expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("guidance_weight", (7, 6), "guidance_weight must have 5 or 10 outputs, got 7"),
        ("mu", (1, 3, 5, 6), r"guided_projection: mu .*\(1, 3, 4, 6\)"),
        ("residual", (1, 3, 4, 6), r"guided_projection: residual .*\(1, 3, 4, 5\)"),
    ],
)
def test_wrong_shape_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    given = {**call(), name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        ops.guided_projection(**given)
