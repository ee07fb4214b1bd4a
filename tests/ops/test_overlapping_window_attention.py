"""Compare overlapping window attention with its formula, pixel by pixel and also at the border of the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from savl.ops import overlapping_window_attention, window_attention


def attend_pixel_by_pixel(
    q: Tensor, kv: Tensor, bias_table: Tensor, severity: Tensor | None, window: int, key_window: int
) -> Tensor:
    """The formula in float64 and plain loops. A key outside the image is a zero key with a zero value, not masked."""
    batch, height, width, channels = q.shape
    heads = bias_table.shape[1]
    head_dim = channels // heads
    margin = (key_window - window) // 2
    span = window + key_window - 1
    half = (window + key_window) // 2 - 1
    queries, keys_values, bias = q.double().tolist(), kv.double().tolist(), bias_table.double().tolist()
    weight = torch.ones(batch, height, width) if severity is None else severity
    s = weight.double().tolist()

    out = torch.zeros(batch, height, width, channels, dtype=torch.float64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                top, left = y // window * window - margin, x // window * window - margin
                for head in range(heads):
                    first = head * head_dim
                    mass, weighted = 0.0, [0.0] * head_dim
                    for i in range(top, top + key_window):
                        for j in range(left, left + key_window):
                            logit = bias[(y - i + half) * span + (x - j + half)][head]
                            value = [0.0] * head_dim
                            if 0 <= i < height and 0 <= j < width:
                                pixel = keys_values[b][i][j]
                                product = sum(queries[b][y][x][first + c] * pixel[first + c] for c in range(head_dim))
                                logit += s[b][y][x] * s[b][i][j] * product / math.sqrt(head_dim)
                                value = pixel[channels + first : channels + first + head_dim]
                            mass += math.exp(logit)
                            weighted = [w + math.exp(logit) * v for w, v in zip(weighted, value, strict=True)]
                    for c in range(head_dim):
                        out[b, y, x, first + c] = weighted[c] / mass
    return out


def arguments(
    height: int = 8,
    width: int = 12,
    *,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 3,
    window: int = 4,
    key_window: int = 6,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Valid arguments, severity included, random from the seed of the test."""
    channels = heads * head_dim
    return {
        "q": torch.randn(batch, height, width, channels, dtype=torch.float64).to(dtype),
        "kv": torch.randn(batch, height, width, 2 * channels, dtype=torch.float64).to(dtype),
        "bias_table": torch.randn((window + key_window - 1) ** 2, heads, dtype=torch.float64).to(dtype),
        "severity": (2 * torch.rand(batch, height, width, dtype=torch.float64)).to(dtype),
        "window": window,
        "key_window": key_window,
    }


# The formula


@pytest.mark.parametrize("with_severity", [True, False], ids=["severity", "plain"])
@pytest.mark.parametrize(
    ("height", "width", "window", "key_window", "heads", "head_dim"),
    [
        pytest.param(8, 12, 4, 6, 2, 3, id="half-overlap"),
        pytest.param(4, 4, 4, 6, 1, 5, id="one-window"),
        pytest.param(4, 6, 2, 8, 2, 2, id="keys-beyond-the-neighbours"),
        pytest.param(6, 3, 3, 5, 3, 2, id="odd-window"),
        pytest.param(8, 4, 4, 4, 2, 3, id="no-overlap"),
        pytest.param(2, 3, 1, 3, 1, 4, id="window-of-one-pixel"),
    ],
)
def test_overlapping_attention_equals_the_formula_pixel_by_pixel(
    height: int, width: int, window: int, key_window: int, heads: int, head_dim: int, with_severity: bool
) -> None:
    given = arguments(height, width, window=window, key_window=key_window, heads=heads, head_dim=head_dim)
    if not with_severity:
        given["severity"] = None

    out = overlapping_window_attention(**given)

    torch.testing.assert_close(out, attend_pixel_by_pixel(**given), rtol=0, atol=1e-12)


def test_overlapping_attention_keeps_zero_keys_at_the_border() -> None:
    ones = torch.ones(1, 4, 4, 1, dtype=torch.float64)
    kv = torch.cat((torch.zeros_like(ones), ones), dim=-1)
    bias = torch.zeros(81, 1, dtype=torch.float64)
    out = overlapping_window_attention(ones, kv, bias, window=4, key_window=6)
    expected = torch.full_like(out, 16 / 36)  # 16 keys inside the image have v = 1, the 20 outside count with v = 0
    torch.testing.assert_close(out, expected, msg=lambda m: f"keys outside must take softmax mass by their bias: {m}")


