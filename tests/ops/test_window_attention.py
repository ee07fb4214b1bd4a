"""Compare window attention with its formula, pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import window_attention


def attend_pixel_by_pixel(qkv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, shift: int) -> Tensor:
    """The formula in float64 and plain loops, windows found by geometry: nothing is rolled, cut or masked.

    Shifting by ``shift`` puts the borders between windows at shift, shift + window, ...; what is left over at both
    ends of an axis are smaller windows. Two pixels see each other when they lie between the same borders.
    """
    batch, height, width, channels3 = qkv.shape
    heads = bias_table.shape[1]
    channels = channels3 // 3
    head_dim = channels // heads
    values, bias = qkv.double().tolist(), bias_table.double().tolist()
    weight = torch.ones(batch, height, width) if severity is None else severity
    s = weight.double().tolist()

    def together(a: int, b: int) -> bool:
        return (a - shift) // window == (b - shift) // window

    out = torch.zeros(batch, height, width, channels, dtype=torch.float64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                seen = [(i, j) for i in range(height) for j in range(width) if together(i, y) and together(j, x)]
                for head in range(heads):
                    first = head * head_dim
                    query = values[b][y][x][first : first + head_dim]
                    logits = []
                    for i, j in seen:
                        key = values[b][i][j][channels + first : channels + first + head_dim]
                        product = sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(head_dim)
                        row = (y - i + window - 1) * (2 * window - 1) + (x - j + window - 1)
                        logits.append(s[b][y][x] * s[b][i][j] * product + bias[row][head])
                    mass = [math.exp(logit) for logit in logits]
                    for c in range(head_dim):
                        total = sum(
                            m * values[b][i][j][2 * channels + first + c] for m, (i, j) in zip(mass, seen, strict=True)
                        )
                        out[b, y, x, first + c] = total / sum(mass)
    return out


def arguments(
    height: int = 8,
    width: int = 12,
    *,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 3,
    window: int = 4,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Valid arguments, severity included, random from the seed of the test."""
    return {
        "qkv": torch.randn(batch, height, width, 3 * heads * head_dim, dtype=torch.float64).to(dtype),
        "bias_table": torch.randn((2 * window - 1) ** 2, heads, dtype=torch.float64).to(dtype),
        "severity": (2 * torch.rand(batch, height, width, dtype=torch.float64)).to(dtype),
        "window": window,
        "shift": 0,
    }


# The formula


@pytest.mark.parametrize("with_severity", [True, False], ids=["severity", "plain"])
@pytest.mark.parametrize(
    ("height", "width", "window", "shift", "heads", "head_dim"),
    [
        pytest.param(8, 12, 4, 0, 2, 3, id="unshifted"),
        pytest.param(8, 12, 4, 2, 2, 3, id="shifted-by-half"),
        pytest.param(8, 12, 4, 1, 2, 3, id="shifted-by-one"),
        pytest.param(12, 8, 4, 3, 3, 2, id="shifted-by-all-but-one"),
        pytest.param(4, 4, 4, 2, 1, 5, id="one-window-shifted"),
        pytest.param(4, 8, 4, 2, 1, 5, id="one-row-of-windows-shifted"),
        pytest.param(6, 9, 3, 1, 2, 4, id="odd-window"),
        pytest.param(3, 2, 1, 0, 2, 4, id="window-of-one-pixel"),
    ],
)
def test_window_attention_equals_the_formula_pixel_by_pixel(
    height: int, width: int, window: int, shift: int, heads: int, head_dim: int, with_severity: bool
) -> None:
    given = arguments(height, width, window=window, heads=heads, head_dim=head_dim)
    severity = given["severity"] if with_severity else None

    out = window_attention(given["qkv"], given["bias_table"], severity, window=window, shift=shift)

    expected = attend_pixel_by_pixel(given["qkv"], given["bias_table"], severity, window, shift)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_a_severity_of_one_is_plain_attention() -> None:
    given = arguments()
    plain = window_attention(**{**given, "severity": None})
    ones = window_attention(**{**given, "severity": torch.ones_like(given["severity"])})
    assert torch.equal(ones, plain)


def test_a_severity_of_zero_leaves_attention_to_the_bias() -> None:
    given = arguments(4, 4, batch=1)
    given["bias_table"].zero_()
    given["severity"].zero_()
    values = given["qkv"][..., 12:]
    expected = values.mean(dim=(1, 2), keepdim=True).expand_as(values)
    torch.testing.assert_close(window_attention(**given), expected, msg=lambda m: f"no longer the mean of v: {m}")


def test_a_larger_severity_sharpens_attention() -> None:
    qkv = torch.zeros(1, 2, 2, 3)
    qkv[..., :2] = torch.tensor([[1.0, 1.0], [1.0, 2.0]])[None, :, :, None]  # the last pixel has the largest key
    qkv[0, 1, 1, 2] = 1.0  # and v = 1, so the output is the weight it gets
    bias = torch.zeros(9, 1)
    weights = [
        float(window_attention(qkv, bias, torch.full((1, 2, 2), s), window=2)[0, 0, 0, 0]) for s in (0.0, 1.0, 2.0)
    ]
    assert weights[0] == pytest.approx(0.25)
    assert weights == sorted(weights)
    assert weights[2] > weights[1] > 0.4


