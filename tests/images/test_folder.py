"""Folders of images: which files are found, and how they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from savl.images.folder import decode_rgb, find_images
from savl.images.read import read_size


def test_hidden_files_and_folders_with_image_suffixes_are_left_out(tmp_path: Path) -> None:
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


def test_a_file_found_through_several_folders_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a/1.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "2.png")
    assert find_images([tmp_path, tmp_path / "a"]) == [tmp_path / "2.png", tmp_path / "a/1.png"]
    (tmp_path / "a/3.png").symlink_to(tmp_path / "a/1.png")
    assert find_images([tmp_path / "a"]) == [tmp_path / "a/1.png", tmp_path / "a/3.png"], "a name of its own"


def test_the_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png")
    assert read_size(tmp_path / "1.png") == (30, 20)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-20])
    assert read_size(tmp_path / "1.png") == (30, 20)
    (tmp_path / "1.png").write_bytes(b"no image")
    assert read_size(tmp_path / "1.png") is None
