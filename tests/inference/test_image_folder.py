"""Folders of images: which files count, and what they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from savl.inference.image_folder import decode_rgb, find_images


def test_hidden_files_and_folders_named_like_images_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in find_images([tmp_path])] == ["a.png", "b.jpg"]


def test_gray_transparent_and_16_bit_images_become_8_bit_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 3), 77).save(tmp_path / "gray.png")
    Image.new("RGBA", (4, 3), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((3, 4), 200 * 257 + 40, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, colour in (("gray", (77, 77, 77)), ("clear", (10, 20, 30)), ("deep", (200, 200, 200))):
        pixels = decode_rgb(tmp_path / f"{name}.png")
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.broadcast_to(colour, (3, 4, 3)))