# Windows and the shift


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("pixel", [(0, 0), (3, 4), (7, 11)])
def test_a_pixel_reaches_its_own_window_and_nothing_else(shift: int, pixel: tuple[int, int]) -> None:
    given = arguments(batch=1)
    window = given["window"]
    changed = given["qkv"].clone()
    changed[0, pixel[0], pixel[1]] += 1.0

    before = window_attention(**{**given, "shift": shift})
    after = window_attention(**{**given, "qkv": changed, "shift": shift})

    rows = (torch.arange(8) - shift).div(window, rounding_mode="floor") == (pixel[0] - shift) // window
    columns = (torch.arange(12) - shift).div(window, rounding_mode="floor") == (pixel[1] - shift) // window
    reached = (before != after).any(dim=-1)[0]
    assert torch.equal(reached, rows[:, None] & columns[None, :]), f"{pixel} reaches\n{reached.int()}"


def test_shifted_windows_do_not_join_opposite_borders() -> None:
    given = arguments(8, 8, batch=1)
    changed = given["qkv"].clone()
    changed[0, 0, :] += 1.0
    before = window_attention(**{**given, "shift": 2})
    after = window_attention(**{**given, "qkv": changed, "shift": 2})
    assert torch.equal(before[0, 2:], after[0, 2:]), "the top row is rolled next to the bottom and must be masked there"
    assert not torch.equal(before[0, :2], after[0, :2])


def test_images_of_a_batch_do_not_see_each_other() -> None:
    given = arguments()
    both = window_attention(**given)
    alone = window_attention(
        given["qkv"][1:], given["bias_table"], given["severity"][1:], window=given["window"], shift=given["shift"]
    )
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-14)


# Dtypes, memory layout and gradients


@pytest.mark.parametrize("table_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_qkv_and_is_accurate(
    dtype: torch.dtype, table_dtype: str, attention_rounding_bound: Callable[..., float]
) -> None:
    given = arguments(dtype=dtype)
    given["qkv"] *= 0.25  # keeps logits small, so that the bound of a low precision still means something
    if table_dtype == "float32":  # autocast: features come in bfloat16, parameters and severity in float32
        given["bias_table"], given["severity"] = given["bias_table"].float(), given["severity"].float()

    out = window_attention(**{**given, "shift": 2})

    assert out.dtype == dtype
    expected = attend_pixel_by_pixel(given["qkv"], given["bias_table"], given["severity"], 4, 2)
    q, k, v = given["qkv"].chunk(3, dim=-1)
    bound = attention_rounding_bound(dtype, q, k, v, given["bias_table"], heads=2, keys=16)
    error = float((out.double() - expected).abs().max())
    assert error <= bound, f"the error {error:.3g} exceeds the bound on rounding errors {bound:.3g}"


def test_huge_logits_do_not_overflow() -> None:
    given = arguments(dtype=torch.float32)
    out = window_attention(**{**given, "qkv": 1e4 * given["qkv"]})
    assert torch.isfinite(out).all()


