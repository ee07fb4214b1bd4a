"""Layer normalisation: the reference equals PyTorch's, and invalid arguments are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from savl.network.layers import LayerNorm
from savl.ops import layer_norm


def test_every_pixel_has_mean_0_and_variance_1_before_weight_and_bias() -> None:
    x = 3 * torch.randn(2, 4, 5, 64, dtype=torch.float64) + 7
    plain = layer_norm(x, torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64), eps=0.0)
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(2, 4, 5, dtype=torch.float64))
    weight, bias = torch.randn(2, 64, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=0.0), plain * weight + bias)


def test_eps_joins_the_variance() -> None:
    x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)  # of variance 1
    out = layer_norm(x, torch.ones(2), torch.zeros(2), eps=3.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_layer_has_the_bits_of_torchs(dtype: torch.dtype, autocast: bool) -> None:
    theirs, ours = nn.LayerNorm(60), LayerNorm(60)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(60))
    ours.load_state_dict(theirs.state_dict())
    if dtype == torch.float64:  # the only one that torch takes no float32 parameters with
        theirs, ours = theirs.double(), ours.double()
    x = torch.randn(2, 3, 4, 60).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_float32_parameters_of_a_16_bit_layer_are_not_rounded() -> None:
    x, weight, bias = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(8), torch.randn(8)
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias))
    mixed = layer_norm(x, weight, bias.bfloat16())
    assert torch.equal(mixed, F.layer_norm(x, (8,), weight, bias.bfloat16().float()))


X, W = torch.randn(1, 2, 3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "fragments"),
    [
        (([1.0], W, W), {}, TypeError, ["x must be a torch.Tensor", "(B, H, W, C)", "list"]),
        ((X.long(), W, W), {}, TypeError, ["x must have one of the dtypes", "int64"]),
        ((X[0], W, W), {}, ValueError, ["x must have 4 dimensions", "3"]),
        ((X, torch.ones(5), W), {}, ValueError, ["weight must have shape (4,)", "(5,)"]),
        ((X, W, torch.ones(1, 4)), {}, ValueError, ["bias must have 1 dimensions", "(1, 4)"]),
        ((X[..., :0], W[:0], W[:0]), {}, ValueError, ["x must have one channel or more"]),
        ((X, W.double(), W), {}, TypeError, ["weight must be torch.float32", "float64"]),
        ((X, W, W.to("meta")), {}, ValueError, ["bias is on meta", "x is on cpu"]),
        ((X, W, W), {"eps": "small"}, TypeError, ["eps must be a number", "'small'"]),
        ((X, W, W), {"eps": True}, TypeError, ["eps must be a number", "True"]),
        ((X, W, W), {"eps": -1e-5}, ValueError, ["eps must be finite and at least 0", "-1e-05"]),
        ((X, W, W), {"eps": math.nan}, ValueError, ["eps must be finite"]),
        ((X, W, W), {"eps": 10**400}, ValueError, ["eps must be finite"]),
    ],
    ids=lambda value: "",
)
def test_invalid_arguments_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], fragments: list[str]
) -> None:
    with pytest.raises(error) as caught:
        layer_norm(*arguments, **options)
    missing = [part for part in ["layer_norm", *fragments] if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_any_number_of_channels_is_served_on_a_cpu() -> None:
    x = torch.randn(1, 1, 2, 5000)
    weight: Tensor = torch.ones(5000)
    torch.testing.assert_close(layer_norm(x, weight, weight), F.layer_norm(x, (5000,)) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_give_the_shape_and_dtype_of_the_result(dtype: torch.dtype) -> None:
    x, weight = torch.empty(1, 2, 3, 4, dtype=dtype, device="meta"), torch.empty(4, device="meta")
    out = layer_norm(x, weight, weight)
    assert (out.shape, out.dtype, out.device.type) == (x.shape, dtype, "meta")
