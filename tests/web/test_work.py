"""The work behind the page, without a browser: results, errors in one line, cancelling, turns."""

from __future__ import annotations

import dataclasses
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import savl
from savl.cli import main
from savl.images.format import PNG, TIFF
from savl.images.result_mark import read_mark
from savl.images.write import write_image
from savl.inference import upscale_image
from savl.inference.upscaler import Upscaled
from savl.web import work
from savl.web.work import Cancelled, Choice, Desk, Failed, Task, distinct_stems

Submit = Callable[..., Task]


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(device="cpu")
    thread = threading.Thread(target=desk.work, args=[lambda: True])
    thread.start()
    yield desk
    desk.close()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def submit(desk: Desk, model_file: Path, tmp_path: Path) -> Submit:
    """Submit a file with the settings of a `Choice`; every picture has a folder of its own below results/."""

    def submit(source: Path, **settings: Any) -> Task:
        folder = tmp_path / "results" / f"{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        return desk.submit(source, source.stem, Choice(**{"model": str(model_file), **settings}), folder)

    return submit


def result_of(task: Task) -> work.Result:
    assert task.wait(60)
    return task.result()


def reason_of(task: Task) -> str:
    assert task.wait(60)
    with pytest.raises(Failed) as caught:
        task.result()
    assert not [path for path in task.folder.rglob("*") if path.is_file()]
    return str(caught.value)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def rotated_jpeg(path: Path) -> Path:
    """Write a JPEG file with an orientation, a camera's name and a resolution."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera"
    Image.fromarray(noise(20, 28, 3)).save(path, exif=exif, dpi=(300, 300))
    return path


def deep_tiff(path: Path) -> Path:
    write_image(path, noise(18, 20, 4, dtype=np.uint16), image_format=TIFF)
    return path


@pytest.mark.parametrize(
    ("make", "name", "settings", "options"),
    [
        (rotated_jpeg, "IMG_1.JPG", {}, []),
        (deep_tiff, "scan.tif", {"strength": 0.5, "scale": 2.0}, ["--strength", "0.5", "--scale", "2"]),
        (deep_tiff, "scan.tiff", {"format": "png", "scale": 1.5}, ["-f", "png", "--scale", "1.5"]),
    ],
)
def test_the_file_is_that_of_savl_upscale(
    make: Callable[[Path], Path],
    name: str,
    settings: dict[str, Any],
    options: list[str],
    submit: Submit,
    model_file: Path,
    tmp_path: Path,
) -> None:
    photo = make(tmp_path / name)
    result = result_of(submit(photo, **settings))
    with pytest.raises(SystemExit) as stop:
        main(["upscale", str(photo), "--model", str(model_file), "--device", "cpu", *options])
    assert not stop.value.code
    assert result.file.read_bytes() == (tmp_path / result.file.name).read_bytes()
    assert read_mark(result.file) == "upscaled"


def test_8_bits_are_computed_in_bfloat16_where_savl_upscale_does(
    submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale_image, "is_faster_in_bfloat16", lambda device: True)
    photo = tmp_path / "photo.png"
    write_image(photo, noise(16, 16, 3), image_format=PNG)
    result = result_of(submit(photo, model="savl-tiny"))
    pixels = np.asarray(Image.open(result.file))
    assert np.array_equal(pixels, savl.upscale(photo, device="cpu"))
    assert not np.array_equal(pixels, savl.upscale(photo, device="cpu", dtype="float32"))
    assert result.severity is not None
    assert result.severity.shape == (16, 16)


def test_before_and_after_have_one_size_and_are_upright(submit: Submit, tmp_path: Path) -> None:
    result = result_of(submit(rotated_jpeg(tmp_path / "photo.jpg")))
    assert (result.old_size, result.new_size) == ((20, 28), (80, 112))
    for path in (result.before, result.after, result.with_severity()):
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (80, 112), "RGB")


def test_large_results_are_shown_reduced(submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LARGEST_PREVIEW", 50)
    result = result_of(submit(rotated_jpeg(tmp_path / "photo.jpg")))
    assert [Image.open(path).size for path in (result.before, result.after, result.file)] == [
        (36, 50), (36, 50), (80, 112)
    ]  # fmt: skip


def test_transparent_pixels_are_shown_white(submit: Submit, tmp_path: Path) -> None:
    pixels = noise(16, 16, 4)
    pixels[..., 3] = 0
    photo = tmp_path / "clear.png"
    write_image(photo, pixels, image_format=PNG)
    result = result_of(submit(photo))
    assert np.asarray(Image.open(result.before)).min() >= 254
    assert np.asarray(Image.open(result.after)).min() >= 254
    assert np.asarray(Image.open(result.file)).shape == (64, 64, 4)


def test_the_severity_map_lies_over_the_result(submit: Submit, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    write_image(photo, noise(16, 16, 3), image_format=PNG)
    result = result_of(submit(photo))
    assert result.severity is not None
    for value, channel in ((0.0, 2), (2.0, 0)):  # violet, in which red is below blue, and yellow
        shown = dataclasses.replace(result, severity=np.full((16, 16), value, np.float32))
        (result.after.with_name("severity.jpg")).unlink(missing_ok=True)
        mean = np.asarray(Image.open(shown.with_severity())).mean(axis=(0, 1))
        assert mean[channel] == max(mean[0], mean[2])
    assert dataclasses.replace(result, severity=None).with_severity() == result.after


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"Dear reader", "not an image savl can read (PNG, JPEG"),
        ("empty.jpg", b"", "empty"),
        ("huge.png", png_header(30_000, 30_000), "out of memory: 120000x120000 pixels take about "),
        ("cut.png", png_header(40, 30), "truncated"),
        ("my clip.mp4", b"frames", "is a video; in the shell, savl upscale 'my clip.mp4' upscales it"),
    ],
    ids=["text", "empty", "huge", "truncated", "video"],
)
def test_bad_input_gives_one_line_and_no_file(
    name: str, content: bytes, reason: str, submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    said = reason_of(submit(tmp_path / name))
    assert reason in said
    assert "\n" not in said
    assert str(tmp_path) not in said


def test_a_truncated_jpeg_file_gives_the_line_of_savl_upscale(
    submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = rotated_jpeg(tmp_path / "whole.jpg").read_bytes()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    said = reason_of(submit(cut))
    with pytest.raises(SystemExit):
        main(["upscale", str(cut)])
    assert f"cut.jpg: {said}\n" in capsys.readouterr().err


def test_a_result_that_does_not_fit_the_format_is_refused_without_a_path(submit: Submit, tmp_path: Path) -> None:
    write_image(tmp_path / "long.png", noise(1, 5000, 3), image_format=PNG)
    said = reason_of(submit(tmp_path / "long.png", format="webp"))
    assert said.startswith("WebP holds at most 16383 pixels a side")


def test_a_model_that_does_not_load_gives_one_line(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    write_image(tmp_path / "photo.png", noise(8, 8, 3), image_format=PNG)
    said = reason_of(submit(tmp_path / "photo.png", model=str(tmp_path / "broken.safetensors")))
    assert "broken.safetensors" in said
    assert "\n" not in said


class Slow:
    """An upscaler of many tiles, which waits in the first one until it is told to go on."""

    scale = 2
    has_field = False

    def __init__(self) -> None:
        self.begun, self.go_on, self.computed = threading.Event(), threading.Event(), 0

    def __call__(self, lr: torch.Tensor, *, on_tile: Any = None, strength: Any = None) -> Upscaled:
        self.begun.set()
        assert self.go_on.wait(60)
        for tile in range(1, 101):
            self.computed += 1
            on_tile(tile, 100)
        ones = torch.ones(lr.shape[0], *lr.shape[-2:])
        return Upscaled(F.interpolate(lr, scale_factor=2), ones, ones)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    upscaler = Slow()
    monkeypatch.setattr(work, "as_upscaler", lambda model, **settings: upscaler)
    return upscaler


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    write_image(tmp_path / "photo.png", noise(8, 8, 3), image_format=PNG)
    return tmp_path / "photo.png"


def test_cancelling_stops_at_the_next_tile_and_leaves_no_file(slow: Slow, submit: Submit, photo: Path) -> None:
    task, later = submit(photo), submit(photo)
    assert slow.begun.wait(60)
    task.cancel()
    slow.go_on.set()
    assert task.wait(60)
    with pytest.raises(Cancelled):
        task.result()
    assert slow.computed == 1
    assert list(task.folder.iterdir()) == []
    assert result_of(later).new_size == (16, 16)  # the next picture is not affected


def test_a_picture_that_waits_can_be_cancelled(slow: Slow, submit: Submit, photo: Path) -> None:
    first, second = submit(photo), submit(photo)
    assert slow.begun.wait(60)
    assert (first.started, second.started) == (True, False)
    second.cancel()
    slow.go_on.set()
    assert result_of(first).new_size == (16, 16)
    assert second.wait(60)
    with pytest.raises(Cancelled):
        second.result()
    assert slow.computed == 100


def test_closing_the_desk_cancels_all_pictures(slow: Slow, submit: Submit, desk: Desk, photo: Path) -> None:
    tasks = [submit(photo), submit(photo)]
    assert slow.begun.wait(60)
    desk.close()
    slow.go_on.set()
    tasks.append(submit(photo))
    for task in tasks:
        assert task.wait(60)
        with pytest.raises(Cancelled):
            task.result()


def test_ctrl_c_cancels_the_picture_and_ends_the_work(
    slow: Slow, model_file: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "_on_tile", press)
    slow.go_on.set()
    desk = Desk()
    (tmp_path / "result").mkdir()
    task = desk.submit(photo, "photo", Choice(str(model_file)), tmp_path / "result")
    with pytest.raises(KeyboardInterrupt):
        desk.work(lambda: True)
    with pytest.raises(Cancelled):
        task.result()
    assert list((tmp_path / "result").iterdir()) == []


def test_a_network_without_a_field_has_no_severity_map(slow: Slow, submit: Submit, photo: Path) -> None:
    slow.go_on.set()
    assert result_of(submit(photo)).severity is None


def test_equal_names_are_made_distinct() -> None:
    paths = [Path(name) for name in ("x/a.jpg", "y/A.png", "a.tif", "a-2.jpg", "b.jpg")]
    stems = distinct_stems(paths)
    assert stems == ["a", "A-3", "a-4", "a-2", "b"]
