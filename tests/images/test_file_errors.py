"""Errors of reading and writing: each kind of bad file is named, and outputs appear complete or not at all."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from savl.atomic_write import atomic_write, write_atomically
from savl.images import write
from savl.images.errors import (
    ImageFileError,
    ImageNotFound,
    OutputExists,
    UnreadableImage,
    UnsupportedImage,
    UnwritableImage,
)
from savl.images.format import FORMATS, JPEG, PNG, WEBP, ImageFormat
from savl.images.read import read_image
from savl.images.write import write_image


def picture(side: int = 96) -> np.ndarray:
    """Return a smooth image with noise, for which every format needs several kilobytes."""
    rows, columns = np.mgrid[0:side, 0:side]
    noise = np.random.default_rng(0).integers(0, 40, (side, side, 3))
    return (np.stack([rows, columns, rows + columns], -1) % 200 + noise).astype(np.uint8)


@pytest.mark.parametrize("part", [0.01, 0.3, 0.9, 0.995])
@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_truncated_file_is_an_error_and_not_gray_pixels(
    tmp_path: Path, image_format: ImageFormat, part: float
) -> None:
    path = tmp_path / "picture"
    write_image(path, picture(), image_format=image_format)
    content = path.read_bytes()
    path.write_bytes(content[: max(16, int(len(content) * part))])
    with pytest.raises(UnreadableImage, match=f"truncated or corrupt {image_format.title}") as caught:
        read_image(path)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_file_of_noise_after_a_valid_signature_is_an_error(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "picture"
    write_image(path, picture(), image_format=image_format)
    content = path.read_bytes()
    path.write_bytes(content[:12] + np.random.default_rng(1).bytes(5000))
    with pytest.raises(UnreadableImage):
        read_image(path)


def test_a_png_with_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_image(path, picture(), image_format=PNG)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UnreadableImage):
        read_image(path)


def test_a_jpeg_whose_decoder_had_to_make_up_blocks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    write_image(path, picture(), image_format=JPEG)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2] = b"\xff\xd3"  # a restart marker at a wrong position
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match="corrupt JPEG"):
        read_image(path)


def test_a_jpeg_with_stray_bytes_at_its_end_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    write_image(path, picture(), image_format=JPEG)
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes(40) + content[-2:] + b"appended by a camera")
    assert read_image(path).pixels.shape == (96, 96, 3)


def test_an_error_message_contains_nothing_about_an_earlier_file(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", picture(), image_format=JPEG)
    write_image(tmp_path / "b.png", picture(), image_format=PNG)
    for name in ("a.jpg", "b.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match="JPEG"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / "b.png")
    assert "jpeg" not in caught.value.reason.lower()


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(UnreadableImage, match="empty"):
        read_image(tmp_path / "empty.png")


@pytest.mark.parametrize("content", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"8BPS" + bytes(50)])
def test_a_file_of_another_kind_is_refused_with_the_accepted_formats(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match="PNG, JPEG, WebP, TIFF"):
        read_image(tmp_path / "x.png")


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_image(tmp_path / "none.png")
    assert isinstance(caught.value, ImageNotFound)


def test_a_folder_is_refused_as_an_image(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="directory"):
        read_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="is not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_a_png_truncated_in_its_header_is_reported_as_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write_image(path, picture(), image_format=PNG)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert caught.value.reason == "truncated or corrupt PNG (its header cannot be read)"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may read everything")
def test_a_file_without_read_permission_is_reported_as_such(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", picture(), image_format=PNG)
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(UnreadableImage, match="permission"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_animations_are_refused(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(UnsupportedImage, match="single images"):
        read_image(tmp_path / f"moving.{ending}")


def test_float_samples_and_many_bands_are_refused(tmp_path: Path) -> None:
    import pyvips

    pyvips.Image.black(4, 4, bands=3).cast("float").tiffsave(str(tmp_path / "float.tif"))
    with pytest.raises(UnsupportedImage, match="float samples"):
        read_image(tmp_path / "float.tif")
    pyvips.Image.black(4, 4, bands=7).tiffsave(str(tmp_path / "bands.tif"))
    with pytest.raises(UnsupportedImage, match="7 bands"):
        read_image(tmp_path / "bands.tif")


@pytest.mark.parametrize(("image_format", "side"), [(WEBP, 16384), (JPEG, 65501)])
def test_a_picture_too_large_for_the_format_is_refused_with_the_limit(
    tmp_path: Path, image_format: ImageFormat, side: int
) -> None:
    with pytest.raises(UnwritableImage, match=str(image_format.max_side)):
        write_image(tmp_path / "x", np.zeros((1, side, 3), np.uint8), image_format=image_format)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    with pytest.raises(OutputExists):
        write_image(path, picture(), image_format=PNG)
    assert path.read_bytes() == b"old"
    write_image(path, picture(), image_format=PNG, overwrite=True)
    assert read_image(path).pixels.shape == (96, 96, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: object, file: object, *rest: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(write, "_encode", fail)
    with pytest.raises(UnwritableImage, match="No space left on device"):
        write_image(path, picture(), image_format=PNG, overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("image_format", FORMATS, ids=lambda f: f.name)
def test_a_full_disk_is_an_error(tmp_path: Path, image_format: ImageFormat) -> None:
    with open("/dev/full", "r+b", buffering=0) as full:
        image = write._wrap(picture(600), image_format)
        with pytest.raises((OSError, write._vips_error())):
            write._encode(image, full, image_format, 95)


def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_write(tmp_path / "x", overwrite=False) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def overtaken() -> None:
        with atomic_write(tmp_path / "x", overwrite=False) as file:
            file.write(b"new")
            (tmp_path / "x").write_bytes(b"someone else's")

    with pytest.raises(FileExistsError):
        overtaken()
    assert (tmp_path / "x").read_bytes() == b"someone else's"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_output_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UnwritableImage, match="No such file or directory"):
        write_image(tmp_path / "none" / "x.png", picture(), image_format=PNG)


def test_a_folder_that_is_not_writable_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnwritableImage) as caught:
        write_image(tmp_path / "x.png", picture(), image_format=PNG)
    assert caught.value.reason == "cannot be written: Permission denied"


@pytest.mark.parametrize("name", ["日" * 83 + ".png", "x" * 251 + ".png", "é" * 120 + ".png"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name, overwrite=False) as file:
        file.write(b"content")
        (part,) = tmp_path.iterdir()
        assert part.name.startswith(f".{name[:10]}")
        assert part.suffix == ".part"
        assert len(os.fsencode(part.name)) < 143, "what encrypted file systems allow"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_regular_files_are_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageFileError, match="regular file"):
        write_image(tmp_path / "folder.png", picture(), image_format=PNG, overwrite=overwrite)


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    write_image(tmp_path / "link.png", picture(), image_format=PNG, overwrite=True)
    assert (tmp_path / "link.png").is_symlink()
    assert read_image(tmp_path / "real.png").pixels.shape == (96, 96, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_new_files_have_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert (tmp_path / "x").read_bytes() == b"content"


@pytest.mark.parametrize("ending", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_files_raise_nothing_but_image_file_errors(ending: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(24)).save(buffer, ending)
    sound = buffer.getvalue()
    random = np.random.default_rng(0)
    reasons = []
    for _ in range(150):
        damaged = bytearray(sound)
        # Damage headers more often than samples; they are at both ends of a file.
        place = int(random.choice([random.integers(0, 64), random.integers(0, len(sound)), -random.integers(1, 200)]))
        damaged[place] = random.integers(0, 256)
        if random.random() < 0.2:
            del damaged[random.integers(16, len(sound)) :]
        try:
            read_image(bytes(damaged))
            reasons.append("")
        except ImageFileError as error:
            reasons.append(error.reason)
    assert "" in reasons, "some bytes can be changed without harm"
    assert not any("\n" in reason for reason in reasons)
