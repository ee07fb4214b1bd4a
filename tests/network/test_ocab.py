"""OCAB: each window asks the larger window around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savl import ops
from savl.network import OCAB, SAVLConfig

Small = Callable[..., SAVLConfig]
Awaken = Callable[[Any], Any]


def features(batch: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(batch, height, width, 12, dtype=torch.float64)


@pytest.mark.parametrize(("overlap", "key_window"), [(0.5, 6), (0.0, 4), (1.0, 8)])
def test_ocab_is_its_formula(overlap: float, key_window: int, small_config: Small, awaken: Awaken) -> None:
    ocab = awaken(OCAB(small_config(overlap=overlap)))
    x = features()

    normed = F.layer_norm(x, (12,), ocab.norm_attention.weight, ocab.norm_attention.bias)
    q, k, v = F.linear(normed, ocab.qkv.weight, ocab.qkv.bias).chunk(3, dim=-1)
    attended = ops.overlapping_window_attention(
        q, torch.cat((k, v), dim=-1), ocab.bias_table, window=4, key_window=key_window
    )
    middle = x + F.linear(attended, ocab.proj.weight, ocab.proj.bias)
    normed = F.layer_norm(middle, (12,), ocab.norm_mlp.weight, ocab.norm_mlp.bias)
    hidden = F.gelu(F.linear(normed, ocab.mlp.expand.weight, ocab.mlp.expand.bias))
    expected = middle + F.linear(hidden, ocab.mlp.contract.weight, ocab.mlp.contract.bias)

    torch.testing.assert_close(ocab(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("overlap", "rows"), [(0.5, 81), (0.0, 49), (1.0, 121)])
def test_the_bias_table_has_a_row_for_every_offset(overlap: float, rows: int, small_config: Small) -> None:
    assert OCAB(small_config(overlap=overlap)).bias_table.shape == (rows, 2)


def test_keys_outside_the_image_are_zero_whatever_the_bias_of_qkv(small_config: Small, awaken: Awaken) -> None:
    ocab = awaken(OCAB(small_config()))
    with torch.no_grad():
        ocab.qkv.weight.zero_()
        ocab.qkv.bias.zero_()
        ocab.qkv.bias[24:] = 1.0  # v = 1 inside the image, whatever the features
        ocab.bias_table.zero_()
        ocab.proj.weight.copy_(torch.eye(12))
        ocab.proj.bias.zero_()
        ocab.mlp.contract.weight.zero_()
        ocab.mlp.contract.bias.zero_()
    x = features(1, 4, 4)
    share = torch.full_like(x, 16 / 36)  # of 36 keys 16 lie inside; padding before the projection would make it 1
    torch.testing.assert_close(ocab(x) - x, share)


def test_a_pixel_reaches_the_windows_whose_keys_hold_it(small_config: Small, awaken: Awaken) -> None:
    ocab = awaken(OCAB(small_config()))
    x = features(1)
    changed = x.clone()
    changed[0, 3, 5] += torch.randn(12)  # last row of the first windows, one margin away from the second row
    reached = (ocab(x) != ocab(changed)).any(dim=-1)[0]
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[:, 4:8] = True
    assert torch.equal(reached, expected), f"it reaches\n{reached.int()}"


def test_images_of_a_batch_do_not_see_each_other(small_config: Small, awaken: Awaken) -> None:
    ocab = awaken(OCAB(small_config()))
    x = features(3)
    torch.testing.assert_close(ocab(x)[1:2], ocab(x[1:2]), rtol=0, atol=1e-12)