def test_without_overlap_it_is_window_attention() -> None:
    given = arguments(key_window=4)
    out = overlapping_window_attention(**given)
    qkv = torch.cat((given["q"], given["kv"]), dim=-1)
    expected = window_attention(qkv, given["bias_table"], given["severity"], window=4)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_a_severity_of_one_is_plain_attention() -> None:
    given = arguments()
    plain = overlapping_window_attention(**{**given, "severity": None})
    ones = overlapping_window_attention(**{**given, "severity": torch.ones_like(given["severity"])})
    assert torch.equal(ones, plain)


def test_severity_weighs_keys_but_not_values() -> None:
    given = arguments(4, 4, key_window=4, batch=1)
    given["bias_table"].zero_()
    given["severity"].zero_()
    values = given["kv"][..., 6:]
    expected = values.mean(dim=(1, 2), keepdim=True).expand_as(values)
    torch.testing.assert_close(overlapping_window_attention(**given), expected)


@pytest.mark.parametrize("pixel", [(0, 0), (3, 4), (4, 7), (7, 11)])
def test_a_key_reaches_the_windows_it_overlaps_and_nothing_else(pixel: tuple[int, int]) -> None:
    given = arguments(batch=1)
    changed = given["kv"].clone()
    changed[0, pixel[0], pixel[1]] += 1.0

    before = overlapping_window_attention(**given)
    after = overlapping_window_attention(**{**given, "kv": changed})

    def sees(position: Tensor, key: int) -> Tensor:
        start = position.div(4, rounding_mode="floor") * 4
        return (start - 1 <= key) & (key < start + 5)

    expected = sees(torch.arange(8), pixel[0])[:, None] & sees(torch.arange(12), pixel[1])[None, :]
    reached = (before != after).any(dim=-1)[0]
    assert torch.equal(reached, expected), f"{pixel} reaches\n{reached.int()}"


def test_images_of_a_batch_do_not_see_each_other() -> None:
    given = arguments()
    both = overlapping_window_attention(**given)
    alone = {**given, **{name: given[name][1:] for name in ("q", "kv", "severity")}}
    torch.testing.assert_close(both[1:], overlapping_window_attention(**alone), rtol=0, atol=1e-14)


# Dtypes, memory layout and gradients


@pytest.mark.parametrize("table_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_q_and_is_accurate(
    dtype: torch.dtype, table_dtype: str, attention_rounding_bound: Callable[..., float]
) -> None:
    given = arguments(dtype=dtype)
    given["q"] *= 0.25  # keeps logits small, so that the bound of a low precision still means something
    given["kv"] *= 0.25
    if table_dtype == "float32":  # autocast: features come in bfloat16, parameters and severity in float32
        given["bias_table"], given["severity"] = given["bias_table"].float(), given["severity"].float()

    out = overlapping_window_attention(**given)

    assert out.dtype == dtype
    expected = attend_pixel_by_pixel(**given)
    k, v = given["kv"].chunk(2, dim=-1)
    bound = attention_rounding_bound(dtype, given["q"], k, v, given["bias_table"], heads=2, keys=36)
    error = float((out.double() - expected).abs().max())
    assert error <= bound, f"the error {error:.3g} exceeds the bound on rounding errors {bound:.3g}"