def test_inputs_in_any_memory_layout_give_the_same_output() -> None:
    given = arguments()
    expected = window_attention(**{**given, "shift": 2})
    strided = {
        "qkv": given["qkv"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "bias_table": given["bias_table"].t().contiguous().t(),
        "severity": torch.stack((given["severity"], given["severity"]), dim=-1)[..., 0],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    out = window_attention(**{**given, **strided, "shift": 2})
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_the_inputs_are_left_alone() -> None:
    given = arguments()
    copies = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    window_attention(**{**given, "shift": 2})
    changed = [name for name, copy in copies.items() if not torch.equal(copy, given[name])]
    assert not changed, f"window_attention wrote into {changed}"


@pytest.mark.parametrize("shift", [0, 2])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(shift: int) -> None:
    given = arguments(batch=0)
    given["bias_table"].requires_grad_()
    out = window_attention(**{**given, "shift": shift})
    assert out.shape == (0, 8, 12, 6)
    out.sum().backward()
    assert torch.equal(given["bias_table"].grad, torch.zeros_like(given["bias_table"]))


@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_are_those_of_finite_differences(shift: int) -> None:
    given = arguments(4, 2, batch=1, heads=2, head_dim=2, window=2)
    tensors = [given[name].requires_grad_() for name in ("qkv", "bias_table", "severity")]
    assert torch.autograd.gradcheck(lambda *t: window_attention(*t, window=2, shift=shift), tensors)


# Error messages name the argument, its value, and the accepted values


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        pytest.param({"qkv": [1.0]}, TypeError, ["qkv", "list", "(B, H, W, 3C)"], id="qkv-no-tensor"),
        pytest.param(
            {"qkv": torch.zeros(2, 8, 12, 18, dtype=torch.int64)}, TypeError, ["qkv", "int64", "bfloat16"], id="qkv-int"
        ),
        pytest.param({"qkv": torch.zeros(8, 12, 18)}, ValueError, ["qkv", "(8, 12, 18)", "4 dimensions"], id="qkv-3d"),
        pytest.param({"qkv": torch.zeros(2, 8, 12, 17)}, ValueError, ["qkv", "17", "3C"], id="qkv-not-3c"),
        pytest.param({"qkv": torch.zeros(2, 8, 12, 0)}, ValueError, ["qkv", "0", "3C"], id="qkv-no-channels"),
        pytest.param(
            {"qkv": torch.zeros(2, 7, 12, 18)}, ValueError, ["7x12", "window=4", "pad the image"], id="height-not-tiled"
        ),
        pytest.param({"qkv": torch.zeros(2, 8, 10, 18)}, ValueError, ["8x10", "window=4"], id="width-not-tiled"),
        pytest.param({"qkv": torch.zeros(2, 0, 12, 18)}, ValueError, ["0x12", "positive"], id="no-rows"),
        pytest.param({"qkv": torch.zeros(2, 8, 0, 18)}, ValueError, ["8x0", "positive"], id="no-columns"),
        pytest.param({"bias_table": 3}, TypeError, ["bias_table", "int"], id="table-int"),
        pytest.param({"bias_table": torch.zeros(49)}, ValueError, ["bias_table", "(49,)", "heads"], id="table-1d"),
        pytest.param(
            {"bias_table": torch.zeros(48, 2, dtype=torch.float64)}, ValueError, ["bias_table", "48", "49"], id="rows"
        ),
        pytest.param(
            {"bias_table": torch.zeros(49, 4, dtype=torch.float64)}, ValueError, ["6 channels", "4"], id="heads-uneven"
        ),
        pytest.param(
            {"bias_table": torch.zeros(49, 0, dtype=torch.float64)}, ValueError, ["6 channels", "0"], id="heads-none"
        ),
        pytest.param(
            {"bias_table": torch.zeros(49, 2, dtype=torch.float16)},
            TypeError,
            ["bias_table", "float16", "float64", "float32"],
            id="table-dtype",
        ),
        pytest.param(
            {"severity": torch.ones(2, 8, 8, dtype=torch.float64)},
            ValueError,
            ["severity", "(2, 8, 8)", "(2, 8, 12)"],
            id="severity-shape",
        ),
        pytest.param(
            {"severity": torch.ones(2, 8, 12, 1)}, ValueError, ["severity", "(2, 8, 12, 1)", "3 dim"], id="severity-4d"
        ),
        pytest.param(
            {"severity": torch.ones(2, 8, 12, dtype=torch.bfloat16)},
            TypeError,
            ["severity", "bfloat16", "float64", "float32"],
            id="severity-dtype",
        ),
        pytest.param(
            {"severity": torch.ones(2, 8, 12, dtype=torch.float64, device="meta")},
            ValueError,
            ["severity", "meta", "cpu"],
            id="severity-device",
        ),
        pytest.param({"window": 0}, ValueError, ["window", "got 0", "at least 1"], id="window-zero"),
        pytest.param({"window": True}, TypeError, ["window", "bool", "int"], id="window-bool"),
        pytest.param({"window": 4.0}, TypeError, ["window", "float", "int"], id="window-float"),
        pytest.param({"shift": 4}, ValueError, ["shift", "got 4", "0 <= shift < window=4"], id="shift-too-large"),
        pytest.param({"shift": -1}, ValueError, ["shift", "got -1", "0 <= shift"], id="shift-negative"),
        pytest.param({"mask": 1.0}, ValueError, ["mask", "-inf", "got 1.0"], id="mask-positive"),
        pytest.param({"mask": -(10**400)}, ValueError, ["mask", "-inf"], id="mask-too-low"),
        pytest.param({"mask": float("nan")}, ValueError, ["mask", "got nan"], id="mask-nan"),
        pytest.param({"mask": None}, TypeError, ["mask", "NoneType"], id="mask-none"),
        pytest.param({"key_window": 2}, ValueError, ["key_window", "k and v"], id="key-window-packed"),
        pytest.param({"dilated": True, "shift": 1}, ValueError, ["dilated", "shift=1"], id="dilated-shifted"),
        pytest.param({"window": (4, 4, 4)}, ValueError, ["window", "pair"], id="window-triple"),
        pytest.param({"heads": 3}, ValueError, ["bias_table", "3"], id="heads-differ"),
        pytest.param({"k": torch.zeros(2, 8, 12, 6)}, ValueError, ["k and v", "only k"], id="k-without-v"),
        pytest.param({"scale": torch.ones(3)}, ValueError, ["scale", "2"], id="scale-length"),
        pytest.param({"bias": torch.zeros(2, 16, 16)}, ValueError, ["bias_table and bias"], id="two-biases"),
        pytest.param({"shift": True}, TypeError, ["shift", "bool", "int"], id="shift-bool"),
        pytest.param({"shift": 2.0}, TypeError, ["shift", "float", "int"], id="shift-float"),
    ],
)
def test_a_bad_argument_is_reported(changes: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        window_attention(**{**arguments(), **changes})
    missing = [f for f in ["window_attention", *fragments] if f not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"
