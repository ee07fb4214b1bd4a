"""`savl.upscale` of bytes, file objects and pages, and `savl.upscale_file` from any of them to a file."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import savl
from savl.images.errors import ImageNotFound, OutputExists, UnreadableImage, UnsupportedImage
from savl.images.format import PNG
from savl.images.read import read_image
from savl.images.write import write_image


@dataclass
class Nearest:
    """Substitute for a network that repeats every pixel twice in each direction."""

    scale: int = 2

    def __call__(self, lr: torch.Tensor, *, on_tile: Any = None) -> SimpleNamespace:
        if on_tile is not None:
            on_tile(1, 1)
        sr = lr.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        return SimpleNamespace(sr=sr, severity=torch.linspace(0, 2, lr[0, 0].numel()).view(lr[:, 0].shape))


def twice(pixels: Any) -> Any:
    return pixels.repeat(2, 0).repeat(2, 1)


PIXELS = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_image(tmp_path / "x.png", PIXELS, image_format=PNG)
    return tmp_path / "x.png"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    return tmp_path / "x.tif"


class Unnamed:
    """A stream that can only be read, like that of a socket."""

    def __init__(self, content: bytes) -> None:
        self.read = io.BytesIO(content).read


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "open file": lambda path: open(path, "rb"),  # noqa: SIM115
    "unbuffered file": lambda path: open(path, "rb", buffering=0),  # noqa: SIM115
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "stream": lambda path: Unnamed(path.read_bytes()),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_kind_of_source_is_accepted(source: Callable[[Path], Any], path: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(savl.upscale(source(path), model=Nearest()), twice(PIXELS))
    done = savl.upscale_file(source(path), tmp_path / "out.png", model=Nearest())
    assert (done.old_size, done.new_size, done.notes) == ((7, 5), (14, 10), ())
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, twice(PIXELS))


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (b"", UnreadableImage, "<bytes>: the file is empty"),
        (b"nothing", UnreadableImage, "<bytes>: not an image"),
        (io.BytesIO(b"nothing"), UnreadableImage, "not an image"),
        (io.StringIO("text"), TypeError, "a file object in text mode; open the file with mode 'rb'"),
        ("missing.png", ImageNotFound, "missing.png: no such file"),
        ("a\0b.png", ValueError, "the path .* has a NUL character"),
    ],
)
def test_bad_files_are_refused_by_name(image: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        savl.upscale(image, model=Nearest())
    if isinstance(image, io.IOBase):
        image.seek(0)
    with pytest.raises(error, match=words):
        savl.upscale_file(image, tmp_path / "out.png", model=Nearest())
    assert not (tmp_path / "out.png").exists()


def test_a_file_in_text_mode_is_refused_with_a_solution(path: Path) -> None:
    with open(path) as file, pytest.raises(TypeError, match="image: a file object in text mode; open .* mode 'rb'"):
        savl.upscale(file, model=Nearest())


@pytest.mark.parametrize("page", [1, 2, 3])
def test_the_requested_page_is_read(page: int, pages: Path, tmp_path: Path) -> None:
    colour = [255 * (page == number) for number in (1, 2, 3)]
    for source in (pages, pages.read_bytes()):
        assert (savl.upscale(source, page=page, model=Nearest()) == colour).all()
        assert savl.upscale_file(source, tmp_path / "out.png", page=page, overwrite=True, model=Nearest()).notes == ()
        assert (read_image(tmp_path / "out.png").pixels == colour).all()


def test_the_first_page_is_taken_by_default_and_a_file_says_so(pages: Path, tmp_path: Path) -> None:
    assert (savl.upscale(pages, model=Nearest()) == [255, 0, 0]).all()
    (note,) = savl.upscale_file(pages, tmp_path / "out.png", model=Nearest()).notes
    assert note.startswith("page 1 of 3")


@pytest.mark.parametrize(
    ("page", "error", "words"),
    [
        (0, ValueError, "page must be at least 1"),
        (4, UnsupportedImage, "no page 4"),
        ("2", TypeError, "page must be an int, counted from 1, got str '2'"),
        (True, TypeError, "page must be an int"),
    ],
)
def test_missing_pages_are_refused(page: Any, error: type[Exception], words: str, pages: Path) -> None:
    with pytest.raises(error, match=words):
        savl.upscale(pages, page=page, model=Nearest())


def test_an_array_has_no_pages() -> None:
    with pytest.raises(ValueError, match="page: only image files have pages, the image is a ndarray"):
        savl.upscale(PIXELS, page=1, model=Nearest())


def test_pil_images_of_files_are_upright_as_their_paths_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((PIXELS >> 8).astype(np.uint8)).save(tmp_path / "x.png", exif=exif)
    by_path = savl.upscale(tmp_path / "x.png", model=Nearest())
    assert by_path.shape == (14, 10, 3)
    np.testing.assert_array_equal(savl.upscale(Image.open(tmp_path / "x.png"), model=Nearest()), by_path)


# upscale_file


@pytest.mark.parametrize(("suffix", "format"), [(".PNG", "png"), (".jpeg", "jpg"), (".webp", "webp"), (".tif", "tiff")])
def test_the_format_is_that_of_the_suffix_or_the_one_that_is_named(
    suffix: str, format: str, path: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "new" / f"a{suffix}", tmp_path / "b.dat"
    savl.upscale_file(path, first, model=Nearest())
    savl.upscale_file(path, second, format=format, model=Nearest())
    for written in (first, second):
        assert read_image(written).format.name == format
        assert read_image(written).pixels.shape == (10, 14, 3)


def test_notes_name_the_data_that_the_format_cannot_store(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 40, 30, 0)).save(tmp_path / "x.png")
    done = savl.upscale_file(tmp_path / "x.png", tmp_path / "x.jpg", model=Nearest(), quality=100)
    assert any("transparency" in note for note in done.notes)
    assert (read_image(tmp_path / "x.jpg").pixels == 255).all()


def test_scale_severity_map_and_callback_are_supported(path: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    done = savl.upscale_file(
        path,
        tmp_path / "out.tiff",
        model=Nearest(),
        scale=3,
        severity_map=tmp_path / "map.png",
        on_tile=lambda done, total: calls.append((done, total)),
    )
    assert done.new_size == (21, 15)
    assert read_image(tmp_path / "out.tiff").pixels.shape == (15, 21, 3)
    assert (tmp_path / "map.png").is_file()
    assert calls == [(1, 1)]


def test_existing_files_are_replaced_only_on_request(path: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"precious")
    with pytest.raises(OutputExists):
        savl.upscale_file(path, tmp_path / "out.png", model=Nearest())
    assert (tmp_path / "out.png").read_bytes() == b"precious"
    savl.upscale_file(path, tmp_path / "out.png", model=Nearest(), overwrite=True)
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, twice(PIXELS))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"target": "out"}, ValueError, "target must end in one of .png .* or format must be given, got 'out'"),
        ({"target": "out.bmp"}, ValueError, "target must end in one of"),
        ({"target": 7}, TypeError, "target must be a path, got int"),
        ({"format": "gif"}, ValueError, "format must be one of png, jpg, webp, tiff, or None, got 'gif'"),
        ({"format": "jpg"}, ValueError, "format 'jpg' contradicts the suffix of target 'out.png'"),
        ({"quality": 0}, ValueError, "quality must be an int from 1 to 100, got 0"),
        ({"quality": 9.5}, ValueError, "quality must be an int from 1 to 100, got 9.5"),
        ({"scale": -1}, ValueError, "scale must be a finite number above 0"),
        ({"severity_map": "./out.png"}, ValueError, "severity_map and target must be two files"),
        ({"source": PIXELS}, TypeError, "source must be a path, bytes or a binary file object, got ndarray"),
        ({"tile": 64}, ValueError, "belong to the Upscaler"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    arguments: dict[str, Any], error: type[Exception], words: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=words):
        savl.upscale_file(**{"source": path, "target": "out.png", "model": Nearest(), **arguments})
    assert sorted(path.parent.iterdir()) == before


def test_the_shipped_network_upscales_a_file_from_python(tmp_path: Path) -> None:
    Image.fromarray((PIXELS >> 8).astype(np.uint8)).save(tmp_path / "x.png")
    done = savl.upscale_file(tmp_path / "x.png", tmp_path / "y.png", device="cpu")
    assert done.new_size == (28, 20)
    array = savl.upscale(tmp_path / "x.png", device="cpu")
    np.testing.assert_array_equal(read_image(tmp_path / "y.png").pixels, array)


def test_upscale_file_is_a_function_whatever_was_imported_before() -> None:
    code = (
        "import sys, savl, savl.inference; from savl import upscale_file; import savl.inference.upscale_file; "
        "assert callable(savl.upscale_file) and savl.upscale_file is upscale_file; print(savl.upscale_file.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "savl.inference.upscale_file"
