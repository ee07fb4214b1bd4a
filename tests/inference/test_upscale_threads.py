"""`savl.upscale` in several threads: each file is read and checked independently."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import savl
from savl.images.errors import UnreadableImage


class Doubling:
    """Substitute for a network that repeats each pixel."""

    scale = 2

    def __call__(self, lr: torch.Tensor, *, on_tile: object = None) -> SimpleNamespace:
        sr = lr.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return SimpleNamespace(sr=sr, severity=torch.ones(lr.shape[0], *lr.shape[2:]))


def test_threads_upscale_good_files_and_refuse_bad_ones(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()
    (tmp_path / "good.jpg").write_bytes(content)
    # The second file is damaged in its last row, which libvips alone does not report.
    (tmp_path / "bad.jpg").write_bytes(content[:-20] + b"\xff\xd3" + content[-18:])
    expected = savl.upscale(tmp_path / "good.jpg", model=Doubling())

    def work(number: int) -> list[str]:
        wrong = []
        for step in range(25):
            name = ("good.jpg", "bad.jpg")[(number + step) % 2]
            try:
                pixels = savl.upscale(tmp_path / name, model=Doubling())
                right = name == "good.jpg" and bool((pixels == expected).all())
            except UnreadableImage:
                right = name == "bad.jpg"
            if not right:
                wrong.append(name)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8)), []) == []