def test_inputs_in_any_memory_layout_give_the_same_output() -> None:
    given = arguments()
    expected = overlapping_window_attention(**given)
    qkv = torch.cat((given["q"], given["kv"]), dim=-1)
    strided = {
        "q": qkv[..., :6],
        "kv": qkv[..., 6:],
        "bias_table": given["bias_table"].t().contiguous().t(),
        "severity": torch.stack((given["severity"], given["severity"]), dim=-1)[..., 0],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    out = overlapping_window_attention(**{**given, **strided})
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_the_inputs_are_left_alone() -> None:
    given = arguments()
    copies = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    overlapping_window_attention(**given)
    changed = [name for name, copy in copies.items() if not torch.equal(copy, given[name])]
    assert not changed, f"overlapping_window_attention wrote into {changed}"


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients() -> None:
    given = arguments(batch=0)
    given["bias_table"].requires_grad_()
    out = overlapping_window_attention(**given)
    assert out.shape == (0, 8, 12, 6)
    out.sum().backward()
    assert torch.equal(given["bias_table"].grad, torch.zeros_like(given["bias_table"]))


def test_gradients_are_those_of_finite_differences() -> None:
    given = arguments(4, 2, batch=1, heads=2, head_dim=2, window=2, key_window=4)
    tensors = [given[name].requires_grad_() for name in ("q", "kv", "bias_table", "severity")]
    assert torch.autograd.gradcheck(lambda *t: overlapping_window_attention(*t, window=2, key_window=4), tensors)


# Error messages name the argument, its value, and the accepted values


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        pytest.param({"q": None}, TypeError, ["q must", "NoneType", "(B, H, W, C)"], id="q-none"),
        pytest.param({"q": torch.zeros(8, 12, 6)}, ValueError, ["q must", "(8, 12, 6)", "4 dimensions"], id="q-3d"),
        pytest.param(
            {"q": torch.zeros(2, 8, 12, 6, dtype=torch.uint8)}, TypeError, ["q must", "uint8", "float32"], id="q-uint8"
        ),
        pytest.param(
            {"kv": torch.zeros(2, 8, 12, 6, dtype=torch.float64)},
            ValueError,
            ["kv", "(2, 8, 12, 6)", "(2, 8, 12, 12)"],
            id="kv-without-values",
        ),
        pytest.param({"kv": torch.zeros(2, 8, 12, 12)}, TypeError, ["kv", "float32", "float64", "cast"], id="kv-dtype"),
        pytest.param(
            {"kv": torch.zeros(2, 8, 12, 12, dtype=torch.float64, device="meta")},
            ValueError,
            ["kv", "meta", "cpu"],
            id="kv-device",
        ),
        pytest.param({"bias_table": 0.0}, TypeError, ["bias_table", "float", "heads"], id="table-no-tensor"),
        pytest.param(
            {"bias_table": torch.zeros(80, 2, dtype=torch.float64)}, ValueError, ["bias_table", "80", "81"], id="rows"
        ),
        pytest.param(
            {"bias_table": torch.zeros(81, 5, dtype=torch.float64)}, ValueError, ["6 channels", "5"], id="heads-uneven"
        ),
        pytest.param(
            {"bias_table": torch.zeros(81, 2, dtype=torch.bfloat16)},
            TypeError,
            ["bias_table", "bfloat16", "float64", "float32"],
            id="table-dtype",
        ),
        pytest.param(
            {"severity": torch.ones(1, 8, 12, dtype=torch.float64)},
            ValueError,
            ["severity", "(1, 8, 12)", "(2, 8, 12)"],
            id="severity-shape",
        ),
        pytest.param(
            {"severity": torch.ones(2, 8, 12, dtype=torch.float16)},
            TypeError,
            ["severity", "float16", "float64", "float32"],
            id="severity-dtype",
        ),
        pytest.param({"window": 5}, ValueError, ["8x12", "window=5", "pad the image"], id="not-tiled"),
        pytest.param({"window": False}, TypeError, ["window", "bool", "int"], id="window-bool"),
        pytest.param({"window": -4}, ValueError, ["window", "got -4", "at least 1"], id="window-negative"),
        pytest.param({"key_window": 7}, ValueError, ["key_window", "got 7", "even"], id="key-window-odd-margin"),
        pytest.param({"key_window": 2}, ValueError, ["key_window", "got 2", "window=4"], id="key-window-small"),
        pytest.param({"key_window": 6.0}, TypeError, ["key_window", "float", "int"], id="key-window-float"),
    ],
)
def test_a_bad_argument_is_reported(changes: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        overlapping_window_attention(**{**arguments(), **changes})
    missing = [f for f in ["overlapping_window_attention", *fragments] if f not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_an_image_without_pixels_is_refused() -> None:
    empty = {"q": torch.zeros(1, 0, 4, 6), "kv": torch.zeros(1, 0, 4, 12), "severity": None}
    with pytest.raises(ValueError, match="positive multiples of window=4, got 0x4"):
        overlapping_window_attention(**{**arguments(dtype=torch.float32), **empty})
