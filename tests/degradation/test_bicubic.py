"""The content code: the clean downsample."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from savl.degradation import bicubic_downsample


def test_bicubic_downsample_agrees_with_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
    x = torch.from_numpy(pixels).float()[None, None].expand(1, 3, -1, -1) / 255
    expected = Image.fromarray(pixels.astype(np.float32)).resize((12, 16), Image.Resampling.BICUBIC)
    ours = bicubic_downsample(x, 4)[0, 0].numpy() * 255
    np.testing.assert_allclose(ours, np.clip(np.asarray(expected), 0, 255), atol=1e-2)


def test_overshoot_is_clamped(photo: Tensor) -> None:
    edge = (photo > 0.5).float()
    z = bicubic_downsample(edge, 4)
    assert z.min() == 0
    assert z.max() == 1
