"""Compare channel modulation with its formula, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import channel_modulation

SHAPE = (2, 3, 4, 5)


def arguments(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    names = ("attended", "gamma", "beta", "residual")
    return {name: torch.randn(SHAPE, dtype=torch.float64).to(dtype) for name in names}


def modulate_number_by_number(attended: Tensor, gamma: Tensor, beta: Tensor | None, residual: Tensor) -> Tensor:
    shift = torch.zeros(attended.shape) if beta is None else beta
    columns = (value.double().flatten().tolist() for value in (attended, gamma, shift, residual))
    out = [r + (1 + g) * a + b for a, g, b, r in zip(*columns, strict=True)]
    return torch.tensor(out, dtype=torch.float64).reshape(attended.shape)


@pytest.mark.parametrize("with_beta", [True, False], ids=["beta", "no-beta"])
def test_channel_modulation_equals_the_formula(with_beta: bool) -> None:
    given = arguments()
    if not with_beta:
        given["beta"] = None
    torch.testing.assert_close(channel_modulation(**given), modulate_number_by_number(**given), rtol=0, atol=1e-14)


def test_gamma_zero_is_a_plain_residual_connection() -> None:
    given = arguments()
    given["gamma"].zero_()
    out = channel_modulation(given["attended"], given["gamma"], None, given["residual"])
    assert torch.equal(out, given["residual"] + given["attended"])


def test_gamma_minus_one_shuts_the_attended_features_out() -> None:
    given = arguments()
    given["gamma"].fill_(-1.0)
    out = channel_modulation(given["attended"], given["gamma"], None, given["residual"])
    assert torch.equal(out, given["residual"])


def test_every_pixel_and_channel_stands_alone() -> None:
    given = arguments()
    changed = {name: value.clone() for name, value in given.items()}
    for value in changed.values():
        value[1, 2, 3, 4] += 1.0
    differs = channel_modulation(**given) != channel_modulation(**changed)
    assert differs.nonzero().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("residual_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_residual_and_is_accurate(dtype: torch.dtype, residual_dtype: str) -> None:
    given = arguments(dtype)
    if residual_dtype == "float32":  # autocast keeps the residual stream in float32
        given["residual"] = given["residual"].float()

    out = channel_modulation(**given)

    assert out.dtype == given["residual"].dtype
    expected = modulate_number_by_number(**given)
    # Four operations, each rounding a number no larger than the sum of the magnitudes involved.
    magnitude = sum(float(value.abs().max()) for value in given.values()) + float(
        (given["gamma"] * given["attended"]).abs().max()
    )
    coarsest = max(torch.finfo(dtype).eps, torch.finfo(out.dtype).eps)
    error = float((out.double() - expected).abs().max())
    assert error <= 2 * coarsest * magnitude, f"{error:.3g} from the formula"


def test_inputs_in_any_memory_layout_give_the_same_output() -> None:
    given = arguments()
    strided = {name: value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for name, value in given.items()}
    strided["gamma"], strided["beta"] = torch.cat((given["gamma"], given["beta"]), dim=-1).chunk(2, dim=-1)
    assert not any(value.is_contiguous() for value in strided.values())
    assert torch.equal(channel_modulation(**strided), channel_modulation(**given))


def test_the_inputs_are_left_alone() -> None:
    given = arguments()
    copies = {name: value.clone() for name, value in given.items()}
    channel_modulation(**given)
    changed = [name for name, copy in copies.items() if not torch.equal(copy, given[name])]
    assert not changed, f"channel_modulation wrote into {changed}"


def test_an_empty_batch_gives_an_empty_output() -> None:
    empty = torch.zeros(0, 3, 4, 5)
    assert channel_modulation(empty, empty, empty, empty).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("with_beta", [True, False], ids=["beta", "no-beta"])
def test_gradients_are_those_of_finite_differences(with_beta: bool) -> None:
    given = arguments()
    attended, gamma, beta, residual = (value.requires_grad_() for value in given.values())
    if with_beta:
        assert torch.autograd.gradcheck(channel_modulation, (attended, gamma, beta, residual))
    else:
        assert torch.autograd.gradcheck(lambda a, g, r: channel_modulation(a, g, None, r), (attended, gamma, residual))


# Error messages name the argument, its value, and the accepted values


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        pytest.param({"attended": 3}, TypeError, ["attended", "int", "(B, H, W, C)"], id="attended-no-tensor"),
        pytest.param({"attended": torch.zeros(3, 4, 5)}, ValueError, ["attended", "(3, 4, 5)", "4 dim"], id="3d"),
        pytest.param(
            {"attended": torch.zeros(SHAPE, dtype=torch.bool)}, TypeError, ["attended", "bool", "float32"], id="bool"
        ),
        pytest.param({"gamma": None}, TypeError, ["gamma", "NoneType"], id="gamma-none"),
        pytest.param(
            {"gamma": torch.zeros(2, 3, 4, 1, dtype=torch.float64)},
            ValueError,
            ["gamma", "(2, 3, 4, 1)", str(SHAPE)],
            id="gamma-never-broadcasts",
        ),
        pytest.param(
            {"gamma": torch.zeros(SHAPE)}, TypeError, ["gamma", "float32", "float64", "cast"], id="gamma-dtype"
        ),
        pytest.param(
            {"beta": torch.zeros(2, 1, 1, 5, dtype=torch.float64)},
            ValueError,
            ["beta", "(2, 1, 1, 5)", str(SHAPE)],
            id="beta-never-broadcasts",
        ),
        pytest.param({"beta": torch.zeros(SHAPE)}, TypeError, ["beta", "float32", "float64"], id="beta-dtype"),
        pytest.param({"residual": None}, TypeError, ["residual", "NoneType"], id="residual-none"),
        pytest.param(
            {"residual": torch.zeros(2, 3, 4, 6, dtype=torch.float64)},
            ValueError,
            ["residual", "(2, 3, 4, 6)", str(SHAPE)],
            id="residual-shape",
        ),
        pytest.param(
            {"residual": torch.zeros(SHAPE, dtype=torch.bfloat16)},
            TypeError,
            ["residual", "bfloat16", "float64", "float32"],
            id="residual-dtype",
        ),
        pytest.param(
            {"residual": torch.zeros(SHAPE, dtype=torch.float64, device="meta")},
            ValueError,
            ["residual", "meta", "cpu"],
            id="residual-device",
        ),
    ],
)
def test_a_bad_argument_is_reported(changes: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        channel_modulation(**{**arguments(), **changes})
    missing = [f for f in ["channel_modulation", *fragments] if f not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"
