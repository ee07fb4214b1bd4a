"""Sources of `read_image`: paths, bytes and file objects, and the pages of a file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from savl.images.errors import UnreadableImage, UnsupportedImage
from savl.images.format import FORMATS, ImageFormat
from savl.images.read import read_image
from savl.images.write import write_image

COLOURS = [(200, 40, 30), (10, 220, 60), (30, 60, 240)]


def ramp() -> np.ndarray:
    return np.arange(16 * 12 * 3, dtype=np.uint16).reshape(12, 16, 3).astype(np.uint8)


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_bytes_and_file_objects_read_as_the_file_does(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "picture"
    write_image(path, ramp(), image_format=image_format)
    expected = read_image(path).pixels
    content = path.read_bytes()
    with open(path, "rb") as file:
        sources = [content, bytearray(content), memoryview(content), io.BytesIO(content), file]
        for source in sources:
            np.testing.assert_array_equal(read_image(source).pixels, expected)


def test_errors_of_bytes_and_streams_say_where_they_came_from(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="<bytes>: not an image"):
        read_image(b"hello")
    with pytest.raises(UnreadableImage, match="<bytes>: the file is empty"):
        read_image(b"")
    with pytest.raises(UnreadableImage, match="<stream>: not an image"):
        read_image(io.BytesIO(b"hello"))
    (tmp_path / "named.png").write_bytes(b"hello")
    with open(tmp_path / "named.png", "rb") as file, pytest.raises(UnreadableImage) as caught:
        read_image(file)
    assert caught.value.path == str(tmp_path / "named.png")


@pytest.mark.parametrize("source", [io.StringIO("text"), 7, None])
def test_a_source_of_another_kind_is_refused_by_its_type(source: object) -> None:
    with pytest.raises(TypeError, match="source must be a path, bytes or a binary file object, got"):
        read_image(source)  # type: ignore[arg-type]


@pytest.fixture
def three_pages(tmp_path: Path) -> Path:
    pages = [Image.new("RGB", (8, 6), colour) for colour in COLOURS]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    return tmp_path / "pages.tif"


@pytest.mark.parametrize("page", [1, 2, 3])
def test_a_page_of_a_tiff_is_counted_from_one(three_pages: Path, page: int) -> None:
    picture = read_image(three_pages, page=page)
    assert (picture.pixels == COLOURS[page - 1]).all()
    assert picture.notes == ()


def test_the_first_page_is_taken_with_a_note_of_the_others(three_pages: Path) -> None:
    picture = read_image(three_pages)
    assert (picture.pixels == COLOURS[0]).all()
    assert picture.notes == ("page 1 of 3; --page picks another",)
    with open(three_pages, "rb") as file:
        assert read_image(file, page=2).pixels[0, 0].tolist() == list(COLOURS[1])


@pytest.mark.parametrize("page", [4, 1000])
def test_a_missing_page_is_reported_with_the_number_of_pages(three_pages: Path, page: int) -> None:
    with pytest.raises(UnsupportedImage, match=f"has no page {page}; it holds 3 pages"):
        read_image(three_pages, page=page)


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_the_only_page_of_a_file_is_page_one(tmp_path: Path, image_format: ImageFormat) -> None:
    write_image(tmp_path / "picture", ramp(), image_format=image_format)
    assert read_image(tmp_path / "picture", page=1).notes == ()
    with pytest.raises(UnsupportedImage, match="has no page 2; it holds 1 page"):
        read_image(tmp_path / "picture", page=2)


@pytest.mark.parametrize("page", [0, -1])
def test_pages_below_one_are_a_mistake(page: int) -> None:
    with pytest.raises(ValueError, match=f"page must be at least 1, got {page}"):
        read_image(b"", page=page)


@pytest.mark.parametrize("page", [1.0, "1", True, (1,), np.float32(1)], ids=repr)
def test_a_page_that_is_no_int_is_reported(page: object) -> None:
    kind = type(page).__name__
    with pytest.raises(TypeError, match=f"page must be an int, counted from 1, got {kind} "):
        read_image(b"", page=page)  # type: ignore[arg-type]


def test_an_int_of_numpy_is_a_page(three_pages: Path) -> None:
    assert (read_image(three_pages, page=np.int64(2)).pixels == COLOURS[1]).all()  # type: ignore[arg-type]
