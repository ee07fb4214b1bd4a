"""Tests of the positions of tiles and of their blending."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from savl.inference.tiling import Region, Span, feather, split, whole


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_cores_partition_the_image(height: int, width: int, side: int) -> None:
    image = torch.zeros(height, width)
    for core in split(whole(image), side):
        core.crop(image, whole(image)).add_(1)
    assert torch.equal(image, torch.ones(height, width))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(4, 40), st.integers(0, 2), st.sampled_from([1, 2, 4]))
def test_the_weights_of_all_tiles_sum_to_one_everywhere(
    height: int, width: int, side: int, margin: int, scale: int
) -> None:
    region = Region(Span(8, 8 + height), Span(16, 16 + width))
    total = torch.zeros(scale * height, scale * width)
    for core in split(region, side):
        visible = core.grown(margin, region)
        visible.scaled(scale).crop(total, region.scaled(scale)).add_(feather(core, region, margin, scale))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_spans_align_to_windows_without_leaving_the_image() -> None:
    assert Span(5, 17).aligned(8, Span(0, 20)) == Span(0, 20)
    assert Span(9, 15).aligned(8, Span(0, 64)) == Span(8, 16)
