"""White stays white, whatever the network says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import savl
from savl.inference.upscaler import FLAT_RADIUS, restore_flat_areas


def test_a_flat_area_gets_its_exact_colour_and_the_rest_is_left_alone() -> None:
    lr = torch.rand(2, 3, 20, 24)
    lr[1, :, :, 10:] = torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    sr = torch.rand(2, 3, 80, 96)
    before = sr.clone()
    restore_flat_areas(sr, lr)
    first = 10 + FLAT_RADIUS  # the first column whose whole neighbourhood is flat; at the border there is less to see
    assert torch.equal(sr[0], before[0])
    assert torch.equal(sr[1, ..., : 4 * first], before[1, ..., : 4 * first])
    assert torch.equal(sr[1, ..., 4 * first :], lr[1, ..., first:].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("value", [0, 1, 77, 128, 254, 255])
def test_the_shipped_network_keeps_a_flat_picture_exactly(value: int) -> None:
    picture = np.full((21, 30, 3), (value, 255 - value, value // 2), np.uint8)
    out = savl.upscale(picture)
    assert np.array_equal(out, np.broadcast_to(picture[0, 0], (84, 120, 3)))


def test_the_shipped_network_keeps_white_paper_white_around_a_drawing() -> None:
    picture = np.full((48, 48, 3), 255, np.uint8)
    picture[20:28, 20:28] = (200, 30, 40)
    out = savl.upscale(picture)
    paper = np.ones(out.shape[:2], bool)
    paper[4 * 15 : 4 * 33, 4 * 15 : 4 * 33] = False
    assert (out[paper] == 255).all()
    assert out[4 * 22 : 4 * 26, 4 * 22 : 4 * 26].reshape(-1, 3).mean(axis=0) == pytest.approx((200, 30, 40), abs=6)
