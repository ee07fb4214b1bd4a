"""Bicubic resizing agrees with Pillow, whatever the factor and the dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from savl.bicubic import bicubic_downsample, bicubic_resize, bicubic_upscale


@pytest.mark.parametrize("size", [(36, 28), (18, 41), (5, 3), (9, 7)])
def test_bicubic_resize_agrees_with_pillow(size: tuple[int, int]) -> None:
    image = torch.rand(9, 7)
    expected = Image.fromarray(image.numpy()).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    resized = bicubic_resize(image[None, None], size)[0, 0]
    np.testing.assert_allclose(resized.numpy(), np.asarray(expected), rtol=0, atol=1e-5)


def test_bicubic_resize_returns_an_image_of_the_right_size_unchanged() -> None:
    image = torch.rand(1, 3, 4, 5)
    assert bicubic_resize(image, (4, 5)) is image


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_bicubic_upscale_leaves_a_uniform_image_uniform(scale: int) -> None:
    white = torch.ones(1, 3, 5, 1)
    torch.testing.assert_close(bicubic_upscale(white, scale), torch.ones(1, 3, 5 * scale, scale), rtol=0, atol=1e-6)


def test_bicubic_upscale_of_bfloat16_is_computed_in_float32() -> None:
    image = torch.rand(1, 3, 4, 4).bfloat16()
    assert torch.equal(bicubic_upscale(image, 4), bicubic_upscale(image.float(), 4).bfloat16())


def test_bicubic_downsample_is_clamped() -> None:
    edge = (torch.rand(1, 3, 32, 32) > 0.5).float()
    z = bicubic_downsample(edge, 4)
    assert z.shape == (1, 3, 8, 8)
    assert torch.equal(z, bicubic_resize(edge, (8, 8)).clamp(0, 1))
